"""What comes with a batch beside its views: stored logits and maps, held against what a task's terms call for."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_igkd.distillation.labeled_loss import LabeledCrossEntropy
from timm_igkd.distillation.live_teacher import check_has_classifier
from timm_igkd.distillation.losses import is_soft
from timm_igkd.errors import InputError, InputTypeError, check_indices, check_kind
from timm_igkd.eval_mode import bare_model


def check_stored_logits(
    teacher_logits: Tensor | None, target: Tensor, *, distill_loss_weight: float, is_live: bool, transfers: bool
) -> None:
    """Raise InputError unless the teacher's logits come from one place, which knows these very images.

    Args:
        teacher_logits: stored ones, or None.
        target: of the batch.
        distill_loss_weight: of the task.
        is_live: whether a teacher runs in the loop.
        transfers: whether attention is transferred.
    """
    if teacher_logits is None:
        if distill_loss_weight > 0 and not is_live:
            raise InputError(
                f"distill_loss_weight={distill_loss_weight:g} needs a teacher, got neither a live one nor "
                "stored logits; pass teacher or teacher_logits, or set distill_loss_weight=0"
            )
    elif transfers:
        raise InputError(
            "attention transfer needs the live teacher's features of this very view, got stored logits; leave "
            "teacher_logits out, or set attention_loss_weight=0"
        )
    elif is_live:
        raise InputError(
            "the teacher's logits must come from one source, got a live teacher and stored logits; build the task "
            "with teacher=None, or leave teacher_logits out"
        )
    elif is_soft(target):
        raise InputError(
            "stored logits belong to single clean images, got the soft targets of Mixup or CutMix; switch those "
            "off, or use a live teacher"
        )


def check_maps(maps: Tensor | None, input: Tensor, target: Tensor) -> None:
    """Raise InputError unless there is a map for each image that a student is to explain, and one class."""
    if maps is None:
        raise InputError(
            "the explanation loss needs the teacher's maps of the views, got none; pass maps, (B, 1, H, W), or set "
            "explanation_loss_weight=0"
        )
    if maps.ndim != 4 or maps.shape[:2] != (len(input), 1):
        raise InputError(
            f"maps must hold one map per image of input, ({len(input)}, 1, H, W), got {tuple(maps.shape)}; make both "
            "from the same batch"
        )
    if is_soft(target):
        raise InputError(
            "the explanation loss explains one class per image, got the soft targets of Mixup or CutMix; switch those "
            "off, or set explanation_loss_weight=0"
        )


def check_labels(loss_type: str, criterion: Any) -> None:
    """Raise InputError for a distillation loss that needs labels beside a task loss that some images have none for."""
    if loss_type == "dkd" and isinstance(criterion, LabeledCrossEntropy):
        raise InputError("loss_type 'dkd' needs the label of every image, some have none here; use 'kl'")


def check_criterion(criterion: Any) -> Any:
    """Return a task loss, None for the default; an InputTypeError where it is none."""
    if criterion is not None:
        remedy = "give one, such as torch.nn.CrossEntropyLoss()"
        check_kind("criterion", criterion, Callable, "a loss module", remedy)
        if isinstance(criterion, type):
            raise InputTypeError(f"criterion must be a loss module, got the class {criterion.__name__}; {remedy}")
    return criterion


def resolve_class_index(indices: Sequence[int] | None, student: nn.Module, teacher: nn.Module | None) -> Tensor | None:
    """Return the checked indices of the teacher's outputs for the student's classes."""
    classes: int | None = getattr(bare_model(student), "num_classes", None)
    teacher_classes: int | None = None if teacher is None else getattr(bare_model(teacher), "num_classes", None)
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None:
            check_has_classifier(model, role)
    if indices is None:
        if classes is not None and teacher_classes is not None and classes != teacher_classes:
            raise InputError(
                f"student and teacher must have the same classes, got {classes} and {teacher_classes}; name the "
                "teacher's outputs for the student's classes with teacher_class_indices"
            )
        return None
    index = check_indices("teacher_class_indices", indices)
    if classes is not None and len(index) != classes:
        raise InputError(
            f"teacher_class_indices must name one teacher output per class of the student ({classes}), got "
            f"{len(index)}; list them in the order of the student's classes"
        )
    limit = math.inf if teacher_classes is None else teacher_classes
    if not index or len(set(index)) != len(index) or min(index) < 0 or max(index) >= limit:
        raise InputError(
            f"teacher_class_indices must be different outputs of the teacher (0 to {limit - 1}), got {index}; "
            "count from 0 and name each once"
        )
    return torch.tensor(index)


def select_classes(teacher_logits: Tensor, index: Tensor | None, last: int) -> Tensor:
    """Return the teacher's outputs for the student's classes.

    Args:
        teacher_logits: (B, outputs).
        index: as `resolve_class_index` returns it.
        last: its largest entry, which is known without asking the device.
    """
    if index is None:
        return teacher_logits
    if teacher_logits.shape[1] <= last:
        raise InputError(
            f"teacher_class_indices go up to {last}, got {teacher_logits.shape[1]} teacher outputs; "
            "leave teacher_class_indices out where the logits hold the dataset's classes alone"
        )
    return teacher_logits.index_select(1, index)
