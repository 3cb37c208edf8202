"""Numbers of a run in words: the rows and sentences of the report page, as plain text that the template escapes."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from timm_igkd.evaluation.latency import Timing
from timm_igkd.export.record import ExportSummary
from timm_igkd.intervals import three_digits, wilson_interval
from timm_igkd.report.run_files import Metrics, ModelMetrics, Robustness, Sizes

NARROW = "\u202f"  # narrow no-break space between a number and its unit
TIMES, MINUS, DASH = "\u00d7", "\u2212", "\u2013"
ABSENT = DASH
MOST_ITEMS = 12


class Row(NamedTuple):
    """One line of a table that compares teacher and student."""

    name: str
    teacher: str
    student: str
    comparison: str


def signed(value: float, digits: int = 2) -> str:
    """Return a difference with its sign, a real minus; what rounds to 0 has no minus."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", MINUS)


def percent(value: float, digits: int = 1) -> str:
    """Return a percentage (0 to 100) with its sign."""
    return f"{value:.{digits}f}{NARROW}%"


def count(value: float) -> str:
    """Return a whole number with its thousands apart."""
    return f"{round(value):,}"


def large(value: float) -> str:
    """Return a large number in millions, thousands or as it is, to three digits."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if float(f"{value:.3g}") >= size:
            return f"{three_digits(value / size)}{NARROW}{unit}"
    return count(value)


def ratio(value: float) -> str:
    """Return a factor to about two digits, e.g. 5.9x, with a multiplication sign."""
    digits = 0 if value >= 20 else 1 if value >= 1.95 else 2
    return f"{value:.{digits}f}{TIMES}"


def duration(seconds: float) -> str:
    """Return seconds in the largest units that matter."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}{NARROW}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NARROW}min {rest}{NARROW}s"
    return f"{minutes // 60}{NARROW}h {minutes % 60}{NARROW}min"


def label_counts(metrics: Metrics | None) -> str:
    """Return how many training images had a label, in words; empty where all had."""
    found = metrics.training_images if metrics else None
    return f"{count(found.labeled)} labelled and {count(found.unlabeled)} unlabelled images" if found else ""


def correct_of(metrics: ModelMetrics) -> int:
    """Return the number of correctly classified images."""
    return round(metrics.top1 * metrics.n / 100)


def interval_text(metrics: ModelMetrics) -> str:
    """Return the Wilson interval of the top-1 accuracy in percent."""
    low, high = wilson_interval(correct_of(metrics), metrics.n)
    return f"{100 * low:.1f}{DASH}{percent(100 * high)}"


def summary_sentence(metrics: Metrics) -> str:
    """Return the result of a run in one sentence."""
    teacher, compression = metrics.teacher, metrics.compression
    if not teacher:
        subject = "The model"
    elif compression and compression >= 1.05:
        article = "An" if ratio(compression).startswith(("8", "11.", "18.")) else "A"
        subject = f"{article} {ratio(compression)} smaller student"
    elif compression and compression <= 1 / 1.05:
        subject = f"A student {ratio(1 / compression)} its teacher's size"
    else:
        subject = "A student of its teacher's size"
    text = (
        f"{subject} reaches {percent(metrics.top1)} ({count(correct_of(metrics))} of {count(metrics.n)} images; "
        f"95{NARROW}% Wilson interval {interval_text(metrics)})"
    )
    return text + (f" where its teacher reaches {percent(teacher.top1)}." if teacher else ".")


def _points(teacher: float, student: float) -> str:
    difference = student - teacher
    digits = 1 if abs(difference) >= 0.05 else 2
    return "equal" if not round(difference, 2) else f"{signed(difference, digits)} points"


def result_rows(metrics: Metrics, corruptions: bool = True) -> list[Row]:
    """Return accuracy, under `corruptions` too, calibration and agreement of teacher and student."""
    teacher = metrics.teacher
    rows = [_compare_percent("Top-1 accuracy", getattr(teacher, "top1", None), metrics.top1)]
    rows.append(
        Row(f"95{NARROW}% Wilson interval", interval_text(teacher) if teacher else ABSENT, interval_text(metrics), "")
    )
    of_all, own_of_all = getattr(teacher, "top1_all_classes", None), metrics.top1_all_classes
    if of_all is not None or own_of_all is not None:
        shown = [ABSENT if top1 is None else percent(top1) for top1 in (of_all, own_of_all)]
        rows.append(Row("… asked for one of all classes that it knows", shown[0], shown[1], ""))
    if metrics.top1_subset is not None and metrics.top1_all_classes is None:
        name = "Top-1 among the dataset's classes"
        rows.append(_compare_percent(name, getattr(teacher, "top1_subset", None), metrics.top1_subset))
    top5 = getattr(teacher, "top5", None)
    if metrics.top5 < 100 or (top5 is not None and top5 < 100):  # as it is wherever there are five classes or fewer
        rows.append(_compare_percent("Top-5 accuracy", top5, metrics.top5))
    for name, own, other in (
        ("Cross-entropy", metrics.loss, getattr(teacher, "loss", None)),
        ("Expected calibration error (ECE)", metrics.ece, getattr(teacher, "ece", None)),
    ):
        change = signed(own - other, 3) if other is not None else ABSENT
        rows.append(Row(name, ABSENT if other is None else f"{other:.3f}", f"{own:.3f}", change))
    if corruptions and metrics.robustness:
        rows += _robustness_rows(metrics.robustness, getattr(teacher, "robustness", None))
    if metrics.agreement is not None:
        rows.append(Row("Same answer as the teacher", "", percent(metrics.agreement), ""))
    if metrics.teacher_kl is not None:
        rows.append(Row("KL divergence from the teacher", "", f"{metrics.teacher_kl:.3f} nats", ""))
    return rows


