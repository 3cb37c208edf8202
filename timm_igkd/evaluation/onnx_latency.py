"""A model's warm latency in onnxruntime, where its packages are installed (extra `onnx`)."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from timm_igkd.errors import RunError
from timm_igkd.evaluation.latency import Timing, time_in_turn
from timm_igkd.evaluation.onnx_file import missing_onnx_packages, open_session, write_onnx
from timm_igkd.random_streams import fixed_noise

_logger = logging.getLogger(__name__)


def time_files(paths: Sequence[Path], *, seconds: float = 1.0, threads: int | None = None) -> list[Timing]:
    """Time single images in ONNX files of one input in turn, see `latency.time_in_turn`.

    Args:
        paths: of the files.
        seconds: time spent on all.
        threads: of onnxruntime; default: torch's number of threads.
    """
    sessions = [open_session(path, threads) for path in paths]
    (entry,) = sessions[0].get_inputs()
    image = fixed_noise(1, *entry.shape[1:])
    feed = {entry.name: image.numpy()}
    return time_in_turn([partial(session.run, None, feed) for session in sessions], seconds)


def onnx_latency(model: nn.Module, *, seconds: float = 1.0) -> dict[str, dict[str, float]]:
    """Time single images in onnxruntime on the CPU, after warm-up passes that are not counted.

    Args:
        model: a timm model; its mode and device are the same afterwards.
        seconds: time spent; a slow model takes longer, for at least five passes.

    Returns:
        {"batch_1": {"median", "p90", "n"}} in milliseconds, as `latency.time_model`; metrics call it `onnx_latency_ms`.

    Raises:
        InputError, RunError: as `write_onnx`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model, path)
        return {"batch_1": asdict(time_files([path], seconds=seconds)[0])}


def onnx_metrics(model: nn.Module) -> dict[str, Any]:
    """Return {"onnx_latency_ms": …} for metrics.json, or {} where packages are missing or the export fails (logged)."""
    if missing_onnx_packages():
        return {}
    try:
        return {"onnx_latency_ms": onnx_latency(model)}
    except RunError as error:
        _logger.warning("%s", error)
        return {}
