"""Convolutions that call oneDNN themselves against torch's own, for the gradients of the attribution engine on a CPU.

    python benchmarks/frozen_convolutions.py
    python benchmarks/frozen_convolutions.py --nets test_resnet:32 --rounds 3 --out /tmp/frozen.json

"frozen" is frozen_conv.py, which the package no longer has: it is read from the last commit that had it, so this needs
a clone with its history. "plain" is what the engine computes with. Both use the engine's chunk size; where that is
16, "chunks of 8" shows both with the smallest chunks of the time before, when the engine froze its convolutions.

All ways of one net are timed in turn in one process. With one thread the measure is the process's CPU time, which other
jobs on the machine disturb least; with two (chunks side by side, one thread each) it is wall time. Weights are random:
only the speed counts. `ratio` is the median over the rounds of plain's time / this way's: above 1, this way is faster.
"""

import argparse
import importlib.util
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from paired import ROOT, facts
from torch import Tensor, nn

import timm_igkd  # noqa: F401  registers its models
from timm_igkd.attribution.chunk_pool import ChunkPool, one_thread
from timm_igkd.attribution.chunk_size import activation_chunk
from timm_igkd.attribution.lighter_model import lighter_model
from timm_igkd.cli.freed_memory import keep_freed_memory
from timm_igkd.files import write_json

LAST_COMMIT = "7195c47"  # the last one with frozen_conv.py
NETS = (
    "mobilenetv2_cifar:32 test_resnet:32 resnet20_cifar:32 convnet_cifar:32 mobilenetv2_100:96 resnet10t:96 "
    "test_efficientnet:160 test_vit:160 lcnet_050:224 mobilenetv3_small_050:224 mobilenetv2_100:224"
).split()
SMALLER_CHUNK = 8  # the smallest of the engine's while it froze convolutions
Clock = Callable[[], float]


def removed_module(name: str) -> ModuleType:
    """Return a module of the attribution room as the last commit with it had it."""
    source = f"{LAST_COMMIT}:timm_igkd/attribution/{name}.py"
    shown = subprocess.run(["git", "-C", str(ROOT), "show", source], capture_output=True, check=False)
    if shown.returncode != 0:
        raise SystemExit(f"git does not know {source}; run this in a clone with the whole history")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_bytes(shown.stdout)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def create_net(name: str, size: int) -> nn.Module:
    """Return a net of random weights."""
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **({"img_size": size} if "vit" in name else {})).eval()


def prepare(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Return a net as the engine prepares it: batch norm folded, lean ReLU6, frozen, channels last."""
    return lighter_model(model, torch.rand(1, *shape)).to(memory_format=torch.channels_last)


def gradients_of(model: nn.Module, points: Tensor) -> Callable[[slice], Tensor]:
    """Return what computes the gradients of the first output at some of the points."""

    def compute(part: slice) -> Tensor:
        leaf = points[part].contiguous(memory_format=torch.channels_last).requires_grad_()
        return torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0]

    return compute


def time_in_turn(
    ways: dict[str, tuple[nn.Module, int]], points: Tensor, pool: ChunkPool, clock: Clock, rounds: int
) -> dict[str, list[float]]:
    """Return per way the ms per pair of every round; a first round warms up."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, (model, chunk) in ways.items():
            compute = gradients_of(model, points)
            parts = [slice(start, start + chunk) for start in range(0, len(points), chunk)]
            started = clock()
            for _ in pool.map(compute, parts):
                pass
            if number:
                times[way].append(1000 * (clock() - started) / len(points))
    return times


def summarise(times: dict[str, list[float]], ways: dict[str, tuple[nn.Module, int]]) -> dict[str, Any]:
    """Return per way its chunk size, median ms per pair, and ratio to plain with its quartiles."""
    found = {}
    for way, mine in times.items():
        ratios = [plain / other for plain, other in zip(times["plain"], mine, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[way] = {"chunk": ways[way][1], "ms_per_pair": statistics.median(mine), "ratio": middle}
        found[way] |= {"ratio_quartiles": [low, high], "n": len(mine)}
    return found


def measure(net: str, rounds: int) -> dict[str, Any]:
    """Return what one net takes with one and with two threads, every way."""
    name, _, size = net.partition(":")
    shape = (3, int(size), int(size))
    model = create_net(name, shape[-1])
    plain = prepare(model, shape)
    with one_thread():  # oneDNN's layouts of the weights depend on it
        frozen = removed_module("frozen_conv").freeze_convolutions(plain, torch.rand(1, *shape))
    chunk = activation_chunk(model, shape, torch.device("cpu"))
    ways = {"plain": (plain, chunk), "frozen": (frozen, chunk)}
    if chunk <= 16:
        ways |= {f"{way}, chunks of {SMALLER_CHUNK}": (model, SMALLER_CHUNK) for way, (model, _) in ways.items()}
    result: dict[str, Any] = {"net": net, "is_frozen": frozen is not plain}
    for threads, clock, kind in ((1, time.process_time, "cpu time"), (2, time.perf_counter, "wall time")):
        times = time_in_turn(ways, torch.rand(threads * chunk, *shape), ChunkPool(threads), clock, rounds)
        result[f"{threads} thread{'s' * (threads > 1)}, {kind}"] = summarise(times, ways)
    return result


def main() -> None:
    """Measure the nets one after the other and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=NETS, metavar="NAME:SIZE")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/frozen_convolutions.json")
    args = parser.parse_args()
    keep_freed_memory()  # as the command does
    rows = []
    for net in args.nets:
        rows.append(measure(net, args.rounds))
        print(rows[-1], flush=True)
        write_json(args.out, facts() | {"last_commit": LAST_COMMIT, "rows": rows})


if __name__ == "__main__":
    main()
