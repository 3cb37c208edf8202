"""Where the fast engine's time goes on a CPU: ways of computing compared, time by kind of operation, the first layer.

    python benchmarks/attribution_profile.py --teacher mobilenetv2 --shared ../shared

Prints plain text. Part 1 times (image, step) pairs per second in alternating rounds: chunks side by side with one
thread each or threads within a layer, several chunk sizes; ratios are medians within rounds, page faults and CPU time
are per pair. Part 2 is torch's profiler on one thread. Part 3 is what "linear first layer once per image" could save at
most.
"""

import argparse
import os
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attribution_variants import Work
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from timm_igkd.attribution.chunk_pool import ChunkPool, one_thread
from timm_igkd.environment import environment

KINDS = {
    "convolution": ("convolution", "conv2d", "addmm", "bmm", "::mm", "attention"),
    "activation": ("hardtanh", "threshold", "clamp", "relu", "gelu", "silu"),
    "copy, pad, fill": ("copy_", "fill_", "pad", "::cat"),
    "add": ("::add",),
    "normalisation": ("norm",),
}


def make_engine(work: Work, side_by_side: bool, chunk: int) -> Any:
    """Return an engine that computes its chunks side by side or one after the other."""
    engine = work.engine(50)
    engine.chunk_size, engine._pool = chunk, ChunkPool(torch.get_num_threads()) if side_by_side else None
    return engine


def gradients_of(engine: Any, work: Work, pairs: int) -> Callable[[], None]:
    images = torch.arange(pairs) % len(work.inputs)
    nodes = torch.linspace(0, 1, pairs, dtype=torch.float64)

    def compute() -> None:
        for _ in engine.gradients(work.inputs, work.baselines, work.targets, images, nodes):
            pass

    return compute


def compare(ways: dict[str, Callable[[], None]], pairs: int, rounds: int) -> None:
    """Print pairs per second of each way, alternating."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    used: dict[str, list[float]] = {name: [0.0, 0.0] for name in ways}
    for number in range(rounds + 1):  # the first is a warm-up
        for name, compute in ways.items():
            before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            compute()
            seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
            if number:
                rates[name].append(pairs / seconds)
                used[name][0] += after.ru_minflt - before.ru_minflt
                used[name][1] += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    first = next(iter(ways))
    print(f"{'way':44} pairs/s  ratio  faults/pair  CPU ms/pair")
    for name, found in rates.items():
        ratio = statistics.median(mine / base for mine, base in zip(found, rates[first], strict=True))
        faults, cpu = (total / rounds / pairs for total in used[name])
        print(f"{name:44} {statistics.median(found):7.1f} {ratio:6.2f} {faults:12.1f} {1000 * cpu:12.1f}", flush=True)


def by_kind(engine: Any, compute: Callable[[], None]) -> None:
    """Print the share of each kind of operation, on one thread."""
    engine._pool = ChunkPool(1)
    compute()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        compute()
    shares: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "other")
        shares[kind] += event.self_cpu_time_total
    total = sum(shares.values())
    for kind, spent in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"{kind:20} {100 * spent / total:5.1f} %")


def fastest(function: Callable[[], Any], repeats: int = 15) -> float:
    """Return the least of several times, in ms."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


@one_thread()
def first_layer(engine: Any, work: Work) -> None:
    """Print the share of the first convolution, and what computing it once per image could save at most."""
    first = next(module for module in engine.model.modules() if isinstance(module, nn.Conv2d))
    points = work.inputs[:1].expand(engine.chunk_size, -1, -1, -1).contiguous(memory_format=torch.channels_last)

    def passes(model: nn.Module) -> Tensor:
        leaf = points.detach().requires_grad_()
        output = model(leaf)
        return torch.autograd.grad(output, leaf, torch.ones_like(output))[0]

    with torch.no_grad():
        output, forward = first(points), fastest(lambda: first(points))
        scale, base = torch.rand(len(points), 1, 1, 1), output[:1].clone()
        inputs = fastest(lambda: torch.addcmul(points[:1], scale, points))
        outputs = fastest(lambda: torch.addcmul(base, scale, output).relu_())
        sums = torch.zeros_like(output[:1]), torch.zeros_like(points[:1])
        kept = fastest(lambda: sums[0].add_((output * scale).sum(0))) - fastest(
            lambda: sums[1].add_((points * scale).sum(0))
        )
    both, whole = fastest(lambda: passes(first)), fastest(lambda: passes(engine.model), 5)
    print(
        f"first layer, ms per chunk of {len(points)}: forward {forward:.1f}, with gradient {both:.1f}; net {whole:.1f}"
    )
    saved_fixed, saved_auto = both - (outputs - inputs) - kept, forward - (outputs - inputs)
    print(f"at most saved by computing it once per image: {100 * saved_fixed / whole:.1f} % with fixed steps,")
    print(f"{100 * saved_auto / whole:.1f} % with auto, which needs each node's gradient at the input")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="mobilenetv2")
    parser.add_argument("--chunks", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    default_shared = Path(os.environ.get("TIMM_IGKD_SHARED", "../shared"))
    parser.add_argument("--shared", type=Path, default=default_shared, help="folder with data/ and weights/")
    args = parser.parse_args()
    facts = environment()
    print(f"teacher {args.teacher}; {', '.join(f'{name} {facts[name]}' for name in ('torch', 'cpu', 'logical_cores'))}")
    work = Work({"teacher": args.teacher, "shared": str(args.shared), "images": 4, "variant": "profile"})
    ways = {}
    for chunk in args.chunks:
        for side_by_side in (True, False):
            way = "side by side" if side_by_side else "threads in a layer"
            engine = make_engine(work, side_by_side, chunk)
            ways[f"{way}, chunks of {chunk}"] = gradients_of(engine, work, args.pairs)
    print(f"\n1. {args.pairs} pairs, {args.rounds} rounds")
    compare(ways, args.pairs, args.rounds)
    engine = work.engine(50)
    print(f"\n2. one thread, chunks of {engine.chunk_size}")
    by_kind(engine, gradients_of(engine, work, args.pairs))
    print("\n3. the first layer, one thread")
    first_layer(engine, work)


if __name__ == "__main__":
    main()
