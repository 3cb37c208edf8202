"""Students of four families, trained on digits and exported: what float and int8 ONNX files keep, and what they take.

    python benchmarks/export_families.py        # five minutes on two CPU cores; timings want a quiet machine

Each is distilled by `timm-igkd distill` from one teacher, with random initial weights, for 30 epochs at 32 px,
one seed, and exported by `--export onnx-int8`. Writes benchmarks/results/export_families_cpu.json: the record of every
export, and the accuracy.
"""

import argparse
import json
import tempfile
from pathlib import Path

from paired import facts

from timm_igkd.cli.main import main as timm_igkd
from timm_igkd.files import read_mapping

STUDENTS = ("test_resnet", "mobilenetv3_small_050", "test_convnext", "test_vit")


def distil(student: str, folder: Path, options: list[str]) -> None:
    """Run the digits job for one student."""
    given = ["--student", student, "--overlay-prob", "0", "--compare", "none", "--epochs", "30", "--img-size", "32"]
    given += ["--export", "onnx-int8"]
    code = timm_igkd(
        ["distill", "--dataset", "digits", "--output-dir", str(folder), "--name", student, *given, *options]
    )
    if code:
        raise SystemExit(f"{student}: exit code {code}")


def main() -> None:
    """Distil and export all, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=STUDENTS, help="the first one's run trains the teacher")
    out = Path(__file__).parent / "results" / "export_families_cpu.json"
    parser.add_argument("--out", type=Path, default=out)
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, teacher = Path(temporary), []
        for student in arguments.students:
            distil(student, folder, teacher)
            teacher = ["--teacher", f"local-dir:{folder / arguments.students[0] / 'teacher'}", "--teacher-epochs", "0"]
            metrics = read_mapping(folder / student / "metrics.json")
            record = read_mapping(folder / student / "export" / "export.json")
            kept = {key: metrics[key] for key in ("top1", "n", "num_parameters")}
            found[student] = kept | {
                "export": {key: record[key] for key in record if key not in ("model", "environment")}
            }
    arguments.out.write_text(json.dumps(facts() | {"students": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
