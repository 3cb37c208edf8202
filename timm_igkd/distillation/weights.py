"""What each term of the loss counts; one weight given alone decides the other, as in timm's tasks."""

import math
from typing import NamedTuple

from timm_igkd.errors import InputError, check_number

PAPER_DISTILL_WEIGHT = 0.01


class Weights(NamedTuple):
    """Of cross-entropy, distillation, attention transfer and explanations; 0 switches a term off."""

    task: float
    distill: float
    attention: float
    explanation: float


def check_weight(name: str, weight: float) -> float:
    """Return the weight of a term; an InputError unless it is finite and at least 0."""
    check_number(name, weight)
    if not 0 <= weight < math.inf:
        raise InputError(f"{name} must be finite and at least 0, got {weight:g}; 0 switches the term off")
    return weight


def check_built(name: str, weight: float, is_built: bool) -> None:
    """Raise InputError where a weight was raised from 0 in a task that was built without its term."""
    if weight > 0 and not is_built:
        raise InputError(
            f"{name} is {weight:g} in a task that was built with 0, without the term; build the task with a weight "
            "above 0"
        )


def resolve_weights(task: float | None, distill: float | None, attention: float, explanation: float) -> Weights:
    """Return all weights.

    Args:
        task: of cross-entropy; None: 1 - distill, the paper's form (timm's tasks take 1).
        distill: of distillation; None: 1 - task where that is given, as in timm's tasks (0 for a task above 1), else
            the paper's 0.01.
        attention: of attention transfer.
        explanation: of the explanation loss.

    Raises:
        InputError: a weight that is negative or not finite, or all 0.
    """
    if distill is None:
        distill = PAPER_DISTILL_WEIGHT if task is None else max(0.0, 1 - check_weight("task_loss_weight", task))
    check_weight("distill_loss_weight", distill)
    check_weight("attention_loss_weight", attention)
    check_weight("explanation_loss_weight", explanation)
    if task is None:
        if distill > 1:
            raise InputError(
                "task_loss_weight defaults to 1 - distill_loss_weight, which must not be negative, got "
                f"distill_loss_weight={distill:g}; give task_loss_weight"
            )
        task = 1 - distill
    check_weight("task_loss_weight", task)
    if task + distill + attention + explanation == 0:
        raise InputError("at least one loss weight must be positive, got 0 for all; set task_loss_weight=1")
    return Weights(task, distill, attention, explanation)
