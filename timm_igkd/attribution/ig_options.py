"""Which attribution is computed; imports nothing heavy, for the command line reads its defaults here."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from timm_igkd.errors import InputError, check_choice, check_count, check_number

Method = Literal["ig", "input_x_gradient", "saliency", "grad_cam", "none"]
Baseline = Literal["mean", "black", "blur", "noise"]
Target = Literal["label", "predicted"]
Output = Literal["logit", "probability"]
Reduction = Literal["abs_sum", "sum", "positive"]
Dtype = Literal["float32", "bfloat16"]

METHOD_NAMES: dict[Method, str] = {
    "ig": "integrated-gradients",
    "input_x_gradient": "input-times-gradient",
    "saliency": "saliency",
    "grad_cam": "Grad-CAM",
    "none": "no",
}
"""Each method in words that stand before "maps"."""

METHOD_PAPERS: dict[Method, str | None] = {
    "ig": "1703.01365",
    "input_x_gradient": "1605.01713",
    "saliency": "1312.6034",
    "grad_cam": "1610.02391",
    "none": None,
}
"""Each method's paper, by its number on arXiv; see `IGOptions`."""

MOST_STEPS = 10_000
"""More would not be seen in 8 bits, and the nodes of a rule of n steps are the eigenvalues of an n x n matrix."""

OF_AUTO = ("max_steps", "tolerance")
"""Options that n_steps "auto" alone uses."""

_OF_A_PATH = ("n_steps", "max_steps", "tolerance", "baseline")
_OF_A_MAP = (*_OF_A_PATH, "target", "output", "reduction")
_CHOICES = {"method": Method, "baseline": Baseline, "target": Target, "output": Output, "reduction": Reduction}


def _per_method() -> Any:
    """Return the default of an option that depends on the method; `__post_init__` puts a value in its place."""
    return None


@dataclass(frozen=True)
class IGOptions:
    """Which attribution is computed; integrated gradients unless another method is named.

    Attributes:
        method: "ig": integrated gradients (the paper's). "input_x_gradient": the input times its gradient. "saliency":
            the gradient. "grad_cam": the teacher's last feature map weighted by its gradient (grad_cam.py). These
            three take one gradient per image; they have no path and promise no sum. "none": no maps, for a store of
            the teacher's logits alone, which uses none of the options below.
        n_steps: nodes of the Gauss-Legendre rule, or "auto": placed and stopped per image by its error
            (adaptive_path.py). Default: 50; 1 where the method has no path, 0 where it makes no maps.
        max_steps: most nodes per image with "auto"; images that reach it are marked as not converged.
        tolerance: with "auto", the least estimated correlation of the map with its limit, in (0, 1).
        baseline: start of the path. "mean": the teacher's mean colour, 0 after normalisation (the paper's, captum's
            default); "black"; "blur": the image itself, blurred; "noise": uniform noise from the image's pixels' hash.
        target: "label" (the paper's) or the teacher's "predicted" class.
        output: "logit" (the paper's) or softmax "probability" of the target.
        reduction: over colour channels. "abs_sum": sum of absolute values (the paper's); "sum": signed; "positive":
            the sum's positive part. Default: "abs_sum"; "positive" for Grad-CAM, whose maps have one channel.

    Numbers of numpy's are taken and kept as Python's, which is what JSON holds.

    Raises:
        InputError: a value out of range, or an option that the method does not use. InputTypeError: no number.

    Source: Sundararajan et al. 2017 (1703.01365); settings of arXiv 2506.14440. Input times gradient: Shrikumar et al.
    2016 (1605.01713). Saliency: Simonyan et al. 2013 (1312.6034). Grad-CAM: Selvaraju et al. 2017 (1610.02391).
    """

    method: Method = "ig"
    n_steps: int | Literal["auto"] = _per_method()
    max_steps: int = 64
    tolerance: float = 0.99
    baseline: Baseline = "mean"
    target: Target = "label"
    output: Output = "logit"
    reduction: Reduction = _per_method()

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        per_method = {
            "n_steps": default_steps(self.method),
            "reduction": default_reduction(self.method),
        }
        for name, value in per_method.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, kind in _CHOICES.items():
            check_choice(name, getattr(self, name), get_args(kind))
        if self.method != "ig":
            defaults = {field.name: field.default for field in fields(self)} | per_method
            check_used(self.method, {name: v for name, v in vars(self).items() if v != defaults[name]})
        if self.method == "grad_cam" and self.reduction == "abs_sum":
            raise InputError(
                "reduction of grad_cam must be 'positive' (as published) or 'sum' (signed), got 'abs_sum'; leave the "
                "reduction out for the first"
            )
        if self.n_steps != "auto":
            if not hasattr(self.n_steps, "__index__") or isinstance(self.n_steps, bool):
                raise InputError(f"n_steps must be a whole number or 'auto', got {self.n_steps!r}")
            least = min(1, default_steps(self.method))
            object.__setattr__(self, "n_steps", check_count("n_steps", self.n_steps, least, MOST_STEPS))
        object.__setattr__(self, "max_steps", check_count("max_steps", self.max_steps, 2, MOST_STEPS))
        check_number("tolerance", self.tolerance)
        object.__setattr__(self, "tolerance", float(self.tolerance))
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance is a map correlation and must be between 0 and 1, got {self.tolerance:g}")

    @property
    def signed(self) -> bool:
        """Whether the maps have a sign."""
        return self.reduction == "sum"

    @property
    def used(self) -> dict[str, Any]:
        """The options that the method uses, by name."""
        of_path = () if self.n_steps == "auto" else OF_AUTO
        unused = {"ig": of_path, "none": _OF_A_MAP}.get(self.method, _OF_A_PATH)
        return {name: value for name, value in vars(self).items() if name not in unused}

    @property
    def has_maps(self) -> bool:
        """Whether there are maps; else a store holds logits alone."""
        return self.method != "none"

    @property
    def content(self) -> str:
        """What a store of them holds, in words."""
        return f"{METHOD_NAMES[self.method]} maps" if self.has_maps else "logits"

    @property
    def needs_labels(self) -> bool:
        """Whether an image's label decides what is computed of it."""
        return self.has_maps and self.target == "label"


def default_steps(method: Method) -> int:
    """Return how many gradients a method takes of an image, where that is not asked for."""
    return {"ig": 50, "none": 0}.get(method, 1)


def default_reduction(method: Method) -> Reduction:
    """Return how the colour channels of a method's maps are joined, where that is not asked for."""
    return "positive" if method == "grad_cam" else "abs_sum"  # Grad-CAM as published


def check_used(method: Method, given: Mapping[str, Any]) -> None:
    """Raise InputError where options were given, by name, that the method does not use, or not with its steps."""
    for name in given:
        if name in OF_AUTO and method == "ig" and given.get("n_steps") != "auto":
            raise InputError(
                f"{name} is of n_steps 'auto', these are {given.get('n_steps', default_steps(method))}; "
                "leave it out, or take --n-steps auto"
            )
        if method == "none" and name in _OF_A_MAP:
            raise InputError(f"{name} is of maps, method 'none' makes none; leave it out")
        if method != "ig" and name in _OF_A_PATH:
            raise InputError(f"{name} is of the path of method 'ig', {method!r} has none; leave it out")
