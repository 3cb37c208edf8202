"""How far maps of one teacher and the same images differ between processors, and between step rules.

    python benchmarks/map_rounding.py      # minutes on two CPU cores

One processor stands for several: ONEDNN_MAX_CPU_ISA holds oneDNN's convolutions to an instruction set. Teacher and
images are those of recipes/configs/study_real.yaml; CIFAR-10 lies beside the repository. Of pairs of stores it gives
the share of pixels that differ, their mean and largest difference in levels of 255, that of the mean levels by which a
study knows its maps again (recipes/studies/map_means.py, whose bound rests on this), and the largest difference of a
logit. Writes benchmarks/results/map_rounding_cpu.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from paired import ROOT, facts

from timm_igkd import MapStore
from timm_igkd.files import write_json

sys.path.insert(0, str(ROOT / "recipes"))

TEACHER = ROOT / "recipes" / "results" / "teachers" / "convnet_cifar"
STORES = {
    "auto": ("auto", None),
    "auto, SSE41": ("auto", "SSE41"),
    "auto, AVX2": ("auto", "AVX2"),
    "50 steps": (50, None),
    "200 steps": (200, None),
    "256 steps": (256, None),
}
PAIRS = [("auto, SSE41", "auto"), ("auto, AVX2", "auto"), ("50 steps", "auto"), ("200 steps", "256 steps")]


def build(out: Path, n_steps: object, instructions: str | None, args: argparse.Namespace) -> MapStore:
    """Return the store of one rule of steps and one instruction set, None for all of the processor's."""
    command = [sys.executable, "-m", "timm_igkd", "maps", "--teacher", f"local-dir:{TEACHER}", "--logits"]
    command += ["--dataset", str(args.shared / "data" / "cifar10"), "--split", "train", "--limit", str(args.images)]
    held = {} if instructions is None else {"ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run([*command, "--n-steps", str(n_steps), "--out", str(out)], check=True, env=os.environ | held)
    return MapStore(out)


def differences(store: MapStore, reference: MapStore) -> dict[str, Any]:
    """Return how far two stores of the same images are apart."""
    from studies.map_means import maps_means

    maps, others = (np.stack([one.levels(row) for row in range(len(one))]).astype(int) for one in (store, reference))
    logits, other_logits = (np.stack([one.logits(row) for row in range(len(one))]) for one in (store, reference))
    levels = np.abs(maps - others)
    means = [np.array(maps_means(one).split(), dtype=float) for one in (store, reference)]
    return {
        "pixels_that_differ": float((levels > 0).mean()),
        "mean_levels": float(levels.mean()),
        "mean_levels_of_the_worst_map": float(levels.mean(axis=(1, 2)).max()),
        "max_levels": int(levels.max()),
        "mean_of_map_means": float(np.abs(means[0] - means[1]).mean()),
        "max_logit": float(np.abs(logits - other_logits).max()),
    }


def main() -> None:
    """Build all stores and write the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="the first of the training split")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "map_rounding_cpu.json")
    default_shared = Path(os.environ.get("TIMM_IGKD_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--shared", type=Path, default=default_shared, help="folder with data/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: build(Path(folder) / name, *how, args) for name, how in STORES.items()}
        found = {f"{a} - {b}": differences(stores[a], stores[b]) for a, b in PAIRS}
    for name, values in found.items():
        print(name, values)
    write_json(args.out, facts() | {"n": args.images, "differences": found})


if __name__ == "__main__":
    main()
