"""A student's warm latency in onnxruntime, where its packages are installed (extra `onnx`)."""

import contextlib
import importlib.util
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import nn

from timm_igkd.errors import InputError, RunError
from timm_igkd.eval_mode import eval_mode
from timm_igkd.evaluation.latency import LEAST_REPEATS, MOST_REPEATS

_logger = logging.getLogger(__name__)

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def missing_onnx_packages() -> list[str]:
    """Return the packages of the extra `onnx` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def onnx_latency(model: nn.Module, *, seconds: float = 1.0, threads: int | None = None) -> dict[str, dict[str, float]]:
    """Time single images in onnxruntime on the CPU, after warm-up passes that are not counted.

    Args:
        model: a timm model; its mode and device are the same afterwards.
        seconds: time spent; a slow model takes longer, for at least five passes.
        threads: of onnxruntime; default: torch's number of threads.

    Returns:
        {"batch_1": {"median", "p90", "n"}} in milliseconds, as `latency.time_model`; metrics call it `onnx_latency_ms`.

    Raises:
        InputError: a package of the extra `onnx` is missing. RunError: the model cannot be exported, or its ONNX output
        is not PyTorch's to 1e-4.
    """
    missing = missing_onnx_packages()
    if missing:
        raise InputError(
            f"ONNX latency needs {', '.join(missing)}; install with: pip install 'timm-igkd[onnx]', or leave it out"
        )
    import onnxruntime

    image = torch.rand(1, *get_model_input_config(model)["input_size"], generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, eval_mode(model, device="cpu"):
        path = os.path.join(folder, "model.onnx")
        _export(model, image, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: image.numpy()}
        _check_output(torch.from_numpy(session.run(None, feed)[0]), model, image)
        return {"batch_1": _time(session, feed, seconds)}


def onnx_metrics(model: nn.Module) -> dict[str, Any]:
    """Return {"onnx_latency_ms": …} for metrics.json, or {} where packages are missing or the export fails (logged)."""
    if missing_onnx_packages():
        return {}
    try:
        return {"onnx_latency_ms": onnx_latency(model)}
    except RunError as error:
        _logger.warning("%s", error)
        return {}


def _export(model: nn.Module, image: torch.Tensor, path: str) -> None:
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "torch.export"):
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(model, (image,), path, dynamo=True, external_data=False, verbose=False)
        except Exception as error:  # each unsupported layer has an exception of its own
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(f"the model cannot be exported to ONNX: {text[0]}; leave its ONNX latency out") from error


@torch.inference_mode()
def _check_output(found: torch.Tensor, model: nn.Module, image: torch.Tensor) -> None:
    expected = model(image)
    difference = (found - expected).abs().max().item()
    if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
        raise RunError(f"the ONNX output differs from PyTorch's by {difference:.2g}, expected at most 1e-4 of its size")


def _time(session: Any, feed: dict[str, Any], seconds: float) -> dict[str, float]:
    for _ in range(2):
        session.run(None, feed)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST_REPEATS or (time.perf_counter() < end and len(times) < MOST_REPEATS):
        begin = time.perf_counter()
        session.run(None, feed)
        times.append(1000 * (time.perf_counter() - begin))
    p90 = statistics.quantiles(times, n=10, method="inclusive")[-1]
    return {"median": statistics.median(times), "p90": p90, "n": len(times)}


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
