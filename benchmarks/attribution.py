"""Integrated gradients per second: captum as the paper calls it, captum at its best, and this package's engine.

    python benchmarks/attribution.py                              # the teachers still missing in the result file
    python benchmarks/attribution.py --teachers cifar --rounds 3 --overwrite --shared ../shared
    git clone . /tmp/before && git -C /tmp/before checkout c87e80f
    python benchmarks/attribution.py --teachers cifar --before /tmp/before    # c and d alone, against that checkout's

Variants, on the same images and teacher:
    a  captum with its default arguments, 50 steps, batch 8 (less where 50 x 8 images at once do not fit: see `batch`)
    b  captum with the best `internal_batch_size` of a sweep, 50 steps
    c  the fast engine, the same 50 Gauss-Legendre steps
    d  the fast engine, n_steps="auto" at its default tolerance
    limit  the engine's bare forward + input-gradient pass, best batch and threading, divided by 50 steps

Every variant runs in a process of its own (peak memory is that process's), in rounds a, b, c, d, limit, a, b, …;
ratios are medians of the ratios within a round; efficiency is the ratio to `limit`. Maps are compared with 1,000
midpoint steps, and c's with captum's. Random weights serve for speed only: their rows have no accuracy. Teachers are
measured one after the other and merged into one JSON file, so that calls can be divided: one file for each processor.
A teacher that the file has is not measured again; `make bench` has a file of its own, build/attribution.json.

On a CUDA device captum is timed as torch runs it by default, its convolutions in TF32, and compared in float32. There
c, d and limit compute float32 in float32.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from paired import ROOT, alternating, commit, facts, origin, run_child, summarize

VARIANTS = ("a", "b", "c", "d", "limit")
TEACHERS = ("cifar", "mobilenetv2", "resnet50", "vit_small")
# Images timed per variant, by device; `--images_factor` multiplies them.
TIMED = {
    "cpu": {
        "cifar": {"a": 8, "b": 32, "c": 64, "d": 128, "limit": 0},
        "mobilenetv2": {"a": 2, "b": 8, "c": 16, "d": 32, "limit": 0},
        "resnet50": {"a": 1, "b": 4, "c": 8, "d": 8, "limit": 0},
        "vit_small": {"a": 1, "b": 4, "c": 8, "d": 8, "limit": 0},
    },
    "cuda": {
        "cifar": {"a": 64, "b": 256, "c": 1024, "d": 2048, "limit": 0},
        "mobilenetv2": {"a": 16, "b": 64, "c": 256, "d": 512, "limit": 0},
        "resnet50": {"a": 16, "b": 32, "c": 128, "d": 256, "limit": 0},
        "vit_small": {"a": 16, "b": 32, "c": 128, "d": 256, "limit": 0},
    },
}
SWEEP_IMAGES = {
    "cpu": {"cifar": 8, "mobilenetv2": 4, "resnet50": 2, "vit_small": 2},
    "cuda": dict.fromkeys(TEACHERS, 48),  # several of the largest batches
}
ACCURACY_IMAGES = {"cifar": 64, "mobilenetv2": 16}
LIMIT_PAIRS = {
    "cpu": {"cifar": 1920, "mobilenetv2": 240, "resnet50": 64, "vit_small": 64},
    "cuda": dict.fromkeys(TEACHERS, 20_480),
}
IMAGENET_IMAGES = 1_281_167
CHILD = Path(__file__).with_name("attribution_variants.py")


def run_variant(args: argparse.Namespace, teacher: str, variant: str, images: int, **extra: Any) -> dict[str, Any]:
    """Run one variant in a process of its own and return what it measured; with peak_memory_mb, or an error."""
    job = {"variant": variant, "teacher": teacher, "images": images, "shared": str(args.shared), **extra}
    if variant == "a":
        job["memory_gb"] = args.memory_gb
    return run_child(CHILD, job)


def unit_maps(maps: Any) -> Any:
    """Return maps [n, H, W] scaled to [0, 1] each, [n, H * W]."""
    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return (flat - low) / (high - low)


def accuracy(kept: Path, reference: Path) -> dict[str, Any]:
    """Compare a variant's maps with the reference: per-image correlation and mean absolute error after min-max."""
    import torch

    from timm_igkd.attribution.correlation import map_correlation

    found, expected = torch.load(kept, weights_only=True), torch.load(reference, weights_only=True)
    maps, truth = unit_maps(found["maps"]), unit_maps(expected["maps"])
    correlation = map_correlation(found["maps"], expected["maps"])
    error = (maps - truth).abs().mean(1)
    return {
        "corr_median": float(correlation.median()),
        "corr_worst": float(correlation.min()),
        "share_corr_ge_099": float((correlation >= 0.99).double().mean()),
        "mae_median": float(error.median()),
        "mae_worst": float(error.max()),
        "delta_median": float(found["deltas"].median()),
        "delta_p90": float(found["deltas"].quantile(0.9)),
        "accuracy_n": len(maps),
    }


