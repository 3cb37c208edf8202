"""Warm, repeated latency of a model, and the hardware it was measured on."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from timm_igkd.environment import environment
from timm_igkd.random_streams import fixed_noise

BATCH_SIZES = (1, 64)
LEAST_REPEATS = 5
MOST_REPEATS = 1000


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call, over `n` rounds in turn with others."""

    median: float
    p90: float
    n: int


def time_model(
    model: nn.Module, input_size: Sequence[int], device: torch.device, *, seconds: float = 1.0
) -> dict[str, dict[str, float]]:
    """Time one model, see `time_models`."""
    return time_models([model], [input_size], device, seconds=seconds)[0]


@torch.inference_mode()
def time_models(
    models: Sequence[nn.Module],
    input_sizes: Sequence[Sequence[int]],
    device: torch.device,
    *,
    seconds: float = 1.0,
) -> list[dict[str, dict[str, float]]]:
    """Time forward passes in milliseconds per batch, after warm-up passes that are not counted.

    The models take turns, pass by pass, so that other load on the machine slows all of them alike.

    Args:
        models: in eval mode, on `device`.
        input_sizes: (channels, height, width) of each.
        device: where the inputs are made; on CUDA every pass is waited for.
        seconds: time spent on each model and batch size; slow models take longer, for at least five passes.

    Returns:
        For each model, an entry `batch_<size>` of each size with `median`, `p90` and the number of passes `n`.
    """
    results: list[dict[str, dict[str, float]]] = [{} for _ in models]
    for batch_size in BATCH_SIZES:
        passes = [_forward(model, (batch_size, *size), device) for model, size in zip(models, input_sizes, strict=True)]
        for result, timing in zip(results, time_in_turn(passes, seconds * len(models)), strict=True):
            result[f"batch_{batch_size}"] = asdict(timing)
    return results


def _forward(model: nn.Module, shape: tuple[int, ...], device: torch.device) -> Callable[[], None]:
    floats = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    inputs = fixed_noise(*shape, draw=torch.randn).to(device, floats.dtype)

    def forward() -> None:
        model(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return forward


def time_in_turn(calls: Sequence[Callable[[], object]], seconds: float) -> list[Timing]:
    """Time calls in milliseconds, round by round one after the other, so that what slows the machine slows all of them.

    Args:
        calls: each returns when its work is done; two rounds to warm up are not counted.
        seconds: time spent on all; slow calls take longer, for at least five rounds.
    """
    for call in (*calls, *calls):
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(times[0]) < LEAST_REPEATS or (time.perf_counter() < end and len(times[0]) < MOST_REPEATS):
        for call, found in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            found.append(1000 * (time.perf_counter() - begin))
    return [Timing(statistics.median(t), statistics.quantiles(t, n=10, method="inclusive")[-1], len(t)) for t in times]


def describe_hardware(device: str | torch.device) -> str:
    """Return the name of the processor or accelerator behind `device`."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(environment()["cpu"])
