"""Numbers of a run in words: the rows and sentences of the report page, as plain text that the template escapes."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from timm_igkd.export.record import read_summaries

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


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of `correct` out of `n`, as shares in [0, 1]."""
    share, spread = correct / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def percent(value: float, digits: int = 1) -> str:
    """Return a percentage (0 to 100) with its sign."""
    return f"{value:.{digits}f}{NARROW}%"


def count(value: float) -> str:
    """Return a whole number with its thousands apart."""
    return f"{round(value):,}"


def large(value: float) -> str:
    """Return a large number in millions, thousands or as it is, to three digits."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{NARROW}{unit}"
    return count(value)


def ratio(value: float) -> str:
    """Return a factor to about two digits, e.g. 5.9x, with a multiplication sign."""
    digits = 0 if value >= 20 else 1 if value >= 1.95 else 2
    return f"{value:.{digits}f}{TIMES}"


def duration(seconds: float) -> str:
    """Return seconds in the largest units that matter."""
    if seconds < 60:
        return f"{seconds:.1f}{NARROW}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NARROW}min {rest}{NARROW}s"
    return f"{minutes // 60}{NARROW}h {minutes % 60}{NARROW}min"


def label_counts(metrics: Mapping[str, Any]) -> str:
    """Return how many training images had a label, in words; empty where all had."""
    found = metrics.get("training_images")
    numbers = [found.get(name) for name in ("labeled", "unlabeled")] if isinstance(found, dict) else [None]
    if not all(isinstance(number, int) for number in numbers):
        return ""
    labeled, unlabeled = (count(number or 0) for number in numbers)
    return f"{labeled} labelled and {unlabeled} unlabelled images"


def correct_of(metrics: Mapping[str, Any]) -> int:
    """Return the number of correctly classified images."""
    return round(metrics["top1"] * metrics["n"] / 100)


def interval_text(metrics: Mapping[str, Any]) -> str:
    """Return the Wilson interval of the top-1 accuracy in percent."""
    low, high = wilson_interval(correct_of(metrics), metrics["n"])
    return f"{100 * low:.1f}{DASH}{percent(100 * high)}"


def summary_sentence(metrics: Mapping[str, Any]) -> str:
    """Return the result of a run in one sentence."""
    teacher, compression = metrics.get("teacher"), metrics.get("compression")
    if not teacher:
        subject = "The model"
    elif compression and compression >= 1.05:
        article = "An" if str(ratio(compression)).startswith(("8", "11.", "18")) else "A"
        subject = f"{article} {ratio(compression)} smaller student"
    else:
        subject = "A student of its teacher's size"
    text = (
        f"{subject} reaches {percent(metrics['top1'])} ({count(correct_of(metrics))} of {count(metrics['n'])} images; "
        f"95{NARROW}% Wilson interval {interval_text(metrics)})"
    )
    return text + (f" where its teacher reaches {percent(teacher['top1'])}." if teacher else ".")


def _points(teacher: float, student: float) -> str:
    difference = student - teacher
    return "equal" if abs(difference) < 0.05 else f"{difference:+.1f} points".replace("-", MINUS)


def result_rows(metrics: Mapping[str, Any], corruptions: bool = True) -> list[Row]:
    """Return accuracy, under `corruptions` too, calibration and agreement of teacher and student."""
    teacher = metrics.get("teacher") or {}
    rows = [_compare_percent("Top-1 accuracy", "top1", teacher, metrics)]
    rows.append(
        Row(f"95{NARROW}% Wilson interval", interval_text(teacher) if teacher else ABSENT, interval_text(metrics), "")
    )
    if "top1_subset" in metrics:
        rows.append(_compare_percent("Top-1 among the dataset's classes", "top1_subset", teacher, metrics))
    rows.append(_compare_percent("Top-5 accuracy", "top5", teacher, metrics))
    for name, key in (("Cross-entropy", "loss"), ("Expected calibration error (ECE)", "ece")):
        both = teacher.get(key)
        change = f"{metrics[key] - both:+.3f}".replace("-", MINUS) if both is not None else ABSENT
        rows.append(Row(name, ABSENT if both is None else f"{both:.3f}", f"{metrics[key]:.3f}", change))
    rows += _robustness_rows(metrics, teacher) if corruptions else []
    if "agreement" in metrics:
        rows.append(Row("Same answer as the teacher", "", percent(metrics["agreement"]), ""))
    if "teacher_kl" in metrics:
        rows.append(Row("KL divergence from the teacher", "", f"{metrics['teacher_kl']:.3f} nats", ""))
    return rows


def _robustness_rows(metrics: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[Row]:
    """Return accuracy under corruption, the mean and each kind's, where it was measured."""
    measured, other = metrics.get("robustness"), teacher.get("robustness") or {}
    if not measured:
        return []
    name = f"Top-1 under corruption (mean; {count(measured['n'])} images each)"
    rows = [_compare_percent(name, "top1", other, measured)]
    means = [{f"… {kind}": top1[-1] for kind, top1 in corruption_rows(side).items()} for side in (other, measured)]
    return rows + [_compare_percent(name, name, *means) for name in means[1]]