def _robustness_rows(student: Robustness, teacher: Robustness | None) -> list[Row]:
    """Return accuracy under corruption, the mean and each kind's."""
    name = f"Top-1 under corruption (mean; {count(student.n)} images each)"
    others = corruption_rows(teacher) if teacher else {}
    means = [(f"… {kind}", others.get(kind, [None])[-1], top1[-1]) for kind, top1 in corruption_rows(student).items()]
    return [_compare_percent(*row) for row in ((name, getattr(teacher, "top1", None), student.top1), *means)]


def corruption_rows(robustness: Robustness) -> dict[str, list[float]]:
    """Return, for each kind of corruption in words, top-1 at each severity and their mean."""
    return {kind.replace("_", " "): [*top1, statistics.fmean(top1)] for kind, top1 in robustness.kinds.items()}


def _compare_percent(name: str, teacher: float | None, student: float) -> Row:
    if teacher is None:
        return Row(name, ABSENT, percent(student), ABSENT)
    return Row(name, percent(teacher), percent(student), _points(teacher, student))


def size_rows(student: Sizes, teacher: Sizes | None = None) -> list[Row]:
    """Return size, computation and latency of teacher and student."""
    rows = []
    for name, key, show in (
        ("Parameters", "num_parameters", count),
        ("Multiply-accumulates per image", "macs", large),
        ("Weights as float32", "size_mb", lambda value: f"{three_digits(value)}{NARROW}MB"),
    ):
        own, other = getattr(student, key), getattr(teacher, key, None)
        if own is not None:
            rows.append(_compare_size(name, other, own, show, "smaller" if key != "macs" else "fewer"))
    for key, name in (("batch_1", "Latency, one image"), ("batch_64", "Latency, batch of 64")):
        times, others = student.latency_ms.get(key), teacher.latency_ms.get(key) if teacher else None
        if times:
            change = factor(others.median, times.median, "faster") if others else ABSENT
            rows.append(Row(name, _latency(others), _latency(times), change))
    return rows


def export_rows(metrics: Metrics | None) -> list[tuple[str, ...]]:
    """Return file, size, top-1, same answers, latency and a word on it of each file that a student was exported to."""
    return [
        (
            file.file,
            f"{three_digits(file.size_mb)}{NARROW}MB",
            ABSENT if file.top1 is None else percent(file.top1, 2),
            percent(file.agreement, 2),
            f"{three_digits(file.latency_ms)}{NARROW}ms",
            _word(file),
        )
        for file in (metrics.exports if metrics else ())
    ]


def _word(file: ExportSummary) -> str:
    if file.recommended:
        return "take this one"
    return "lost too much" if file.passed is False else "" if file.is_within_budget else "over the budget"


def export_note(metrics: Metrics | None) -> str:
    """Say what the numbers of the exported files are of; empty where there are none."""
    if not metrics or not metrics.exports:
        return ""
    return (
        f"Top-1 is that of the exported file on the {count(metrics.n)} test images, beside the share of them on "
        f"which it answers as the PyTorch model does; median latency of one image in "
        f"{metrics.exports[0].runtime}, files in turn."
    )


def _compare_size(name: str, teacher: float | None, student: float, show: Any, better: str) -> Row:
    if teacher is None:
        return Row(name, ABSENT, show(student), ABSENT)
    return Row(name, show(teacher), show(student), factor(teacher, student, better))


def factor(teacher: float, student: float, better: str) -> str:
    """Return what one number is of another: the factor with `better` or its opposite, "equal", or a dash.

    Args:
        teacher: 0 where it is not known.
        student: likewise.
        better: "smaller", "fewer" or "faster".
    """
    if not teacher or not student:
        return ABSENT
    worse = {"smaller": "larger", "fewer": "more", "faster": "slower"}[better]
    if 0.995 < teacher / student < 1.005:
        return "equal"
    return f"{ratio(teacher / student)} {better}" if teacher > student else f"{ratio(student / teacher)} {worse}"


def _latency(times: Timing | None) -> str:
    if not times:
        return ABSENT
    digits = 2 if times.median < 10 else 1 if times.median < 100 else 0
    return f"{times.median:.{digits}f}{NARROW}ms (p90\u00a0{times.p90:.{digits}f})"


def flat_rows(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return the leaves of nested settings as (dotted name, text)."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            rows.extend(flat_rows(value, f"{prefix}{key}."))
        else:
            rows.append((f"{prefix}{key}", plain(value)))
    return rows


def plain(value: Any) -> str:
    """Return a setting as a reader would write it."""
    if value is None or value == "" or value == {} or value == []:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple) and len(value) > MOST_ITEMS:
        return f"{', '.join(plain(item) for item in value[:MOST_ITEMS])}, … ({count(len(value))} in all)"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return str(value)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return (true class, predicted class) counts."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def confused_pairs(matrix: np.ndarray, class_names: Sequence[str], limit: int = 15) -> list[tuple[str, str, str, str]]:
    """Return (true, predicted, count, share of the true class) of the most frequent mistakes."""
    mistakes = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:limit]
    pairs = []
    for true, predicted in zip(*np.unravel_index(order, matrix.shape), strict=True):
        number = mistakes[true, predicted]
        if number:
            share = percent(100 * number / matrix[true].sum(), 0)
            pairs.append((class_names[true], class_names[predicted], count(number), share))
    return pairs
