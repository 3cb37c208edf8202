"""Was it worth it? The students of one run against each other on the same test images, in numbers."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from timm_igkd.errors import InputError
from timm_igkd.intervals import Z_ONE_SIDED, Z_TWO_SIDED, mean_interval, wilson_interval

ArmName = Literal["alone", "kd", "kd_overlay", "kd_longer"]
_CONTRASTS: tuple[tuple[ArmName, ArmName], ...] = (("kd", "alone"), ("kd_overlay", "kd"), ("kd_overlay", "kd_longer"))


@dataclass(frozen=True)
class ArmResult:
    """One student of a comparison, on the test images.

    Attributes:
        arm: what it was trained with.
        seed: of its initial weights, order, crops and overlays.
        epochs: of its training.
        top1: percent.
        loss: cross-entropy in nats.
        ece: expected calibration error, in [0, 1].
        n: test images.
        agreement: percent of the teacher's answers that are its own.
        wall_time_s: of its training.
    """

    arm: ArmName
    seed: int
    epochs: int
    top1: float
    loss: float
    ece: float
    n: int
    agreement: float
    wall_time_s: float


@dataclass(frozen=True)
class Difference:
    """Top-1 of one arm minus that of another, in points.

    Attributes:
        arm: what is asked about.
        baseline: what it is held against.
        over: what the interval is over: test images, so that it speaks of these students, or seeds, so that it speaks
            of the method.
        n: how many of them.
        points: the difference.
        low: lower end of its 95 % interval; None where all seeds differ by the same.
        high: upper end, as low.
    """

    arm: ArmName
    baseline: ArmName
    over: Literal["images", "seeds"]
    n: int
    points: float
    low: float | None
    high: float | None

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Comparison:
    """What metrics.json holds as `arms`: the students, and the differences that were asked about.

    Attributes:
        students: one of each arm and seed.
        differences: of arms.
        teaching: what all but the student alone learn from the teacher, in words.
        num_unlabeled: images without labels that all but the student alone learn from.
    """

    students: tuple[ArmResult, ...]
    differences: tuple[Difference, ...]
    teaching: str = "KD"
    num_unlabeled: int = 0


def teaching_of(settings: Mapping[str, Any]) -> str:
    """Return what a run's students learn from the teacher by the losses that have a weight."""
    losses = {"distill": "KD", "attention": "attention transfer", "explanation": "the teacher's explanations"}
    return " + ".join(words for name, words in losses.items() if settings[f"{name}_loss_weight"] > 0)


def image_interval(right: np.ndarray, baseline_right: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the difference in top-1 of two models on the same images, in points.

    With n images, b that only the first model has right and c that only the second has:

        p = (b + 1) / (n + 2),  q = (c + 1) / (n + 2),  p - q -+ 1.96 sqrt((p + q - (p - q)^2) / (n + 2))

    It is the normal interval of the mean of the paired differences, with one more image lost and one more won, cut at
    100 points. Those two keep it honest where few images differ: it leaves out 0 from six that all differ one way, as
    McNemar's exact test does (below 49 images from five, below 7 from four); without them four would be enough.

    Args:
        right: (N,) bool, whether the first model's answers are right; N > 0.
        baseline_right: (N,) bool, the second model's on the same images.

    Source: D. Bonett and R. Price, Adjusted Wald confidence interval for a difference of binomial proportions based
        on paired data, J. Educ. Behav. Stat. 37 (2012).
    """
    if right.shape != baseline_right.shape or not len(right):
        raise InputError(f"two models are compared on the same images, got {right.shape} and {baseline_right.shape}")
    n = len(right) + 2
    won, lost = (np.sum(right & ~baseline_right) + 1) / n, (np.sum(~right & baseline_right) + 1) / n
    half = Z_TWO_SIDED * math.sqrt((won + lost - (won - lost) ** 2) / n)
    return 100 * max(-1.0, float(won - lost - half)), 100 * min(1.0, float(won - lost + half))


def largest_share(found: int, n: int) -> float:
    """Return the upper end of Wilson's one-sided 95 % interval of a share, in percent: of none of 600 it is 0.45."""
    return 100 * wilson_interval(found, n, Z_ONE_SIDED)[1]


def seed_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean difference over seeds: mean -+ t(n - 1) sd / sqrt(n), the paired t interval.

    Args:
        differences: of each seed, at least two.

    Returns:
        Its ends, or None where all differences are the same: no spread was seen, which is not to say there is none.
    """
    if len(set(differences)) == 1:
        return None
    found = mean_interval(differences)
    return found.low, found.high


def compare_arms(right: Mapping[tuple[ArmName, int], np.ndarray]) -> tuple[Difference, ...]:
    """Return KD minus the student alone, KD with overlay minus KD, and minus KD for longer, where those arms are.

    Args:
        right: (N,) bool of every (arm, seed): which test images it has right. With one seed the intervals are over
            images, with more over seeds.
    """
    arms, seeds = {arm for arm, _ in right}, sorted({seed for _, seed in right})
    found = []
    for arm, baseline in _CONTRASTS:
        if not {arm, baseline} <= arms:
            continue
        pairs = [(right[arm, seed], right[baseline, seed]) for seed in seeds]
        points = [100 * (int(first.sum()) - int(second.sum())) / len(first) for first, second in pairs]
        is_one = len(seeds) == 1
        low, high = (image_interval(*pairs[0]) if is_one else seed_interval(points)) or (None, None)
        n = len(pairs[0][0]) if is_one else len(seeds)
        over: Literal["images", "seeds"] = "images" if is_one else "seeds"
        found.append(Difference(arm, baseline, over, n, statistics.fmean(points), low, high))
    return tuple(found)
