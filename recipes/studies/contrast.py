"""A difference that a study names in advance, with all that is said of it."""

from typing import NamedTuple

from studies.statistics import NAN, Comparison, Equivalence

ALPHA = 0.05


class Contrast(NamedTuple):
    """Cell a minus cell b in one outcome; Holm's p is over the contrasts named in advance, for this outcome alone."""

    a: str
    b: str
    comparison: Comparison
    holm_p: float
    power: float
    needed: float
    strict_power: float = NAN  # at alpha over the number of contrasts, Holm's first step
    equivalence: Equivalence | None = None
    equivalence_holm_p: float = NAN
    wanted: float | None = None  # points that the power is told for

    @property
    def name(self) -> str:
        return f"{self.a} − {self.b}"

    @property
    def is_significant(self) -> bool:
        return self.holm_p < ALPHA

    @property
    def is_equivalent(self) -> bool:
        """Whether the difference is shown to be smaller than the smallest one of interest."""
        return self.equivalence is not None and self.equivalence_holm_p < ALPHA
