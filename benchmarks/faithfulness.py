"""Are maps any good? Deletion and insertion of all four methods beside random, Sobel and centre maps, and rates.

    python benchmarks/faithfulness.py --only cifar10 --images 8 --rounds 1      # a try, a minute
    OMP_NUM_THREADS=2 nice -n 10 python benchmarks/faithfulness.py              # two busy CPU cores, an hour

Each method's store is built by `compute_maps`, all are scored together on the same images (`evaluation.faithfulness`).
Rates: the four methods take turns on the same images, `--rounds` times; seconds of attribution alone, medians.
Writes benchmarks/results/faithfulness_<device>.json.
"""

import argparse
import copy
import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from timm_igkd import IGOptions, MapStore, compute_maps, load_labeled_images, load_model
from timm_igkd.attribution.chunk_size import activation_chunk
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.ig_options import Method
from timm_igkd.attribution.options import TeacherView
from timm_igkd.cli.arguments import steps_argument
from timm_igkd.cli.freed_memory import keep_freed_memory
from timm_igkd.data.items import read_item
from timm_igkd.environment import environment
from timm_igkd.evaluation.faithfulness import measure_curves, summarize
from timm_igkd.models.loading import use_image_size

ROOT = Path(__file__).resolve().parents[1]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Case:
    """A teacher and images; side: of its input where that is not its own."""

    dataset: str
    split: str
    teacher: dict[str, Any]
    images: int
    side: int | None = None
    rate_images: int = 16


def cases(shared: Path) -> dict[str, Case]:
    """Return what is measured, by name."""
    released = shared / "weights" / "paper_students" / "kd_92.29.safetensors"
    student = {"name": "mobilenetv2_cifar", "model_args": {"drop_blocks": 5}, "checkpoint": released}
    photographs = {"name": f"local-dir:{shared / 'weights' / 'mobilenetv2_100.coral_in1k'}"}
    return {
        "cifar10": Case("cifar10", "test", student | {"mean": (0, 0, 0), "std": (1, 1, 1)}, 500, rate_images=64),
        "imagenette": Case("imagenette_small", "validation", photographs, 200, side=96),
    }


def options_of(method: Method, steps: Any) -> IGOptions:
    """Return the method's options, the paper's where it has any."""
    return IGOptions(n_steps=steps) if method == "ig" else IGOptions(method=method)


def rates(teacher: Any, dataset: Any, steps: Any, count: int, rounds: int) -> dict[str, Any]:
    """Return maps per second of each method, the median and all rounds."""
    view = TeacherView(teacher)
    inputs = torch.stack([view(read_item(dataset, index * len(dataset) // count)[0]) for index in range(count)])
    shape = (3, *view.size)
    chunk = activation_chunk(teacher, shape, torch.device("cpu"))
    engines = {m: FastEngine(copy.deepcopy(teacher), options_of(m, steps), chunk, shape) for m in METHODS}
    logits = engines["ig"].forward(inputs)
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(rounds + 1):
        for method in METHODS if number % 2 else METHODS[::-1]:
            start = time.perf_counter()
            engines[method].attribute(inputs, torch.zeros_like(inputs[:1]), logits.argmax(1), logits)
            if number:  # the first warms up
                found[method].append(count / (time.perf_counter() - start))
    return {name: {"median": statistics.median(all_), "rounds": all_} for name, all_ in found.items()}


def measure(case: Case, shared: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the scores and rates of one case."""
    dataset = load_labeled_images(str(shared / "data" / case.dataset), case.split)
    count = min(case.images, arguments.images or case.images)
    dataset = dataset.subset([position * len(dataset) // count for position in range(count)])
    teacher = load_model(case.teacher["name"], **{k: v for k, v in case.teacher.items() if k != "name"}).eval()
    if case.side:
        use_image_size(teacher, case.side, case.side)
    stores: dict[str, MapStore] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for method in METHODS:
            folder = Path(arguments.stores or temporary, case.dataset, method)
            found = compute_maps(teacher, dataset, folder, options=options_of(method, arguments.n_steps))
            assert found is not None
            stores[method] = found
        curves = measure_curves(stores, teacher, dataset, steps=arguments.steps)
    scores = {name: asdict(summarize(curves, name, store.provenance, 0)) for name, store in stores.items()}
    return {
        "dataset": case.dataset,
        "split": case.split,
        "n": count,
        "input": list(TeacherView(teacher).size),
        "n_steps": arguments.n_steps,
        "scores": scores,
        "maps_per_second": rates(teacher, dataset, arguments.n_steps, case.rate_images, arguments.rounds),
    }


def table(result: dict[str, Any]) -> str:
    """Return a written file as the tables of docs/maps.md: areas and rates, then the paired differences."""

    def cell(found: dict[str, float]) -> str:
        return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})".replace("-", "−")

    def row(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"

    lines = []
    for name, case in result["cases"].items():
        controls = case["scores"]["ig"]["scores"][1:]
        lines += [
            "",
            f"{name}, n = {case['n']}, {case['input'][1]} px:",
            "",
            row("Maps", "Deletion", "Insertion", "Maps/s"),
        ]
        lines.append("|---|---|---|--:|")
        for method, score in case["scores"].items():
            own, rate = score["scores"][0], case["maps_per_second"][method]["median"]
            lines.append(row(f"`{method}`", cell(own["deletion"]), cell(own["insertion"]), f"{rate:.0f}"))
        lines += [row(each["maps"], cell(each["deletion"]), cell(each["insertion"]), "") for each in controls]
        names = [each["maps"] for each in controls]
        lines += ["", row("Minus", *(f"{side}: {each}" for side in ("deletion", "insertion") for each in names))]
        lines.append("|---" * (1 + 2 * len(names)) + "|")
        for method, score in case["scores"].items():
            gaps = [cell(each[f"{side}_gap"]) for side in ("deletion", "insertion") for each in score["scores"][1:]]
            lines.append(row(f"`{method}`", *gaps))
    return "\n".join(lines[1:])


def main() -> None:
    """Measure all cases and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--only", choices=("cifar10", "imagenette"))
    parser.add_argument("--stores", type=Path, help="keep the maps here, to go on after a kill")
    parser.add_argument("--images", type=int, help="at most so many of each set")
    parser.add_argument("--n-steps", type=steps_argument, default="auto", help="of integrated gradients")
    parser.add_argument("--steps", type=int, default=20, help="of the curves")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faithfulness_cpu.json")
    parser.add_argument("--table", action="store_true", help="only print a written file as tables")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.out.read_text(encoding="utf-8"))))
        return
    keep_freed_memory()
    result: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "environment": environment(), "cases": {}}
    for name, case in cases(arguments.shared).items():
        if arguments.only in (None, name):
            result["cases"][name] = measure(case, arguments.shared, arguments)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
