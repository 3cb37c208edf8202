"""Calibration: does the confidence of an answer say how often it is right?"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from timm_igkd.errors import InputError


@dataclass(frozen=True)
class ReliabilityBins:
    """Confidence against accuracy in equal-width bins; mean and accuracy of an empty bin are NaN."""

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Gap between confidence and accuracy, averaged over the images, in [0, 1] (ECE, arXiv 1706.04599)."""
        filled = self.counts > 0
        gaps = np.abs(self.confidence - self.accuracy)[filled]
        return float((gaps * self.counts[filled]).sum() / self.counts.sum())


def reliability_bins(probabilities: Any, labels: Any, bins: int = 15) -> ReliabilityBins:
    """Sort predictions by the confidence in the predicted class into `bins` bins (low, high].

    Args:
        probabilities: (N, C) array or tensor, rows sum to 1.
        labels: (N,) integers.
        bins: number of bins of equal width.
    """
    table, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if table.ndim != 2 or len(table) == 0 or truth.shape != table.shape[:1]:
        raise InputError(f"expected probabilities (N, C) and labels (N,), N > 0, got {table.shape} and {truth.shape}")
    confidence = table.max(axis=1)
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(which, minlength=bins)
    correct = (table.argmax(axis=1) == truth).astype(np.float64)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(which, weights=w, minlength=bins) / counts for w in (confidence, correct)]
    return ReliabilityBins(np.linspace(0, 1, bins + 1), counts, *means)
