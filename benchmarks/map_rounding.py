"""How far maps of one teacher and the same images differ between processors, and between step rules.

    python benchmarks/map_rounding.py      # minutes on two CPU cores

One processor stands for several: ONEDNN_MAX_CPU_ISA holds oneDNN's convolutions to an instruction set. Teacher and
images are those of recipes/configs/study_real.yaml; CIFAR-10 lies beside the repository. Each store is compared with
that of automatic steps and the processor's own instructions: the share of pixels that differ, their mean and largest
difference in levels of 255, and the largest difference of a logit. The bounds of recipes/studies/map_samples.py rest on
it. Writes benchmarks/results/map_rounding_cpu.json.
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

TEACHER = ROOT / "recipes" / "results" / "teachers" / "convnet_cifar"
REFERENCE = "automatic steps"
STORES = {REFERENCE: ("auto", None), "SSE41": ("auto", "SSE41"), "AVX2": ("auto", "AVX2"), "50 steps": (50, None)}


def build(out: Path, n_steps: object, instructions: str | None, args: argparse.Namespace) -> MapStore:
    """Return the store of one rule of steps and one instruction set, None for all of the processor's."""
    command = [sys.executable, "-m", "timm_igkd", "maps", "--teacher", f"local-dir:{TEACHER}", "--logits"]
    command += ["--dataset", str(args.shared / "data" / "cifar10"), "--split", "train", "--limit", str(args.images)]
    held = {} if instructions is None else {"ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run([*command, "--n-steps", str(n_steps), "--out", str(out)], check=True, env=os.environ | held)
    return MapStore(out)


def differences(store: MapStore, reference: MapStore) -> dict[str, Any]:
    """Return how far two stores of the same images are apart."""
    maps, others = (np.stack([one.levels(row) for row in range(len(one))]).astype(int) for one in (store, reference))
    logits, other_logits = (np.stack([one.logits(row) for row in range(len(one))]) for one in (store, reference))
    levels = np.abs(maps - others)
    return {
        "pixels_that_differ": float((levels > 0).mean()),
        "mean_levels": float(levels.mean()),
        "mean_levels_of_the_worst_map": float(levels.mean(axis=(1, 2)).max()),
        "max_levels": int(levels.max()),
        "max_logit": float(np.abs(logits - other_logits).max()),
    }


def main() -> None:
    """Build all stores and write the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="the first of the training split")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "map_rounding_cpu.json")
    default_shared = Path(os.environ.get("TIMM_IGKD_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--shared", type=Path, default=default_shared, help="folder with data/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: build(Path(folder) / name, *how, args) for name, how in STORES.items()}
        reference = stores.pop(REFERENCE)
        found = {name: differences(store, reference) for name, store in stores.items()}
    for name, values in found.items():
        print(name, values)
    write_json(args.out, facts() | {"n": args.images, "reference": REFERENCE, "differences": found})


if __name__ == "__main__":
    main()