def agreement(kept: Path, captum: Path) -> dict[str, float]:
    """Compare c's maps with captum's: per map the largest difference in units of captum's largest value."""
    import torch

    ours, theirs = (torch.load(path, weights_only=True)["maps"].flatten(1) for path in (kept, captum))
    difference = (ours - theirs).abs().amax(1) / theirs.abs().amax(1)
    return {"captum_difference_median": float(difference.median()), "captum_difference_worst": float(difference.max())}


def add_accuracy(args: argparse.Namespace, teacher: str, chunk: int, rows: list[dict[str, Any]]) -> None:
    """Add to the rows how far their maps are from the reference."""
    with tempfile.TemporaryDirectory() as name:
        count, folder = ACCURACY_IMAGES[teacher], Path(name)
        kept = {variant: folder / f"{variant}.pt" for variant in ("reference", "b", "c", "d")}
        for variant, path in kept.items():
            done = run_variant(args, teacher, variant, count, keep=str(path), chunk=chunk)
            if "error" in done:
                print(f"{teacher} {variant}: no accuracy: {done['error']}", flush=True)
        for row in rows[:4]:  # a and b are the same sums; a's own call would take hours, so b's maps stand for both
            path = kept["b" if row["variant"] == "a" else row["variant"]]
            if path.exists() and kept["reference"].exists():
                row |= accuracy(path, kept["reference"])
        if kept["c"].exists() and kept["b"].exists():
            rows[2] |= agreement(kept["c"], kept["b"])


