"""ONNX files: written by torch's exporter and checked against PyTorch, with what a reader needs to feed them."""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from timm_igkd.distillation.live_teacher import check_has_classifier, check_logits
from timm_igkd.errors import InputError, RunError, first_line
from timm_igkd.eval_mode import eval_mode
from timm_igkd.models.arguments import model_data_config
from timm_igkd.models.folder_config import check_preprocessing
from timm_igkd.models.loading import count_macs, count_parameters
from timm_igkd.models.output_names import check_reads_colour, names_in_order
from timm_igkd.random_streams import fixed_noise
from timm_igkd.records import parse_record

OPSET = 18
"""The operator set of the files; onnxruntime reads it since 1.14."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class OnnxMetadata:
    """What an exported file says of itself: every field is one entry of the model's metadata, as JSON.

    Attributes:
        architecture: timm's name.
        input_size: (channels, height, width) of the input, its first dimension is the batch.
        interpolation: with which an image is resized, as timm names it.
        mean: subtracted from pixels in [0, 1].
        std: then divided by.
        crop_pct: share of the resized image that the crop keeps.
        crop_mode: of timm's evaluation transform.
        class_names: in the order of the outputs; None where the model names none.
        num_parameters: of the PyTorch model.
        macs: multiply-accumulates of one image.
    """

    architecture: str
    input_size: tuple[int, int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]
    class_names: tuple[str, ...] | None
    num_parameters: int | None
    macs: int | None


def missing_onnx_packages() -> list[str]:
    """Return the packages of the extra `onnx` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def require_onnx_packages(what: str) -> None:
    """Raise InputError unless the packages of the extra `onnx` are installed; `what` needs them."""
    if missing := missing_onnx_packages():
        raise InputError(f"{what} needs {', '.join(missing)}; install with: pip install 'timm-igkd[onnx]'")


def onnx_versions() -> dict[str, str]:
    """Return the versions of the packages of the extra `onnx`."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # onnxruntime-gpu, -openvino and -directml are onnxruntime too
        return str(importlib.import_module(name).__version__)


# ---- writing -------------------------------------------------------------------------------------------------------


def describe_model(model: nn.Module, class_names: Sequence[str] | None = None) -> OnnxMetadata:
    """Return the metadata of a timm model's file.

    Args:
        model: names its outputs, or `class_names` does.
        class_names: one per output. Without them, ImageNet's are those of a model of as many outputs, as timm has it.
    """
    config = model_data_config(model)
    own, known = names_in_order(model)
    names = class_names if class_names is not None and not (known and own) else own
    return OnnxMetadata(
        architecture=str(cast(dict[str, Any], model.pretrained_cfg).get("architecture") or type(model).__name__),
        input_size=tuple(config["input_size"]),
        interpolation=config["interpolation"],
        mean=tuple(map(float, config["mean"])),
        std=tuple(map(float, config["std"])),
        crop_pct=float(config["crop_pct"]),
        crop_mode=config["crop_mode"],
        class_names=None if names is None else tuple(names),
        num_parameters=count_parameters(model),
        macs=count_macs(model),
    )


def write_onnx(model: nn.Module, path: Path, class_names: Sequence[str] | None = None) -> OnnxMetadata:
    """Write a model as an ONNX file: operator set `OPSET`, input `image` (batch, C, H, W), output `logits` (batch, N).

    Args:
        model: a timm classifier in float32; its mode and device are the same afterwards.
        path: of the file, which holds the weights too.
        class_names: of the outputs, where the model does not name them itself.

    Raises:
        InputError: a package of the extra `onnx` is missing, or a model of other images than colour ones, of other
            numbers than float32, or without classifier.
        RunError: the model cannot be exported, or the file's outputs are not PyTorch's to 1e-4 of their size.
    """
    require_onnx_packages("an ONNX file")
    check_reads_colour(model, "model")
    check_has_classifier(model, "model")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise InputError(f"an ONNX file is of a float32 model, {name} is {tensor.dtype}; call model.float()")
    with eval_mode(model, device="cpu"):
        metadata = describe_model(model, class_names)
        noise = fixed_noise(3, *metadata.input_size)
        with torch.inference_mode():
            check_logits("model", model(noise[:2]))
        _export(model, noise[:2], path)
        write_metadata(path, metadata)
        _check_output(path, model, noise)  # of another batch size than it was made with
    return metadata


def _export(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    with quiet_libraries():
        try:
            torch.onnx.export(
                model,
                (images,),
                str(path),
                dynamo=True,
                external_data=False,
                verbose=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        except Exception as error:  # each unsupported layer has an exception of its own
            why = first_line(error.__cause__ or error)
            raise RunError(f"the model cannot be exported to ONNX: {why}; choose another architecture") from error


@torch.inference_mode()
def _check_output(path: Path, model: nn.Module, images: torch.Tensor) -> None:
    try:
        session = open_session(path)
    except Exception as error:  # onnxruntime's own, of no common kind
        raise RunError(
            f"onnxruntime does not run the exported file: {first_line(error)}; choose another architecture"
        ) from error
    expected, found = model(images), torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    difference = (found - expected).abs().max().item()
    if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
        raise RunError(f"the ONNX output differs from PyTorch's by {difference:.2g}, expected at most 1e-4 of its size")


def write_metadata(path: Path, metadata: OnnxMetadata) -> None:
    """Put metadata into a file, in the place of what it says of itself: the exporter notes this machine's paths."""
    import onnx

    proto = onnx.load(path)
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    for noted in (proto.graph, *proto.functions, *nodes, *proto.graph.value_info, *proto.graph.initializer):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")
    onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in vars(metadata).items()})
    onnx.save(proto, path)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let torch's exporter and onnxruntime's quantiser warn nobody; the host's logging is as before afterwards."""
    root, names = logging.getLogger(), ("torch.onnx", "onnxscript", "torch.export")
    loggers = [root, *map(logging.getLogger, names)]
    levels = [logger.level for logger in loggers]
    nobody = logging.NullHandler()  # else the first record of the quantiser gives the host's root logger a handler
    root.addHandler(nobody)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        root.removeHandler(nobody)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---- reading -------------------------------------------------------------------------------------------------------


