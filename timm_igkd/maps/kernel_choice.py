"""The fastest way to compute gradients on the CUDA device at hand whose maps stay within tolerance, by measurement.

A CPU has no choice to make: float32, convolutions frozen (frozen_conv.py), chunks by the size of the activations, so
that two builds give the same bytes.
"""

import copy
import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from timm_igkd.attribution.chunk_gradient import Kernel
from timm_igkd.attribution.chunk_size import activation_chunk, images_per_batch
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.options import IGOptions, TeacherView, reduce_channels
from timm_igkd.data.items import read_item

PROBE_IMAGES = 8
SMALLEST_CHUNK = 32
PROBE_STEPS = 16
ENOUGH = 0.97  # of the best rate: a smaller chunk that reaches it is taken
COMPILING_PAYS_S = 300.0  # of estimated work; compiling three chunk sizes takes minutes
ERROR_BUDGET = 0.1  # share of the tolerance that rounding may use
FLOAT32_ERROR = 1e-3  # relative, for kernels that only change float32's rounding; the bound between the engines


@dataclass(frozen=True)
class Probe:
    """Some images of the dataset as the teacher sees them: inputs and baselines [B, 3, H, W], targets [B]."""

    inputs: Tensor
    baselines: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Choice:
    """A kernel, its chunk size, and what was measured of every candidate: rate in pairs/s, error, or why it failed."""

    kernel: Kernel
    chunk_size: int
    measured: list[dict[str, Any]]


def computation(
    teacher: nn.Module, dataset: Any, manifest: dict[str, Any], device: torch.device, chunk_size: int | None
) -> dict[str, Any]:
    """Return how a new store's maps are computed, for its manifest: chunk and batch size, dtype, compiled or not.

    Args:
        teacher: in eval mode.
        dataset: its first images are measured with, on a CUDA device.
        manifest: what is known of the store already: options, engine, n.
        device: where to compute.
        chunk_size: as the user asks, or None.
    """
    view, options = TeacherView(teacher), IGOptions(**manifest["options"])
    shape = (3, *view.size)
    chunk = chunk_size or activation_chunk(teacher, shape, device)
    plan = {"chunk_size": chunk, "batch_images": images_per_batch(shape, device), "dtype": "float32"}
    if device.type != "cuda" or manifest["engine"] != "fast" or chunk_size is not None:
        return plan
    images = [read_item(dataset, index)[0] for index in range(min(PROBE_IMAGES, manifest["n"]))]
    inputs = torch.stack([view(image) for image in images]).to(device)
    with torch.no_grad():
        targets = copy.deepcopy(teacher).to(device)(inputs).argmax(1)
    probe = Probe(inputs, view.baseline(inputs, options.baseline, list(range(len(images)))), targets)

    def create(kernel: Kernel, chunk: int) -> FastEngine:
        return FastEngine(teacher, options, chunk, shape, device, kernel=kernel)

    choice = choose_kernel(create, probe, options, chunk, manifest["n"])
    found = {"chunk_size": choice.chunk_size, "dtype": choice.kernel.dtype, "compiled": choice.kernel.compiled}
    return plan | found | {"kernels": choice.measured}


