"""Models in and out: load a teacher or student strictly, save one that timm loads back, compare their classes.

Only safetensors and `weights_only` pickles are read; nothing of a model's repository is executed.
"""

import contextlib
import copy
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from timm.models import get_model_input_config, resolve_model_input_args, save_for_hf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_igkd.errors import InputError, InputTypeError, RunError, check_count, first_line, listed
from timm_igkd.eval_mode import bare_model, eval_mode, frozen
from timm_igkd.files import given_path
from timm_igkd.hub.weights import fetch_folder
from timm_igkd.models.arguments import NO_TEST_VIEW, built_size, check_model_arguments, check_of_timm
from timm_igkd.models.checkpoint import (
    check_spec,
    fetch_weights,
    flag_name,
    read_checkpoint,
    translated_errors,
)
from timm_igkd.models.folder_config import LARGEST_SIDE, check_preprocessing, is_statistic, read_folder_config
from timm_igkd.models.output_names import forget_names
from timm_igkd.records import folder_written_apart


def _cfg(model: nn.Module) -> dict[str, Any]:
    return cast(dict[str, Any], model.pretrained_cfg)


# ---- reading -------------------------------------------------------------------------------------------------------


def load_model(
    spec: str,
    *,
    model_args: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    use_ema: bool = False,
    num_classes: int | None = None,
    img_size: int | None = None,
    role: str = "model",
    pretrained: bool = True,
) -> nn.Module:
    """Load a model in eval mode.

    Args:
        spec: a timm name, `hf-hub:user/name` or `local-dir:folder`.
        model_args: arguments for the model, as timm's `create_model` takes them.
        checkpoint: .safetensors file, or a .pth or .pth.tar read with `weights_only`; must fit the model exactly.
        mean: normalisation that replaces the model's, three numbers.
        std: as `mean`, above 0.
        use_ema: take the EMA weights of `checkpoint`.
        num_classes: outputs; with pretrained weights another number than theirs gives a new head, as in timm.
        img_size: side of its input in pixels; timm resamples the positional embeddings of pretrained weights.
        role: "model", or whose flags an error names ("teacher": --teacher-checkpoint).
        pretrained: False for random weights.

    Raises:
        InputError: unknown model, bad arguments, no weights to load, weights that do not fit or cannot be read.
        MissingFileError: no such checkpoint or folder.
        RunError: the Hub cannot be reached or refuses.
    """
    given = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
    statistics = {name: _check_statistics(name, value, role) for name, value in given.items()}
    check_model_arguments(model_args or {}, args_flag := flag_name(role, "args"))
    arguments = dict(model_args or {})
    if checkpoint is not None:
        checkpoint = given_path("checkpoint", checkpoint)
    if use_ema and checkpoint is None:
        raise InputError(f"EMA weights were asked for without a checkpoint; give {flag_name(role, 'checkpoint')}")
    source, stored = find_model(spec, role, weights=pretrained and checkpoint is None)
    if num_classes is not None and arguments.setdefault("num_classes", num_classes) != num_classes:
        raise InputError(
            f"{args_flag} has num_classes={arguments['num_classes']}, but the data set decides, "
            f"which has {num_classes}; leave it out"
        )
    with translated_errors(spec, role, weights=None if checkpoint is None else str(checkpoint)):
        if img_size is not None:
            check_count("img_size", img_size, most=LARGEST_SIDE)
            wanted = resolve_model_input_args(source, {"img_size": img_size}, **arguments)
            arguments |= {"img_size": wanted["img_size"]} if "img_size" in wanted else {}
        if checkpoint is not None:
            model = _create_with(read_checkpoint(Path(checkpoint), use_ema, role), source, arguments, exact=True)
        elif stored is not None:
            model = _create_with(read_checkpoint(stored, False, role), source, arguments, exact=False)
        else:
            model = timm.create_model(source, pretrained=pretrained, **arguments)
    own = _cfg(model).get("num_classes") if checkpoint is None else len(_cfg(model).get("label_names") or ())
    if arguments.get("num_classes") not in (None, own):
        forget_names(model)  # of the folder's own head, whose number of outputs a checkpoint's took the place of
    _cfg(model).update(statistics)
    channels = arguments.get("in_chans", get_model_input_config(model)["input_size"][0])
    check_preprocessing(_cfg(model), f"pretrained_cfg of {spec!r}", channels=channels)
    _cfg(model).update(resized := built_size(model))
    if img_size is not None:
        _cfg(model).update(input_size=(channels, img_size, img_size), **NO_TEST_VIEW)
    if img_size is not None or resized or model_args or ":" in source:
        correct = f"correct {args_flag}{' or its config.json' * (':' in source)}"
        other = "--img-size" if img_size is not None else f"img_size in {args_flag}" if resized and model_args else ""
        also = f", or {correct}" if model_args and img_size is not None else ""
        remedy = f"choose another {other}{also}" if other else correct
        _check_reads(model.eval(), spec, (channels, *_cfg(model).get("input_size", (224, 224))[-2:]), remedy)
    return model.eval()


