"""Was it worth it? The comparison of a run's students, in words."""

import statistics

from timm_igkd.evaluation.comparison import ArmName, ArmResult, Comparison, Difference
from timm_igkd.report.tables import NARROW, count, duration, percent, signed

_ARMS: dict[ArmName, str] = {
    "alone": "the student alone",
    "kd": "{}",
    "kd_overlay": "{} + overlay",
    "kd_longer": "{} for as many more epochs as the maps cost",
}


def verdict(comparison: Comparison | None) -> list[str]:
    """Return one sentence for each difference, and one on what they are about; none without a comparison."""
    if comparison is None or not comparison.differences:
        return []
    seeds = num_seeds(comparison)
    scope = (
        f"From {seeds} seeds, this is about the method with this teacher on these images; the intervals are not "
        "adjusted for the number of differences."
        if seeds > 1
        else "One seed compares only these students; for a statement about the method, add --seeds 3 or more."
    )
    if comparison.num_unlabeled:
        scope += f" All but the student alone also learnt from {count(comparison.num_unlabeled)} images without labels."
    return [*(_sentence(difference, comparison.teaching) for difference in comparison.differences), scope]


def num_seeds(comparison: Comparison | None) -> int:
    """Return how many seeds were compared; 1 without a comparison."""
    return len({result.seed for result in comparison.students}) if comparison else 1


def _sentence(difference: Difference, teaching: str) -> str:
    names = " against ".join(_ARMS[arm].format(teaching) for arm in (difference.arm, difference.baseline))
    over = "test images" if difference.over == "images" else "seeds"
    if difference.low is None or difference.high is None:
        points = signed(difference.points)
        return f"{names}: {points} points of top-1, the same in all {count(difference.n)} seeds, so without interval."
    digits = _digits(difference.points, difference.low, difference.high) if difference.is_shown else 1
    ends = f"{signed(difference.low, digits)} to {signed(difference.high, digits)}"
    interval = f"95{NARROW}% interval {ends}, paired over {count(difference.n)} {over}"
    if not difference.is_shown:
        return f"{names}: no difference shown ({signed(difference.points, digits)} points of top-1; {interval})."
    better = "better" if difference.points > 0 else "worse"
    return f"{names}: {better} by {abs(difference.points):.{digits}f} points of top-1 ({interval})."


def _digits(*points: float) -> int:
    """Return how many digits it takes, from one on, that none of these reads as 0."""
    return next((digits for digits in range(1, 6) if all(round(value, digits) for value in points)), 6)


def arm_rows(comparison: Comparison | None) -> list[tuple[str, str, str, str, str]]:
    """Return of each arm its name, epochs, top-1, agreement with the teacher and seconds of training."""
    if comparison is None:
        return []
    by_arm: dict[ArmName, list[ArmResult]] = {}
    for result in comparison.students:
        by_arm.setdefault(result.arm, []).append(result)
    return [
        (
            _ARMS[arm].format(comparison.teaching),
            count(results[0].epochs),
            _mean([result.top1 for result in results]),
            percent(statistics.fmean(result.agreement for result in results)),
            duration(statistics.fmean(result.wall_time_s for result in results)),
        )
        for arm, results in by_arm.items()
    ]


def _mean(top1: list[float]) -> str:
    spread = f" (sd {statistics.stdev(top1):.2f}, n = {len(top1)})" if len(top1) > 1 else ""
    return percent(statistics.fmean(top1)) + spread
