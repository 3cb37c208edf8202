"""What the sections of the report page show: samples, confusion, calibration and disagreements."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from timm_igkd.data.images import fit_image
from timm_igkd.data.items import read_item
from timm_igkd.errors import InputError
from timm_igkd.evaluation.calibration import reliability_bins
from timm_igkd.overlay.preview import Sample, sample_panels
from timm_igkd.report import tables
from timm_igkd.report.figures import data_uri, reliability_diagram
from timm_igkd.report.run_files import Predictions, read_predictions

MOST_MATRIX_CLASSES = 30
MOST_SHOWN = 12
"""Samples, and images on which student and teacher differ, of a run's page."""


@dataclass(frozen=True)
class Disagreement:
    """An image on which student and teacher give different classes; confidences are in [0, 1]."""

    image: Image.Image
    label: str
    student: str
    teacher: str
    student_confidence: float
    teacher_confidence: float


def collect_disagreements(run_dir: str | Path, dataset: Any, limit: int = MOST_SHOWN) -> list[Disagreement]:
    """Return the images on which a run's student and teacher differ, the surest student first.

    Args:
        run_dir: the run's folder, with predictions.npz.
        dataset: what it was evaluated on, in the same order: map-style, of (PIL image, label).
        limit: most images returned.

    Raises:
        InputError: the predictions are of another number of images.
    """
    predictions = read_predictions(Path(run_dir) / "predictions.npz")
    labels, class_names = predictions.labels, predictions.class_names
    if len(dataset) != len(labels):
        raise InputError(
            f"{run_dir} has predictions of {len(labels)} images, the dataset {len(dataset)}; evaluate it again"
        )
    if predictions.teacher_logits is None:
        return []
    student_logits, teacher_logits = predictions.student_logits, predictions.teacher_logits
    student, teacher = _softmax(student_logits), _softmax(teacher_logits)
    answers, teacher_answers = student.argmax(1), teacher.argmax(1)
    differing = np.flatnonzero(answers != teacher_answers)
    surest = differing[np.argsort(-student.max(1)[differing], kind="stable")][:limit]
    return [
        Disagreement(
            image=read_item(dataset, int(i))[0],
            label=class_names[int(labels[i])],
            student=class_names[answers[i]],
            teacher=class_names[teacher_answers[i]],
            student_confidence=float(student[i].max()),
            teacher_confidence=float(teacher[i].max()),
        )
        for i in surest
    ]


def sample_view(sample: Sample) -> dict[str, Any]:
    """Return a sample's label and its three pictures."""
    names = ("image", "map", "overlaid")
    return {
        "label": sample.label,
        "pixelated": max(sample.image.size) < 96,
        "panels": [(name, data_uri(panel)) for name, panel in zip(names, sample_panels(sample), strict=True)],
    }


def confusion_view(predictions: Predictions) -> dict[str, Any]:
    """Return the matrix for few classes, the most confused pairs for many."""
    names = predictions.class_names
    matrix = tables.confusion_matrix(predictions.labels, predictions.student_logits.argmax(1), len(names))
    mistakes = int(matrix.sum() - np.trace(matrix))
    view: dict[str, Any] = {
        "mistakes": tables.count(mistakes),
        "total": tables.count(matrix.sum()),
        "rows": [],
        "pairs": [],
    }
    if len(names) > MOST_MATRIX_CLASSES:
        view["pairs"] = tables.confused_pairs(matrix, names)
        return view
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    view["names"] = names
    view["rows"] = [
        (name, [(int(matrix[i, j]), f"{shares[i, j]:.3f}", i == j) for j in range(len(names))], _recall(matrix, i))
        for i, name in enumerate(names)
    ]
    return view


def _recall(matrix: np.ndarray, index: int) -> str:
    total = matrix[index].sum()
    return tables.percent(100 * matrix[index, index] / total, 0) if total else tables.ABSENT


def calibration_views(predictions: Predictions) -> list[dict[str, Any]]:
    """Return a reliability diagram and its reading for the student and, where there is one, the teacher."""
    views = []
    for role, logits in (("student", predictions.student_logits), ("teacher", predictions.teacher_logits)):
        if logits is None:
            continue
        probabilities = _softmax(logits)
        bins = reliability_bins(probabilities, predictions.labels)
        confidence = float(probabilities.max(axis=1).mean())
        accuracy = float((probabilities.argmax(axis=1) == predictions.labels).mean())
        gap = 100 * (confidence - accuracy)
        leaning = "over-confident" if gap > 0 else "under-confident"
        views.append(
            {
                "role": role,
                "svg": reliability_diagram(f"reliability-{role}", role, bins),
                "ece": f"{bins.expected_calibration_error:.3f}",
                "text": f"mean confidence {tables.percent(100 * confidence)}, "
                f"accuracy {tables.percent(100 * accuracy)}: "
                + (f"{leaning} by {abs(gap):.1f} points" if abs(gap) >= 0.05 else "no overall gap"),
            }
        )
    return views


def disagreement_view(predictions: Predictions, shown: Sequence[Disagreement]) -> dict[str, Any] | None:
    """Return who is right how often and the images to show, or None without a teacher."""
    if predictions.teacher_logits is None:
        return None
    student, teacher = predictions.student_logits.argmax(1), predictions.teacher_logits.argmax(1)
    right, teacher_right = student == predictions.labels, teacher == predictions.labels
    return {
        "total": tables.count((student != teacher).sum()),
        "both_right": tables.count((right & teacher_right).sum()),
        "only_student": tables.count((right & ~teacher_right).sum()),
        "only_teacher": tables.count((~right & teacher_right).sum()),
        "both_wrong": tables.count((~right & ~teacher_right).sum()),
        "items": [
            {
                "label": item.label,
                "uri": data_uri(fit_image(item.image.convert("RGB"))),
                "pixelated": max(item.image.size) < 96,
                "student": item.student,
                "teacher": item.teacher,
                "student_confidence": tables.percent(100 * item.student_confidence, 0),
                "teacher_confidence": tables.percent(100 * item.teacher_confidence, 0),
                "student_right": item.student == item.label,
                "teacher_right": item.teacher == item.label,
            }
            for item in shown
        ],
    }


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Return [N, classes] float64 probabilities."""
    return torch.from_numpy(logits).double().softmax(dim=1).numpy()
