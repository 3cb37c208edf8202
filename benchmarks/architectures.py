"""The table of timm's architectures that `timm-igkd students` chooses its candidates from.

    python benchmarks/architectures.py                                        # half an hour on a core
    python benchmarks/architectures.py --match 'mobilenetv3_small_*' --out /tmp/some.csv

One row each, at the input size of the default weights: parameters without those of the classes, parameters of a class,
and multiply-accumulates; the default weights' tag, and whether timm calls the input size fixed. Models are built
on the meta device, without memory for weights. What takes longer than --seconds, has more than --most million
parameters, reads other than squares of 3 channels, or fails, is left out and printed. Rows that the file has stay, so
that a killed run goes on; delete it to begin anew.
"""

import argparse
import csv
import signal
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg

from timm_igkd.errors import first_line
from timm_igkd.export.candidates import TABLE
from timm_igkd.models.loading import count_macs, count_parameters


def build(name: str, num_classes: int) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, num_classes=num_classes).eval().requires_grad_(False)


def row(name: str, most: float) -> dict[str, Any]:
    """Return the row of an architecture; ValueError says why it has none."""
    config = get_pretrained_cfg(name)
    model: Any = build(name, 1000)
    if (whole := count_parameters(model)) > most * 1e6:
        raise ValueError(f"{whole / 1e6:.0f} M parameters")
    size = tuple(model.pretrained_cfg["input_size"])
    if size[0] != 3 or size[1] != size[2]:
        raise ValueError(f"input {size}")
    classifier = model.get_classifier()
    if isinstance(classifier, torch.nn.Linear):
        per_class = count_parameters(classifier) // 1000
    else:
        per_class = (whole - count_parameters(build(name, 500))) // 500
    return {
        "name": name,
        "size": size[1],
        "parameters": whole - 1000 * per_class,
        "per_class": per_class,
        "macs": count_macs(model),
        "weights": config.tag if config is not None and config.has_weights else "",
        "fixed": int(bool(model.pretrained_cfg.get("fixed_input_size"))),
    }


def stop(*_: object) -> None:
    raise ValueError("takes too long")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="names, with * and ?")
    parser.add_argument("--most", type=float, default=60, help="million parameters")
    parser.add_argument("--seconds", type=int, default=60, help="for one architecture")
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, stop)
    rows = {row["name"]: row for row in csv.DictReader(args.out.open(encoding="utf-8"))} if args.out.exists() else {}
    for name in timm.list_models(args.match):
        if name in rows or not timm.model_entrypoint(name).__module__.startswith("timm."):
            continue
        signal.alarm(args.seconds)
        try:
            rows[name] = row(name, args.most)
        except Exception as error:  # each architecture fails in its own way
            print(f"{name}: left out, {first_line(error)}", flush=True)
            continue
        finally:
            signal.alarm(0)
        write(args.out, [rows[name] for name in sorted(rows)])
    print(f"{args.out}: {len(rows)} architectures of timm {timm.__version__}")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
