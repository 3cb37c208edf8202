"""What a student's files would take, before it is trained: size and latency with random weights, kept in a cache."""

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import constants
from timm.models import get_model_input_config
from torch import nn

from timm_igkd.environment import environment, processor
from timm_igkd.errors import RunError, UserError, first_line
from timm_igkd.evaluation.latency import Timing
from timm_igkd.evaluation.onnx_file import OPSET, onnx_versions, quiet_libraries, write_onnx
from timm_igkd.evaluation.onnx_latency import time_files
from timm_igkd.export.int8 import quantise
from timm_igkd.export.record import FILES, Format
from timm_igkd.files import json_bytes
from timm_igkd.intervals import three_digits
from timm_igkd.random_streams import fixed_noise
from timm_igkd.records import read_record, write_record

TIMING_S = 2.0
AGAIN_S = 1.0
THREADS = 1  # as an export's files are timed
_RECORD = "latency.json"
_WRITER = 2  # of the files; one more wherever they become others
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudentFile:
    """A file of a student: its format, 10^6 bytes, and milliseconds of one image."""

    format: Format
    size_mb: float
    latency_ms: Timing

    def cost(self) -> str:
        """Return its latency and size in words."""
        return f"{three_digits(self.latency_ms.median)} ms in {three_digits(self.size_mb)} MB"


@dataclass(frozen=True)
class CachedFiles:
    """An entry of the cache: what was measured, and where."""

    key: Mapping[str, str | int]
    files: tuple[StudentFile, ...]


def cache_folder() -> Path:
    """Return where measured latencies are kept, in Hugging Face's home."""
    return Path(constants.HF_HOME) / "timm_igkd" / "latency"


def measure_files(
    model: nn.Module, *, int8: bool, use_cache: bool = True, folder: Path | None = None
) -> tuple[tuple[StudentFile, ...], bool]:
    """Return the size and latency of a model's float and int8 files, timed in turn, and whether the cache knew them.

    Random weights take as long as learnt ones. int8 ranges come from noise: such a file is for timing alone.

    Args:
        model: in eval mode on the CPU.
        int8: measure an int8 file too.
        use_cache: take what was measured of the same network with the same packages on the same kind of processor.
        folder: an empty one that keeps what is measured, for `time_again`; default: nothing is kept.

    Raises:
        RunError: it cannot be exported, quantised or run.
    """
    formats: tuple[Format, ...] = ("onnx", "onnx-int8") if int8 else ("onnx",)
    key = _key(model, formats)
    path = _cache_path(key)
    if use_cache:
        with contextlib.suppress(UserError):  # none there, or a damaged one: measured again
            return read_record(CachedFiles, path).files, True
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        found = CachedFiles(key, _measure(model, formats, place))
        write_record(place / _RECORD, found)
    _keep(found)
    return found.files, False


def time_again(folder: Path) -> tuple[StudentFile, ...]:
    """Time the files that `measure_files` kept once more; of each the lower median stands, here and in the cache.

    What else a machine does makes a file slower for some seconds, never faster.
    """
    found = read_record(CachedFiles, folder / _RECORD)
    timings = _timings([folder / FILES[file.format] for file in found.files], AGAIN_S)
    lower = [
        min(file.latency_ms, timing, key=lambda t: t.median) for file, timing in zip(found.files, timings, strict=True)
    ]
    files = tuple(replace(file, latency_ms=timing) for file, timing in zip(found.files, lower, strict=True))
    write_record(folder / _RECORD, found := replace(found, files=files))
    _keep(found)
    return files


def _cache_path(key: Mapping[str, str | int]) -> Path:
    return cache_folder() / f"{hashlib.sha256(json_bytes(dict(key))).hexdigest()[:32]}.json"


def _keep(found: CachedFiles) -> None:
    try:
        write_record(_cache_path(found.key), found)
    except (OSError, UserError) as error:
        _logger.warning("measured latencies are not kept: %s", first_line(error))


def _key(model: nn.Module, formats: tuple[Format, ...]) -> dict[str, str | int]:
    here = environment()
    return {
        "network": _network(model),
        "input_size": "x".join(map(str, get_model_input_config(model)["input_size"])),
        "formats": " ".join(formats),
        "threads": THREADS,
        "writer": _WRITER,
        "cpu": f"{here['cpu']}, {processor()}",
        **{name: str(here[name]) for name in ("timm_igkd", "timm", "torch")},
        **onnx_versions(),
    }


def _network(model: nn.Module) -> str:
    """Return a hash of what a network computes: its layers alone do not tell, say, the window of a SwinV2."""
    tensors = [*model.named_parameters(), *model.named_buffers()]  # also those that no checkpoint holds
    shapes = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors]
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    return hashlib.sha256("\n".join([repr(model), str(architecture), *shapes]).encode()).hexdigest()


def _measure(model: nn.Module, formats: tuple[Format, ...], folder: Path) -> tuple[StudentFile, ...]:
    image = fixed_noise(1, *get_model_input_config(model)["input_size"])
    paths = [folder / FILES[format] for format in formats]
    _write_quickly(model, image, paths[0])
    if "onnx-int8" in formats:
        quantise(paths[0], paths[1], [image])
    timings = _timings(paths, TIMING_S)
    return tuple(
        StudentFile(format, path.stat().st_size / 1e6, timing)
        for format, path, timing in zip(formats, paths, timings, strict=True)
    )


def _timings(paths: Sequence[Path], seconds: float) -> list[Timing]:
    try:
        return time_files(paths, seconds=seconds, threads=THREADS)
    except Exception as error:  # onnxruntime has one of its own for each thing that can be wrong
        raise RunError(f"onnxruntime cannot run it: {first_line(error)}") from error


def _write_quickly(model: nn.Module, image: torch.Tensor, path: Path) -> None:
    """Write an ONNX file by torch's older exporter, the quicker one; docs/edge.md says what its files take.

    onnxscript's optimiser then folds its constants, as the newer exporter has it do; without that int8 takes several
    times as long. Where the older one fails, or is gone from torch, an export's own way is taken.
    """
    import onnx
    from onnxscript import optimizer

    with quiet_libraries(), torch.no_grad():
        try:
            torch.onnx.export(
                model,
                (image,),
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["logits"],
            )
            onnx.save(optimizer.optimize(onnx.load(path)), path)
            return
        except Exception as error:  # each unsupported layer has an exception of its own
            _logger.debug("exported anew: %s", first_line(error))
    write_onnx(model, path)
