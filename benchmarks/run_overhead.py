"""What `timm-igkd run` costs a timm-style training script: throughput and memory, paired with the script alone.

    python benchmarks/run_overhead.py                                  # all cases; about an hour on two CPU cores
    python benchmarks/run_overhead.py --cases flip32 --rounds 2 --images 64 --epochs 2      # a try of a minute
    python benchmarks/run_overhead.py --cases default32     # one case at a time: it joins the others in the JSON file

Cases (p = 0.1, --workers 2):
    default224  timm's default training augmentation (random resized crop, flip, colour jitter) at 224 px, JPEG files
    default32   the same at 32 px, PNG files
    flip32      32 px, flip alone: almost nothing but reading and decoding, the hardest case for the overlay
    clean224    224 px, the library with teacher_view="clean", against the script with timm's own distillation
    clean32     the same at 32 px

Each arm is a process of its own. Both arms of a round follow each other, and who begins alternates; the ratio of a
round is images per second with the overlay over images per second without, of the median epoch after the first.
Median and interval (see `paired.summarize`) go to the JSON file with every single number. Memory comes from
--memory_rounds more pairs, outside the timed rounds: peak of the proportional set sizes of the process and its workers,
median of the pairs' ratios, Linux only; it is no timing, so the machine may do other work meanwhile. A case measured
again replaces its earlier result, with --rounds 0 its memory alone; results of another machine or other versions are
not joined.

The model is small, so that the data path counts for more than in a real training. The images are made from noise at
several scales; --data_dir takes a folder with train/<class>/ instead. Maps come from a random teacher, whose
gradients are noisier, thus larger files, than those of a trained one.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from paired import ROOT, alternating, commit, summarize
from PIL import Image

TRAIN = ROOT / "tests" / "cli" / "timm_scripts" / "train.py"
FLIP_ONLY = ["--scale", "1", "1", "--ratio", "1", "1", "--color-jitter", "0", "--train-interpolation", "bilinear"]
CASES: dict[str, tuple[int, list[str], bool]] = {  # input size, flags of the script, two views
    "default224": (224, [], False),
    "default32": (32, [], False),
    "flip32": (32, FLIP_ONLY, False),
    "clean224": (224, [], True),
    "clean32": (32, [], True),
}
FILES = {224: ((500, 375), "jpg", 1), 32: ((32, 32), "png", 8)}  # (width, height), format, times --images
CLEAN_LINES = {
    "parser = argparse": "from timm_igkd import *\n",
    "    dataset_eval = ": "    dataset_train = IGOverlayDataset(dataset_train, MapStore({maps!r}), IGOverlay({prob}), "
    'teacher_view="clean")\n',
    "    if args.distributed:\n        task.": "    task = IGDistillationTask(model, load_model(args.kd_model_name), "
    'distill_loss_weight=0.5, teacher_view="clean", view_layout="flat", verbose=False)\n',
}


def write_images(root: Path, size: int, count: int) -> None:
    """Write `count` training images of 2 classes and 8 for evaluation, noise at several scales."""
    (width, height), suffix, _ = FILES[size]
    draws = np.random.default_rng(0)
    for split, number in (("train", count), ("validation", 8)):
        for index in range(number):
            image = np.zeros((height, width, 3), np.float32)
            for grid in (4, 16, 64):
                coarse = Image.fromarray(draws.integers(0, 256, (grid, grid, 3), dtype=np.uint8))
                image += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 3
            path = root / split / f"class_{index % 2}" / f"{index:06d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)


def prepare(folder: Path, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the folders of images, maps and teacher for one input size."""
    import timm
    import torch

    from timm_igkd import IGOptions, compute_maps, save_model

    images = Path(args.data_dir) if args.data_dir else folder / f"images{size}"
    if not args.data_dir:
        write_images(images, size, args.images * FILES[size][2])
    torch.manual_seed(0)
    dataset = timm.data.create_dataset("", root=str(images), split="train")
    classes = len(dataset.reader.class_to_idx)
    overlay = {"input_size": (3, size, size)}
    teacher = timm.create_model(args.model, num_classes=classes, pretrained_cfg_overlay=overlay).eval()
    paths: dict[str, Any] = {"images": images, "maps": folder / f"maps{size}", "teacher": folder / f"teacher{size}"}
    save_model(teacher, paths["teacher"])
    compute_maps(teacher, dataset, paths["maps"], options=IGOptions(n_steps=2), progress=False)
    return paths | {"classes": classes}


