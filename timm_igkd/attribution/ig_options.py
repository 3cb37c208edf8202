"""Which integrated gradients are computed; imports nothing heavy, for the command line reads its defaults here."""

from dataclasses import dataclass
from typing import Literal, get_args

from timm_igkd.errors import InputError, check_range, nearest

Baseline = Literal["mean", "black", "blur", "noise"]
Target = Literal["label", "predicted"]
Output = Literal["logit", "probability"]
Reduction = Literal["abs_sum", "sum", "positive"]
Dtype = Literal["float32", "bfloat16"]


MOST_STEPS = 10_000
"""More would not be seen in 8 bits, and the nodes of a rule of n steps are the eigenvalues of an n x n matrix."""


@dataclass(frozen=True)
class IGOptions:
    """Which integrated gradients are computed.

    Attributes:
        n_steps: nodes of the Gauss-Legendre rule, or "auto": placed and stopped per image by its error
            (adaptive_path.py).
        max_steps: most nodes per image with "auto"; images that reach it are marked as not converged.
        tolerance: with "auto", the least estimated correlation of the map with its limit, in (0, 1).
        baseline: start of the path. "mean": the teacher's mean colour, 0 after normalisation (the paper's, captum's
            default); "black"; "blur": the image itself, blurred; "noise": uniform noise from the image's pixels' hash.
        target: "label" (the paper's) or the teacher's "predicted" class.
        output: "logit" (the paper's) or softmax "probability" of the target.
        reduction: over colour channels. "abs_sum": sum of absolute values (the paper's); "sum": signed; "positive":
            the sum's positive part.

    Source: Sundararajan et al. 2017 (1703.01365); settings of arXiv 2506.14440.
    """

    n_steps: int | Literal["auto"] = 50
    max_steps: int = 64
    tolerance: float = 0.99
    baseline: Baseline = "mean"
    target: Target = "label"
    output: Output = "logit"
    reduction: Reduction = "abs_sum"

    def __post_init__(self) -> None:
        for name, kind in (("baseline", Baseline), ("target", Target), ("output", Output), ("reduction", Reduction)):
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise InputError(f"{name} must be one of {list(allowed)}, got {value!r}{nearest(str(value), allowed)}")
        if self.n_steps != "auto":
            if not isinstance(self.n_steps, int) or isinstance(self.n_steps, bool):
                raise InputError(f"n_steps must be a whole number or 'auto', got {self.n_steps!r}")
            check_range("n_steps", self.n_steps, 1, MOST_STEPS)
        check_range("max_steps", self.max_steps, 2, MOST_STEPS)
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance is a map correlation and must be between 0 and 1, got {self.tolerance:g}")

    @property
    def signed(self) -> bool:
        """Whether the maps have a sign."""
        return self.reduction == "sum"
