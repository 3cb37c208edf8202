"""Whether two commits of this repository train the same students: a small study by each, compared number by number.

    python benchmarks/same_results.py d4c59a8 c750f56      # a quarter of an hour on two CPU cores

The study has the teacher, student, recipe and five cells of recipes/configs/study_real.yaml, on the first 1,500 images
of CIFAR-10 (it lies beside the repository), in float32, or what --mixed-precision says: commits before c750f56 refuse
bfloat16 where a processor lacks it.
Each commit is checked out, builds its own maps and runs its own code. Writes benchmarks/results/same_results_cpu.json:
of every run how many columns of its row are equal, which are not, and how many predictions differ.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from paired import ROOT, facts

from timm_igkd.files import write_json

LEFT_OUT = {"commit", "versions", "started", "wall_time_s", "train_images_per_s"}  # of the run, not of its result


def small_study(seeds: int, shared: Path) -> dict[str, Any]:
    """Return the settings of the study, as its YAML holds them."""
    plan = yaml.safe_load((ROOT / "recipes" / "configs" / "study_real.yaml").read_text(encoding="utf-8"))
    kept = {key: plan[key] for key in ("teacher", "base", "latency")}
    cells = {
        name: cell | ({"overlay_prob": 0.5} if "overlay_prob" in cell else {}) for name, cell in plan["cells"].items()
    }
    data = {"dataset": "cifar10", "transfer_dataset": "tinyimagenet_cifar10"}
    return (
        kept
        | {name: str(shared.resolve() / "data" / folder) for name, folder in data.items()}
        | {"name": "small", "seeds": seeds, "base": plan["base"] | {"epochs": 2}, "cells": cells, "n_steps": 8}
        | {"train_limit": 1500, "test_limit": 400, "corruption_images": 100, "ig_images": 8, "report": False}
    )


def run(revision: str, config: Path, folder: Path, precision: str) -> Path:
    """Run the study by a commit's own code; return the folder of its rows."""
    tree, out = folder / f"tree-{revision}", folder / f"rows-{revision}"
    subprocess.run(["git", "worktree", "add", "--detach", str(tree), revision], cwd=ROOT, check=True)
    try:
        command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--mixed_precision", precision]
        command += ["--num_cpu_threads_per_process", "1", "recipes/study.py", "--config", str(config)]
        command += ["--output_dir", str(out), "--work_dir", str(folder / f"work-{revision}")]
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=tree, env=environment, check=True)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    return out


def compare(folders: list[Path]) -> list[dict[str, Any]]:
    """Return what of each run is equal in two folders of rows."""
    tables = []
    for folder in folders:
        with open(folder / "results.csv", newline="", encoding="utf-8") as file:
            tables.append({(row["cell"], int(row["seed"])): row for row in csv.DictReader(file)})
    predictions = [np.load(folder / "predictions.npz") for folder in folders]
    assert tables[0].keys() == tables[1].keys()
    found = []
    for key, row in tables[0].items():
        other = tables[1][key]
        columns = (row.keys() & other.keys()) - LEFT_OUT
        entry = f"{row['config_hash']}-{row['seed']}"
        found.append(
            {
                "cell": key[0],
                "seed": key[1],
                "equal_columns": sum(row[name] == other[name] for name in columns),
                "unequal": {name: [row[name], other[name]] for name in sorted(columns) if row[name] != other[name]},
                "predictions": len(predictions[0][entry]),
                "unequal_predictions": int((predictions[0][entry] != predictions[1][entry]).sum()),
            }
        )
    return found


def main() -> None:
    """Run both and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs=2, help="commits")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder of data/cifar10")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "same_results_cpu.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = small_study(args.seeds, args.shared)
        config = folder / "small.yaml"
        config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        runs = compare([run(revision, config, folder, args.mixed_precision) for revision in args.revisions])
    settings["mixed_precision"] = args.mixed_precision
    described = {key: value for key, value in settings.items() if key not in ("dataset", "transfer_dataset")}
    write_json(args.out, facts() | {"revisions": args.revisions, "settings": described, "runs": runs})
    for one in runs:
        print(one)


if __name__ == "__main__":
    main()
