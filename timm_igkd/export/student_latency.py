"""What a student's files would take, before it is trained: size and latency with random weights, kept in a cache."""

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import constants
from timm.models import get_model_input_config
from torch import nn

from timm_igkd.environment import environment
from timm_igkd.errors import RunError, UserError, first_line
from timm_igkd.evaluation.onnx_file import OPSET, quiet_libraries, write_onnx
from timm_igkd.evaluation.onnx_latency import time_files
from timm_igkd.export.int8 import quantise
from timm_igkd.export.record import FILES, Format, Timing
from timm_igkd.files import json_bytes, read_mapping
from timm_igkd.records import parse_record, write_record

TIMING_S = 2.0
THREADS = 1  # as an export's files are timed
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudentFile:
    """A file of a student: its format, 10^6 bytes, and milliseconds of one image."""

    format: Format
    size_mb: float
    latency_ms: Timing


@dataclass(frozen=True)
class CachedFiles:
    """An entry of the cache: what was measured, and where."""

    key: Mapping[str, str | int]
    files: tuple[StudentFile, ...]


def cache_folder() -> Path:
    """Return where measured latencies are kept, in Hugging Face's home."""
    return Path(constants.HF_HOME) / "timm_igkd" / "latency"


def measure_files(model: nn.Module, *, int8: bool, use_cache: bool = True) -> tuple[tuple[StudentFile, ...], bool]:
    """Return the size and latency of a model's float and int8 files, timed in turn, and whether the cache knew them.

    Random weights take as long as learnt ones. int8 ranges come from noise: such a file is for timing alone.

    Args:
        model: in eval mode on the CPU.
        int8: measure an int8 file too.
        use_cache: take what was measured of the same network with the same packages on the same kind of processor.

    Raises:
        RunError: it cannot be exported, quantised or run.
    """
    formats: tuple[Format, ...] = ("onnx", "onnx-int8") if int8 else ("onnx",)
    key = _key(model, formats)
    path = cache_folder() / f"{hashlib.sha256(json_bytes(key)).hexdigest()[:32]}.json"
    if use_cache:
        with contextlib.suppress(UserError):  # none there, or a damaged one: measured again
            return parse_record(CachedFiles, read_mapping(path), repr(str(path))).files, True
    files = _measure(model, formats)
    try:
        write_record(path, CachedFiles(key, files))
    except (OSError, UserError) as error:
        _logger.warning("measured latencies are not kept: %s", first_line(error))
    return files, False


def _key(model: nn.Module, formats: tuple[Format, ...]) -> dict[str, str | int]:
    return {
        "network": hashlib.sha256(repr(model).encode()).hexdigest(),
        "input_size": "x".join(map(str, get_model_input_config(model)["input_size"])),
        "formats": " ".join(formats),
        "threads": THREADS,
        "cpu": str(environment()["cpu"]),
        **{name: metadata.version(name) for name in ("onnxruntime", "torch", "timm")},
    }


def _measure(model: nn.Module, formats: tuple[Format, ...]) -> tuple[StudentFile, ...]:
    image = torch.rand(1, *get_model_input_config(model)["input_size"], generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / FILES[format] for format in formats]
        _write_quickly(model, image, paths[0])
        if "onnx-int8" in formats:
            quantise(paths[0], paths[1], [image])
        try:
            timings = time_files(paths, seconds=TIMING_S, threads=THREADS)
        except Exception as error:  # onnxruntime has one of its own for each thing that can be wrong
            raise RunError(f"onnxruntime cannot run it: {first_line(error)}") from error
        return tuple(
            StudentFile(format, path.stat().st_size / 1e6, Timing(timing["median"], timing["p90"], int(timing["n"])))
            for format, path, timing in zip(formats, paths, timings, strict=True)
        )


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