def commands(case: str, folder: Path, paths: dict[str, Any], args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the command of each arm."""
    size, flags, two_views = CASES[case]
    script = [str(paths["images"]), "--model", args.model, "--num-classes", str(paths["classes"])]
    script += ["--img-size", str(size), "--workers", str(args.workers), "--epochs", str(args.epochs)]
    script += ["--batch-size", str(args.batch_size), *flags]
    if not two_views:
        run = ["-m", "timm_igkd", "run", "--maps", str(paths["maps"]), "--overlay-prob", str(args.overlay_prob), "--"]
        return {"alone": [str(TRAIN), *script], "overlay": [*run, str(TRAIN), *script]}
    source = TRAIN.read_text()
    for place, lines in CLEAN_LINES.items():
        source = source.replace(place, lines.format(maps=str(paths["maps"]), prob=args.overlay_prob) + place)
    clean = folder / f"{case}.py"
    clean.write_text(source)
    script += ["--kd-model-name", f"local-dir:{paths['teacher']}"]
    return {"alone": [str(TRAIN), *script], "overlay": [str(clean), *script]}


def images_per_s(command: list[str], output: Path, on_wait: Any = None) -> float:
    """Run one arm; return images per second of its median epoch after the first."""
    process = subprocess.Popen(
        [sys.executable, *command, "--output", str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while on_wait is not None and process.poll() is None:
        on_wait(process.pid)
        time.sleep(0.2)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()}")
    with open(output / "summary.csv", newline="") as file:
        rates = [float(row["images_per_s"]) for row in csv.DictReader(file)]
    return float(np.median(rates[1:]))


def tree_memory_mib(pid: int) -> float:
    """Return the proportional set size of a process and its descendants, in MiB."""
    total, todo = 0.0, [pid]
    while todo:
        process = Path(f"/proc/{todo.pop()}")
        try:
            todo += [int(child) for child in (process / "task" / process.name / "children").read_text().split()]
            lines = (process / "smaps_rollup").read_text().splitlines()
        except OSError:  # it ended meanwhile
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return total


def peak_memory_mib(command: list[str], output: Path) -> float:
    """Run one arm and return its peak memory."""
    peaks: list[float] = []
    images_per_s(command, output, on_wait=lambda pid: peaks.append(tree_memory_mib(pid)))
    return max(peaks)


def measure(case: str, folder: Path, paths: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measure one case: alternating rounds, then memory."""
    arms, output = commands(case, folder, paths, args), folder / "output"

    def rate(arm: str) -> float:
        views = 2 if arm == "overlay" and CASES[case][2] else 1  # the script counts both
        return images_per_s(arms[arm], output) / views

    rounds = alternating(list(arms), args.rounds, rate, case)
    rounds = [found | {"ratio": found["overlay"] / found["alone"]} for found in rounds]
    result: dict[str, Any] = {"case": case}
    if rounds:
        result |= {"throughput_ratio": summarize([r["ratio"] for r in rounds]), "rounds": rounds}
    if args.memory_rounds and Path("/proc/self/smaps_rollup").exists():
        memory = [{arm: peak_memory_mib(arms[arm], output) for arm in arms} for _ in range(args.memory_rounds)]
        ratios = [pair["overlay"] / pair["alone"] for pair in memory]
        result |= {"peak_memory_mib": memory, "memory_ratio": float(np.median(ratios))}
    return result | {"commands": {arm: " ".join(command) for arm, command in arms.items()}}


def earlier_cases(path: Path, environment: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the cases of a result file by name; results of another machine or other versions end the run."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["environment"] != environment:
        raise SystemExit(f"{path} was measured with other versions or on another machine; delete it or choose --out")
    return {case["case"]: case for case in found["cases"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory_rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=512, help="at 224 px; 8 times as many at 32 px")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--overlay_prob", type=float, default=0.1)
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--data_dir", help="folder with train/<class>/ and validation/<class>/ for all cases")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "run_overhead.json")
    args = parser.parse_args()
    if args.epochs < 2 or args.rounds < 0:
        parser.error("--epochs must be at least 2 (the first is not counted), --rounds at least 0")

    from timm_igkd.environment import environment

    options = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name != "out"
    }
    here: dict[str, Any] = environment()
    cases = earlier_cases(args.out, here)
    if args.rounds == 0 and not set(args.cases) <= cases.keys():
        parser.error(f"--rounds 0 adds memory to measured cases; {args.out} has {sorted(cases)}")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        folder = Path(temporary)
        paths = {size: prepare(folder, size, args) for size in sorted({CASES[case][0] for case in args.cases})}
        for case in args.cases:
            found = measure(case, folder, paths[CASES[case][0]], args)
            if args.rounds:
                cases[case] = found | {"options": options, "commit": commit()}
            else:
                cases[case] |= found | {"memory_options": options, "memory_commit": commit()}
            report = {"environment": here, "cases": [cases[name] for name in CASES if name in cases]}
            text = json.dumps(report, indent=1).replace(str(folder), "TMP").replace(str(ROOT), ".")
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(text + "\n")
    for case in report["cases"]:
        ratio, (low, high) = case["throughput_ratio"]["median"], case["throughput_ratio"]["interval"]
        print(
            f"{case['case']:<12} throughput x{ratio:.3f} [{low:.3f}, {high:.3f}], memory "
            f"x{case.get('memory_ratio', 0):.3f}"
        )


if __name__ == "__main__":
    main()