def measure_teacher(args: argparse.Namespace, teacher: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of one teacher, and everything measured."""
    timed = {variant: images * args.images_factor for variant, images in TIMED[args.device][teacher].items()}
    sweep = run_variant(args, teacher, "sweep", SWEEP_IMAGES[args.device][teacher])
    print(f"{teacher}: captum sweep {sweep}", flush=True)
    if "error" in sweep:
        raise SystemExit(f"{teacher} sweep: {sweep['error']}")
    limit_pairs = LIMIT_PAIRS[args.device][teacher]
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(args.rounds):
        measured = {}
        for variant in VARIANTS:
            extra = {"b": {"chunk": sweep["chunk"]}, "limit": {"limit_pairs": limit_pairs}}.get(variant, {})
            measured[variant] = run_variant(args, teacher, variant, timed[variant], **extra)
            print(f"{teacher} round {number} {variant}: {measured[variant]}", flush=True)
        rounds.append(measured)
    rows = [row_of(teacher, variant, rounds) for variant in VARIANTS]
    if teacher in ACCURACY_IMAGES and not args.no_accuracy:
        add_accuracy(args, teacher, sweep["chunk"], rows)
    return rows, {"sweep": sweep["sweep"], "rounds": rounds}


def measure_before(args: argparse.Namespace, teacher: str) -> dict[str, Any]:
    """Measure c and d of another checkout and of this one in turn; return the ratios of this one's speed to it."""
    job = {"teacher": teacher, "shared": str(args.shared.resolve())}

    def measure(arm: str) -> dict[str, float]:
        tree = args.before.resolve() if arm == "before" else ROOT
        found = {}
        for variant in "cd":
            images = TIMED[args.device][teacher][variant] * args.images_factor
            done = run_child(
                tree / "benchmarks" / CHILD.name,
                job | {"variant": variant, "images": images},
                env=os.environ | {"PYTHONPATH": str(tree)},
            )
            if "error" in done:
                raise SystemExit(f"{teacher} {variant} of {arm}: {done['error']}")
            found[variant] = done["images_per_s"]
        return found

    rounds = alternating(["before", "now"], args.rounds, measure, teacher)
    ratios = {name: summarize([found["now"][name] / found["before"][name] for found in rounds]) for name in "cd"}
    return {"before": commit(args.before), "ratios": ratios, "rounds": rounds}


def row_of(teacher: str, variant: str, rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Summarise the rounds of one variant; ratios are taken within rounds."""

    def ratio(other: str) -> float | None:
        pairs = [
            found[variant]["images_per_s"] / found[other]["images_per_s"]
            for found in rounds
            if "images_per_s" in found[variant] and "images_per_s" in found[other]
        ]
        return statistics.median(pairs) if pairs else None

    measured = [found[variant] for found in rounds if "images_per_s" in found[variant]]
    empty = dict.fromkeys(("corr_median", "corr_worst", "share_corr_ge_099", "delta_median", "delta_p90"))
    row: dict[str, Any] = {"teacher": teacher, "variant": variant, **empty, "rounds": len(measured)}
    row["dataset"] = "cifar10 test" if teacher == "cifar" else "imagenette_small validation"
    row["weights"] = "trained" if teacher in ACCURACY_IMAGES else "random: speed only"
    if not measured:
        return row | {"images_per_s": None, "n": 0, "error": rounds[0][variant].get("error")}
    rates = [found["images_per_s"] for found in measured]
    row |= {"images_per_s": statistics.median(rates), "images_per_s_min": min(rates), "images_per_s_max": max(rates)}
    row |= {name: measured[0].get(name) for name in ("n", "batch", "chunk", "device", "kernel", "mean_steps")}
    row["peak_memory_mb"] = max(found["peak_memory_mb"] for found in measured)
    if teacher == "resnet50" and variant in "cd":
        row["estimated_hours_imagenet"] = IMAGENET_IMAGES / row["images_per_s"] / 3600
    return row | {"ratio_to_a": ratio("a"), "ratio_to_b": ratio("b"), "efficiency": ratio("limit")}


def print_table(result: dict[str, Any]) -> None:
    """Print the rows of a result file, after the machine that each teacher was measured on."""

    def show(column: str, value: Any) -> str:
        digits = 4 if column.startswith("corr") else 3
        return "-" if value is None else f"{value:.{digits}g}" if isinstance(value, float) else str(value)

    columns = "teacher variant images_per_s n ratio_to_a ratio_to_b efficiency corr_median corr_worst".split()
    columns += "share_corr_ge_099 mae_median mae_worst delta_median delta_p90 peak_memory_mb".split()
    for teacher, measured in result["measurements"].items():
        print(f"{teacher}: measured on {origin(measured)}")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in result["rows"]:
        print("| " + " | ".join(show(column, row.get(column)) for column in columns) + " |")


def main() -> None:
    """Measure the teachers and merge their rows into the result file."""
    import torch

    from timm_igkd.files import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--overwrite", action="store_true", help="measure teachers again that the file has")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/attribution_{device}.json"))
    default_shared = Path(os.environ.get("TIMM_IGKD_SHARED", "../shared"))
    parser.add_argument("--shared", type=Path, default=default_shared, help="folder with data/ and weights/")
    parser.add_argument("--images_factor", type=int, default=1, help="times as many images, for a GPU")
    parser.add_argument("--no_accuracy", action="store_true")
    parser.add_argument("--memory_gb", type=float, default=0, help="most memory for a; beyond it, a has no row")
    parser.add_argument("--before", type=Path, help="another checkout: c and d alone, and the ratio to its speed")
    args = parser.parse_args()
    args.device = device
    if not args.shared.is_dir():
        raise SystemExit(f"{args.shared} does not exist; name the folder that CONTRIBUTING.md describes by --shared")
    result = json.loads(args.out.read_text()) if args.out.exists() else {"rows": [], "measurements": {}}
    for teacher in args.teachers if args.before else []:
        compared = facts() | measure_before(args, teacher)
        result.setdefault("against", {})[teacher] = compared | {
            "command": compared["command"].replace(str(args.before), "BEFORE")
        }
        write_json(args.out, result)
    for teacher in [] if args.before else args.teachers:
        if teacher in result["measurements"] and not args.overwrite:
            there = origin(result["measurements"][teacher])
            print(f"{teacher}: already in {args.out}, measured on {there}; measure it again with --overwrite or --out")
            continue
        rows, measured = measure_teacher(args, teacher)
        result["measurements"][teacher] = facts() | measured
        result["rows"] = [row for row in result["rows"] if row["teacher"] != teacher] + rows
        write_json(args.out, result)
    print_table(result)


if __name__ == "__main__":
    main()
