"""The command `timm-igkd students`."""

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from timm_igkd.errors import check_count
from timm_igkd.export.budget import Budget
from timm_igkd.files import output_file, write_atomic

if TYPE_CHECKING:  # a budget that is none is refused before torch is imported
    from timm_igkd.export.students import MeasuredStudent, StudentsRecord

PICTURE = "students.svg"
_KINDS = {"onnx": "float", "onnx-int8": "int8"}


def students_command(args: argparse.Namespace) -> None:
    """List the students that fit a budget of latency or size, measured on this machine."""
    budget = Budget(args.max_latency_ms, args.max_size_mb, args.int8)
    if args.num_classes is not None:
        check_count("num_classes", args.num_classes)
    from timm_igkd.export.students import RECORD, find_students
    from timm_igkd.models.checkpoint import has_weights
    from timm_igkd.models.loading import load_model
    from timm_igkd.records import write_record
    from timm_igkd.report.figures import require_matplotlib

    if args.out is not None:
        require_matplotlib("the picture of --out")
        for name in (RECORD, PICTURE):
            output_file(args.out / name)
    options: dict[str, Any] = {"model_args": dict(args.teacher_args or ()), "img_size": args.img_size}
    record = find_students(
        load_model(args.teacher, role="teacher", pretrained=False, **options),
        budget,
        teacher_name=args.teacher,
        teacher_has_weights=has_weights(args.teacher),
        num_classes=args.num_classes,
        use_cache=not args.no_cache,
    )
    if args.out is not None:
        write_record(args.out / RECORD, record)
        write_atomic(args.out / PICTURE, pareto_picture(record).encode())
    for line in _lines(record):
        print(line)
    best = record.best()
    named = ["--student", "none", "--student-drop", best.drop] if best.drop else ["--student", best.name]
    given = ["--teacher-args", *(f"{key}={value}" for key, value in args.teacher_args or ())]
    words = ["--teacher", record.teacher, *(given if len(given) > 1 else []), *named, "--img-size", record.img_size]
    print(f"the best by the rule: timm-igkd distill {shlex.join(map(str, words))} …")


def _lines(record: "StudentsRecord") -> list[str]:
    """Return the table of the students that fit, and what is to be said of the others."""
    tried = [*record.students, *record.others]
    cached = sum(student.cached for student in tried)
    what = f"{len(record.students)} of {len(tried)} measured students fit {record.budget}"
    of = f"{record.teacher} at {record.img_size} px, {record.candidates} smaller ones known"
    again = f", {cached} of them from the cache (--no-cache measures again)" if cached else ""
    lines = [f"{what} ({of}; {record.seconds:.0f} s{again})"]
    if record.students:
        lines.append(f"{'student':44} {'weights':7} {'file':9} {'ms':>7} {'MB':>7} {'M params':>8} {'M MACs':>7}")
    for student in record.students:
        file = student.best(record.budget)
        assert file is not None
        lines.append(_row(student, file))
    if record.measured_teacher is not None:
        lines.append(_row(record.measured_teacher, record.measured_teacher.fastest, "teacher "))
    return lines + [f"could not be measured: {name} ({why})" for name, why in record.left_out.items()]


def _row(student: "MeasuredStudent", file: Any, role: str = "") -> str:
    weights = "yes" if student.has_weights else "no"
    return (
        f"{role + str(student):44} {weights:7} {_KINDS[file.format]:9} {file.latency_ms.median:7.2f} "
        f"{file.size_mb:7.2f} {student.num_parameters / 1e6:8.2f} {student.macs / 1e6:7.1f}"
    )


def pareto_picture(record: "StudentsRecord") -> str:
    """Return an SVG of latency and parameters of all that was measured, with the front of those that fit."""
    from timm_igkd.report.figures import ROLES, render_svg, svg_file
    from timm_igkd.report.page import light_colours

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        teachers = [] if record.measured_teacher is None else [record.measured_teacher]
        groups = (
            ([s for s in record.students if s.has_weights], "student", "o", "fits, has weights to start from"),
            ([s for s in record.students if not s.has_weights], "student", "x", "fits, random weights"),
            (record.others, "muted", ".", "does not fit"),
            (teachers, "teacher", "s", "teacher"),
        )
        for students, role, marker, label in groups:
            points = [_point(student, record) for student in students]
            if points:
                axes.scatter(*zip(*points, strict=True), marker=marker, color=ROLES[role], s=26, label=label)
        axes.plot(*zip(*front, strict=True), "-", color=ROLES["student"], linewidth=1, label="no faster one has more")
        for (x, y), student in zip(front, names, strict=True):
            axes.annotate(
                student.replace("$", r"\$"),
                (x, y),
                (3, -8),
                textcoords="offset points",
                fontsize=6.5,
                color=ROLES["ink"],
            )
        if record.budget.max_latency_ms is not None:
            axes.axvline(record.budget.max_latency_ms, linestyle="--", color=ROLES["muted"], linewidth=0.9)
        axes.set(xscale="log", yscale="log", xlabel="ms of one image, one thread", ylabel="M parameters")
        axes.legend(loc="best")

    best = pareto_front(record)
    front, names = (
        [_point(student, record) for student in best] or [(float("nan"),) * 2],
        [str(s) for s in best] or [""],
    )
    return svg_file(render_svg("students", (7.2, 4.6), draw), light_colours())


def pareto_front(record: "StudentsRecord") -> list["MeasuredStudent"]:
    """Return the students that fit and have more parameters than any faster one, the fastest first."""
    front: list[MeasuredStudent] = []
    for student in sorted(record.students, key=lambda s: (_point(s, record)[0], -s.num_parameters)):
        if not front or student.num_parameters > front[-1].num_parameters:
            front.append(student)
    return front


def _point(student: "MeasuredStudent", record: "StudentsRecord") -> tuple[float, float]:
    file = student.best(record.budget) or student.fastest
    return file.latency_ms.median, student.num_parameters / 1e6