def choose_kernel(
    create: Callable[[Kernel, int], FastEngine], probe: Probe, options: IGOptions, largest_chunk: int, num_images: int
) -> Choice:
    """Return the fastest kernel and chunk size whose maps of the probe images stay within tolerance.

    bfloat16 is tried for `n_steps="auto"` alone, whose tolerance says what error is allowed: the least correlation of
    a probe map with that of eager float32 at the same nodes must be 1 - 0.1 * (1 - tolerance) or more. A compiled
    kernel is tried where the work would take eager float32 more than 5 minutes.

    Args:
        create: makes an engine of a kernel and chunk size.
        probe: images to measure with.
        options: of the maps.
        largest_chunk: that the device's memory allows.
        num_images: to be attributed, for the estimate of the work.
    """
    base, chunk, rate = None, largest_chunk, 0.0
    measured: list[dict[str, Any]] = []
    for size in _sizes(largest_chunk):
        engine = create(Kernel(), size)
        try:
            found = _rate(engine, probe)
        except torch.cuda.OutOfMemoryError:
            break
        measured.append(asdict(engine.kernel) | {"chunk_size": size, "pairs_per_s": found})
        if found * ENOUGH > rate:
            base, chunk, rate = engine, size, found
    if base is None:  # not even the smallest chunk fits beside other work: building halves it further
        return Choice(Kernel(), SMALLEST_CHUNK, measured)
    best, reference = Kernel(), _maps(base, probe, options)
    steps = options.max_steps / 2 if options.n_steps == "auto" else options.n_steps
    for kernel in _candidates(options, num_images * steps / rate):
        tried = asdict(kernel) | {"chunk_size": chunk}
        try:
            error, found = _try(create(kernel, chunk), probe, options, reference)
        except Exception as failure:  # a compiler has many; the maps are then built without it
            reason = (str(failure).strip() or type(failure).__name__).splitlines()[0][:200]
            measured.append(tried | {"failed": reason})
            continue
        finally:
            give_back(kernel)
        if not math.isfinite(error):  # JSON has no infinity
            measured.append(tried | {"failed": "maps that are not finite"})
            continue
        allowed = FLOAT32_ERROR if kernel.dtype == "float32" else ERROR_BUDGET * (1 - options.tolerance)
        measured.append(tried | {"pairs_per_s": found, "error": error})
        if error <= allowed and found > rate:
            best, rate = kernel, found
    return Choice(best, chunk, measured)


def _try(engine: FastEngine, probe: Probe, options: IGOptions, reference: Tensor) -> tuple[float, float]:
    """Return the error and the rate of an engine, which is gone afterwards."""
    return _error(_maps(engine, probe, options), reference, engine.kernel), _rate(engine, probe)


def give_back(kernel: Kernel) -> None:
    """Free what torch keeps of a kernel's last runs: compiled code, its CUDA graphs and cached memory."""
    if kernel.compiled:
        torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def _sizes(largest: int) -> list[int]:
    sizes = [largest]
    while sizes[-1] > SMALLEST_CHUNK:
        sizes.append(sizes[-1] // 2)
    return sizes[::-1]


def _candidates(options: IGOptions, seconds: float) -> list[Kernel]:
    kernels = [Kernel("bfloat16")] if options.n_steps == "auto" else []
    if seconds > COMPILING_PAYS_S:
        kernels += [Kernel("float32", compiled=True)]
        kernels += [Kernel("bfloat16", compiled=True)] if options.n_steps == "auto" else []
    return kernels


def _rate(engine: FastEngine, probe: Probe, repeats: int = 3) -> float:
    """Return (image, step) pairs per second over full chunks, the best of some."""
    pairs, device = engine.chunk_size, probe.inputs.device
    images = torch.arange(pairs, device=device) % len(probe.inputs)
    nodes, best = torch.linspace(0, 1, pairs, device=device), 0.0
    for number in range(repeats + 1):
        _synchronize(device)
        started = time.perf_counter()
        for _ in engine.gradients(probe.inputs, probe.baselines, probe.targets, images, nodes):
            pass
        _synchronize(device)
        if number:  # the first warms up
            best = max(best, pairs / (time.perf_counter() - started))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _maps(engine: FastEngine, probe: Probe, options: IGOptions) -> Tensor:
    """Return the probe's maps, [B, H * W] float64, at the same nodes whatever the kernel."""
    engine.options = replace(options, n_steps=PROBE_STEPS)
    try:
        logits = engine.forward(probe.inputs)
        values = engine.attribute(probe.inputs, probe.baselines, probe.targets, logits).values
    finally:
        engine.options = options
    return reduce_channels(values, options.reduction).flatten(1).double()


def _error(maps: Tensor, reference: Tensor, kernel: Kernel) -> float:
    """Return the worst image's error: relative for float32, 1 - correlation for another dtype; NaN maps: infinite."""
    if not torch.isfinite(maps).all():
        return float("inf")
    if kernel.dtype == "float32":
        return float(((maps - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-30)).max())
    centred, wanted = maps - maps.mean(1, keepdim=True), reference - reference.mean(1, keepdim=True)
    norms = (centred.norm(dim=1) * wanted.norm(dim=1)).clamp_min(1e-30)
    return float((1 - (centred * wanted).sum(1) / norms).max())
