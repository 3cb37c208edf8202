"""Warm, repeated latency of a model, and the hardware it was measured on."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from timm_igkd.environment import environment

LEAST_REPEATS = 5
MOST_REPEATS = 1000


@torch.inference_mode()
def time_model(
    model: nn.Module,
    input_size: Sequence[int],
    device: torch.device,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    seconds: float = 1.0,
) -> dict[str, dict[str, float]]:
    """Time forward passes in milliseconds per batch, after warm-up passes that are not counted.

    Args:
        model: in eval mode, on `device`.
        input_size: (channels, height, width).
        device: where the inputs are made; on CUDA every pass is waited for.
        batch_sizes: each gives an entry `batch_<size>` with `median`, `p90` and the number of passes `n`.
        seconds: time spent on each batch size; slow models take longer, for at least five passes.
    """
    floats = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    results: dict[str, dict[str, float]] = {}
    for batch_size in batch_sizes:
        noise = torch.randn((batch_size, *input_size), generator=torch.Generator().manual_seed(0))
        inputs = noise.to(device, floats.dtype)
        for _ in range(2):
            _time_once(model, inputs)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < LEAST_REPEATS or (time.perf_counter() < end and len(times) < MOST_REPEATS):
            times.append(1000 * _time_once(model, inputs))
        p90 = statistics.quantiles(times, n=10, method="inclusive")[-1]
        results[f"batch_{batch_size}"] = {"median": statistics.median(times), "p90": p90, "n": len(times)}
    return results


def _time_once(model: nn.Module, inputs: torch.Tensor) -> float:
    wait = inputs.device.type == "cuda"
    if wait:
        torch.cuda.synchronize(inputs.device)
    begin = time.perf_counter()
    model(inputs)
    if wait:
        torch.cuda.synchronize(inputs.device)
    return time.perf_counter() - begin


def describe_hardware(device: str | torch.device = "cpu") -> str:
    """Return the name of the processor or accelerator behind `device`."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(environment()["cpu"])
