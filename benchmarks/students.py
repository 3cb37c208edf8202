"""Students for a MobileNetV2 teacher at 96 px and 5 ms: the list, the time it takes, and whether its latencies repeat.

    python benchmarks/students.py                        # two minutes on an idle machine of two cores

Runs `timm-igkd students` without its cache, measures three of the listed architectures again (the fastest, the middle
and the slowest), and times each of the three as the command's quick exporter writes it and, in turn with that, as
`timm-igkd export` does. Exit code 1 where a latency of the three does not repeat within 20 %.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from timm_igkd.cli.main import main as timm_igkd
from timm_igkd.evaluation.onnx_file import write_onnx
from timm_igkd.evaluation.onnx_latency import time_files
from timm_igkd.export.candidates import read_architectures
from timm_igkd.export.int8 import quantise
from timm_igkd.export.student_latency import _write_quickly
from timm_igkd.export.students import MeasuredStudent, StudentsRecord, find_students, read_students
from timm_igkd.models.loading import load_model

MOST = 0.2


def spread(record: StudentsRecord) -> list[MeasuredStudent]:
    """Return the fastest, the middle and the slowest architecture that fit, as their own float files say."""
    whole = sorted((s for s in record.students if not s.drop), key=lambda s: s.files[0].latency_ms.median)
    return [whole[i] for i in sorted({0, len(whole) // 2, len(whole) - 1})]


def repeated(record: StudentsRecord, chosen: list[MeasuredStudent]) -> list[dict[str, Any]]:
    """Return the latencies of these students, and those of the teacher's truncations, measured once more."""
    teacher = load_model(record.teacher, pretrained=False, img_size=record.img_size)
    rows = [row for row in read_architectures() if row.name in {s.name.split(".")[0] for s in chosen}]
    options: dict[str, Any] = {"teacher_name": record.teacher, "architectures": rows, "use_cache": False}
    again = find_students(teacher, record.budget, **options)
    latencies = {(str(s), f.format): f.latency_ms.median for s in (*again.students, *again.others) for f in s.files}
    found = []
    for student in (s for s in record.students if s in chosen or s.drop):
        for file in student.files:
            first, second = file.latency_ms.median, latencies.get((str(student), file.format))
            if second is None:
                continue
            named = {"student": str(student), "format": file.format, "among_the_three": student in chosen}
            found.append(named | {"first_ms": first, "again_ms": second, "ratio": second / first})
    return found


def both_exporters(record: StudentsRecord, chosen: list[MeasuredStudent], folder: Path) -> list[dict[str, Any]]:
    """Return the latency of these students' files of both exporters, in float and in int8, timed in turn."""
    found = []
    image = torch.rand(1, 3, record.img_size, record.img_size)
    for student in chosen:
        options: dict[str, Any] = {"num_classes": record.num_classes, "img_size": record.img_size}
        model = load_model(student.name, pretrained=False, **options)
        paths = {name: folder / f"{name}.onnx" for name in ("quick", "export", "quick_int8", "export_int8")}
        _write_quickly(model, image, paths["quick"])
        write_onnx(model, paths["export"])
        for name in ("quick", "export"):
            quantise(paths[name], paths[f"{name}_int8"], [image])
        times = [timing.median for timing in time_files(list(paths.values()), seconds=8, threads=1)]
        found.append({"student": str(student), "ms": dict(zip(paths, times, strict=True))})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="mobilenetv2_100")
    parser.add_argument("--img-size", default="96")
    parser.add_argument("--max-latency-ms", default="5")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "students_cpu.json")
    args = parser.parse_args()
    asked = ["--teacher", args.teacher, "--img-size", args.img_size, "--max-latency-ms", args.max_latency_ms, "--int8"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "students"
        if code := timm_igkd(["students", *asked, "--no-cache", "--out", str(folder)]):
            raise SystemExit(code)
        record = read_students(folder / "students.json")
        args.out.with_suffix(".svg").write_bytes((folder / "students.svg").read_bytes())
        chosen = spread(record)
        facts = {
            "command": shlex.join(["python", *sys.argv]),
            "measured_by": " ".join(["timm-igkd students", *asked, "--no-cache"]),
            "seconds": record.seconds,
            "repeats": repeated(record, chosen),
            "exporters": both_exporters(record, chosen, folder),
            "record": json.loads((folder / "students.json").read_text()),
        }
    args.out.write_text(json.dumps(facts, indent=2) + "\n")
    print(args.out)
    for repeat in facts["repeats"]:
        print(f"{repeat['student']} {repeat['format']}: {repeat['first_ms']:.3f} ms, again {repeat['again_ms']:.3f} ms")
    for entry in facts["exporters"]:
        print(f"{entry['student']}, in turn: {', '.join(f'{name} {ms:.3f} ms' for name, ms in entry['ms'].items())}")
    if any(abs(repeat["ratio"] - 1) > MOST for repeat in facts["repeats"] if repeat["among_the_three"]):
        raise SystemExit(f"a latency of the three does not repeat within {MOST:.0%}")


if __name__ == "__main__":
    main()