def find_model(spec: str, role: str = "model", *, weights: bool = True) -> tuple[str, Path | None]:
    """Find a model, and its weights if asked for, on this machine or on the Hub, from where they are downloaded.

    Returns:
        The name under which timm builds it, and the file of a timm name's weights; None where the name leads to them.

    Raises:
        as `load_model` does; without a network within seconds.
    """
    spec = check_spec(spec, role, weights)
    source, _, rest = spec.partition(":")
    with translated_errors(spec, role):
        if source == "hf-hub":
            repo_id, _, revision = rest.partition("@")
            folder = fetch_folder(repo_id, revision or None, weights=weights)
            read_folder_config(folder)
            return f"local-dir:{folder}", None
        return spec, None if rest or not weights else fetch_weights(spec)


def _check_statistics(name: str, values: Sequence[float], role: str) -> tuple[float, ...]:
    numbers: tuple[float, ...] = ()
    with contextlib.suppress(TypeError, ValueError, OverflowError):  # no numbers
        numbers = tuple(float(value) for value in values)
    if len(numbers) != 3 or not is_statistic(name, numbers):
        above = " above 0" if name == "std" else ""
        raise InputError(
            f"{flag_name(role, name)} must be three numbers{above} (R G B, for pixels in [0, 1]), got {values}"
        )
    return numbers


