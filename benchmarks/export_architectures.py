"""Which architectures for the edge go into an ONNX file: the smallest of each of timm's families, with random weights.

    nice python benchmarks/export_architectures.py        # half an hour on one core; nothing is timed

A family is what `timm-igkd students` takes for one (`Candidate.family`), its smallest architecture that of the fewest
multiply-accumulates in timm_igkd/export/architectures.csv; of 10^9 or more, it is not tried. Each is exported, which
compares the file's logits with PyTorch's, and quantised to int8 with two images of noise, on which onnxruntime then
runs it. Writes benchmarks/results/export_architectures_cpu.json: for each architecture why a file could not be
written, empty where it could.
"""

import argparse
import json
import tempfile
from pathlib import Path

import timm
import torch
from paired import facts

from timm_igkd.errors import UserError
from timm_igkd.evaluation.onnx_file import write_onnx
from timm_igkd.export.candidates import Architecture, Candidate, read_architectures
from timm_igkd.export.int8 import check_quantisable
from timm_igkd.files import write_json

MOST_MACS = 1e9


def smallest_of_families() -> list[Architecture]:
    """Return the architecture of the fewest multiply-accumulates of every family, below the most, by name."""
    found: dict[str, Architecture] = {}
    for row in sorted(read_architectures(), key=lambda row: (row.macs, row.name)):
        if row.macs < MOST_MACS:
            found.setdefault(Candidate(row.name, 0, False, row.parameters, row.macs).family, row)
    return sorted(found.values(), key=lambda row: row.name)


def try_export(name: str) -> dict[str, str]:
    """Return for each kind of file why it could not be written, empty where it could."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    failed = {"onnx": "", "int8": ""}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.onnx"
        try:
            size = write_onnx(model, file).input_size
        except UserError as error:
            return {kind: str(error) for kind in failed}
        try:
            check_quantisable(file, size)
        except UserError as error:
            failed["int8"] = str(error)
    return failed


def main() -> None:
    """Try all, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path(__file__).parent / "results" / "export_architectures_cpu.json"
    parser.add_argument("--out", type=Path, default=out)
    arguments = parser.parse_args()
    found, rows = {}, smallest_of_families()
    for number, row in enumerate(rows, 1):
        found[row.name] = try_export(row.name)
        why = found[row.name]["onnx"] or found[row.name]["int8"] or "ok"
        print(f"{number} of {len(rows)}: {row.name}: {why}", flush=True)
    failed = {kind: sum(bool(result[kind]) for result in found.values()) for kind in ("onnx", "int8")}
    write_json(arguments.out, facts() | {"architectures": found})
    print(json.dumps({"architectures": len(found), "failed": failed}))


if __name__ == "__main__":
    main()