def corruption_rows(robustness: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return, for each kind of corruption in words, top-1 at each severity and their mean."""
    return {
        kind.replace("_", " "): [*top1, statistics.fmean(top1)] for kind, top1 in robustness.get("kinds", {}).items()
    }


def _compare_percent(name: str, key: str, teacher: Mapping[str, Any], student: Mapping[str, Any]) -> Row:
    if teacher.get(key) is None:
        return Row(name, ABSENT, percent(student[key]), ABSENT)
    return Row(name, percent(teacher[key]), percent(student[key]), _points(teacher[key], student[key]))


def size_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """Return size, computation and latency of teacher and student."""
    teacher = metrics.get("teacher") or {}
    rows = []
    for name, key, show in (
        ("Parameters", "num_parameters", count),
        ("Multiply-accumulates per image", "macs", large),
        ("Weights as float32", "size_mb", lambda value: f"{value:.3g}{NARROW}MB"),
    ):
        if metrics.get(key) is not None:
            rows.append(
                _compare_size(name, teacher.get(key), metrics[key], show, "smaller" if key != "macs" else "fewer")
            )
    for key, name in (("batch_1", "Latency, one image"), ("batch_64", "Latency, batch of 64")):
        times = [(side.get("latency_ms") or {}).get(key) for side in (teacher, metrics)]
        if times[1]:
            rows.append(
                Row(
                    name,
                    _latency(times[0]),
                    _latency(times[1]),
                    _factor(times[0]["median"], times[1]["median"], "faster") if times[0] else ABSENT,
                )
            )
    return rows


def export_rows(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return file, size, top-1, same answers, latency and a word on it of each file that a student was exported to."""
    return [
        (
            file.file,
            f"{file.size_mb:.3g}{NARROW}MB",
            ABSENT if file.top1 is None else percent(file.top1, 2),
            percent(file.agreement, 2),
            f"{file.latency_ms:.3g}{NARROW}ms",
            "take this one" if file.recommended else "" if file.passed else "lost too much",
        )
        for file in read_summaries(metrics)
    ]


def export_note(metrics: Mapping[str, Any]) -> str:
    """Say what the numbers of the exported files are of; empty where there are none."""
    files = read_summaries(metrics)
    if not files:
        return ""
    return (
        f"Top-1 is that of the exported file on the {count(metrics['n'])} test images, beside the share of them on "
        f"which it answers as the PyTorch model does; median latency of one image in {files[0].runtime}, files in turn."
    )


def _compare_size(name: str, teacher: float | None, student: float, show: Any, better: str) -> Row:
    if teacher is None:
        return Row(name, ABSENT, show(student), ABSENT)
    return Row(name, show(teacher), show(student), _factor(teacher, student, better))


def _factor(teacher: float, student: float, better: str) -> str:
    if not teacher or not student:
        return ABSENT
    worse = {"smaller": "larger", "fewer": "more", "faster": "slower"}[better]
    if 0.995 < teacher / student < 1.005:
        return "equal"
    return f"{ratio(teacher / student)} {better}" if teacher > student else f"{ratio(student / teacher)} {worse}"


def _latency(times: Mapping[str, float] | None) -> str:
    if not times:
        return ABSENT
    digits = 2 if times["median"] < 10 else 1 if times["median"] < 100 else 0
    return f"{times['median']:.{digits}f}{NARROW}ms (p90\u00a0{times['p90']:.{digits}f})"


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