def open_session(path: Path, threads: int | None = None) -> Any:
    """Return an onnxruntime session of a file on the CPU.

    Args:
        path: of a file, read whole; weights in other files are not.
        threads: default: torch's number of threads.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised
    return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def read_metadata(session: Any, where: str) -> OnnxMetadata:
    """Return what a file says of itself.

    Args:
        session: of onnxruntime.
        where: what errors begin with.

    Raises:
        InputError: an entry is missing or wrong, or is not that of the file's own input and output.
    """
    entries, known = session.get_modelmeta().custom_metadata_map, [field.name for field in fields(OnnxMetadata)]
    try:
        content = {name: json.loads(entries[name]) for name in known if name in entries}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} has metadata that is not JSON; {_REMEDY}") from error
    if not content:
        raise InputError(f"{where} says nothing of its preprocessing; {_REMEDY}")
    metadata = parse_record(OnnxMetadata, content, f"metadata of {where}")
    check_preprocessing(content, f"metadata of {where}")
    tensors = (*session.get_inputs(), *session.get_outputs())
    shapes = [list(tensor.shape) for tensor in tensors]
    if (
        len(session.get_inputs()) != 1
        or [tensor.type for tensor in tensors] != ["tensor(float)"] * 2
        or shapes[0][1:] != list(metadata.input_size)
        or len(shapes[1]) != 2
        or not isinstance(shapes[1][1], int)
        or any(isinstance(shape[0], int) for shape in shapes)
    ):
        raise InputError(
            f"{where} must take float32 images (batch, {', '.join(map(str, metadata.input_size))}) of any batch and "
            f"give logits (batch, classes), found inputs and outputs of shapes {shapes}; {_REMEDY}"
        )
    outputs, names = shapes[1][1], metadata.class_names
    if names is not None and len(set(names)) != outputs:
        raise InputError(f"{where} has {outputs} outputs and {len(set(names))} class names; {_REMEDY}")
    return metadata


_REMEDY = "export it again with: timm-igkd export"