def _create_with(weights: dict[str, Tensor], source: str, arguments: dict[str, Any], *, exact: bool) -> nn.Module:
    """Build the model with these weights, by timm's own path so that the model's checkpoint filter applies.

    Args:
        weights: of the model.
        source: under which timm builds it.
        arguments: of its architecture.
        exact: they must have the model's own head; else another number of classes gives a new one.
    """
    overlay: dict[str, Any] = {"state_dict": weights, "source": "", "custom_load": False}
    if exact:
        overlay["label_offset"] = None
        if arguments.get("num_classes") is not None:
            overlay["num_classes"] = arguments["num_classes"]
    model = timm.create_model(source, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    _cfg(model).pop("state_dict", None)
    return model


def _check_reads(model: nn.Module, spec: str, shape: tuple[int, ...], remedy: str) -> None:
    """See that a model can read images of the size that it was built for."""
    try:
        with torch.no_grad():
            own = next(model.parameters())
            model(torch.zeros(1, *shape, device=own.device, dtype=own.dtype))
    except MemoryError:
        raise
    except Exception as error:  # each architecture says it with an exception of its own
        raise InputError(
            f"model {spec!r} cannot read images of {shape[1]} x {shape[2]} pixels ({first_line(error)}); {remedy}"
        ) from error


def use_image_size(model: nn.Module, height: int, width: int) -> None:
    """Let a model of random weights read images at their own size, where they are smaller than its input size.

    Models of a fixed input size keep theirs.
    """
    config = _cfg(model)
    if not config.get("fixed_input_size") and max(width, height) < config["input_size"][1]:
        remedy = "choose another --img-size than that of these images"
        _check_reads(model, config["architecture"], (3, height, width), remedy)
        config.update(input_size=(3, height, width), crop_pct=1.0, **NO_TEST_VIEW)


def use_whole_images(model: nn.Module) -> None:
    """Let a model be evaluated as it is trained on images that are not cut: whole, scaled to its input size."""
    _cfg(model).update(crop_pct=1.0, crop_mode="squash", **NO_TEST_VIEW)


# ---- writing -------------------------------------------------------------------------------------------------------


def needs_plugin(model: nn.Module) -> bool:
    """Return whether timm must `import timm_igkd` before it can build the model's architecture."""
    architecture = _cfg(model)["architecture"]
    return timm.model_entrypoint(architecture).__module__.split(".")[0] == __name__.split(".")[0]


def save_model(model: nn.Module, folder: str | Path, label_names: Sequence[str] | None = None) -> None:
    """Save a timm folder (config.json, model.safetensors) that `timm.create_model("local-dir:…")` loads.

    Written beside `folder` and moved there; config.json comes last, so a folder that has one is complete. Other files
    of an existing folder stay.

    Args:
        model: a model from `timm.create_model`, which may be wrapped (see `bare_model`).
        folder: where to save.
        label_names: names of the outputs, in order.

    Raises:
        InputTypeError: an argument of another kind, such as one text for `label_names`.
        InputError: `label_names` of another number than the outputs, or a model timm could not build again.
        RunError: the folder cannot be written.
    """
    model = bare_model(model)
    check_of_timm(model, "save_model")
    folder = given_path("folder", folder)
    if label_names is not None:
        label_names = listed("label_names", label_names, "texts")
        if not all(isinstance(name, str) for name in label_names):
            raise InputTypeError(f"label_names must be texts, got {label_names}; write them as texts")
        if len(set(label_names)) != len(label_names) or len(label_names) != model.num_classes:
            raise InputError(f"expected {model.num_classes} different label names, one per output, got {label_names}")
    described: Any = copy.copy(model)
    described.pretrained_cfg = _cfg(model) | built_size(model)
    model_config: dict[str, Any] = {}
    if label_names is not None:
        model_config["label_names"] = list(label_names)
        described.pretrained_cfg = {k: v for k, v in described.pretrained_cfg.items() if not k.startswith("label_")}
    hook = described.register_state_dict_post_hook(_separate_tensors)
    try:
        with folder_written_apart(folder, "config.json") as written:
            save_for_hf(described, str(written), model_config=model_config, safe_serialization=True)
            shutil.copymode(written / "config.json", written / "model.safetensors")  # safetensors keeps others out
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"cannot save the model to {str(folder)!r} ({first_line(error)}); free space or permit it"
        ) from error
    except (ValueError, TypeError) as error:
        raise InputError(f"model cannot be saved so that timm builds it again: {first_line(error)}") from error
    finally:
        hook.remove()


def _separate_tensors(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Make every tensor contiguous, on the CPU and on its own, as safetensors wants them."""
    for name, tensor in state_dict.items():
        state_dict[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


# ---- describing ----------------------------------------------------------------------------------------------------


def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of all tensors of a model, wrapped or not: sorted names, dtypes, shapes, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(bare_model(model).state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module) -> int:
    """Return the multiply-accumulates of one image at the model's input size, in eval mode."""
    model = bare_model(model)
    parameter = next(model.parameters())
    image = torch.zeros(1, *get_model_input_config(model)["input_size"], device=parameter.device, dtype=parameter.dtype)
    counter = FlopCounterMode(display=False)
    plain_attention = sdpa_kernel(SDPBackend.MATH)  # the one that is counted
    with eval_mode(model), frozen(model), torch.no_grad(), plain_attention, counter:
        model(image)
    return counter.get_total_flops() // 2
