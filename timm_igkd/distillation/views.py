"""The two views of a batch: the student's, and the teacher's without the overlay.

What a batch holds is said by whoever builds the task, never guessed; the first batch of each form is held against it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from timm_igkd.distillation.losses import is_soft
from timm_igkd.errors import InputError

VIEW_LAYOUTS = ("pair", "flat")
Views = Tensor | Sequence[Tensor]


class ViewReader:
    """Takes the student's and the teacher's input out of the batches of one task.

    Args:
        layout: of batches with two views, see `IGDistillationTask`.
        why_unseen: why the teacher does not look at a second view; "" where it does.
    """

    def __init__(self, layout: str, why_unseen: str):
        self.layout, self.why_unseen = layout, why_unseen
        self._has_checked = False

    def read(
        self, input: Views, target: Tensor, teacher_input: Tensor | None, training: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the student's input and targets, and the teacher's input.

        Raises:
            InputError: a batch that does not hold the views that the task was built for.
        """
        student, teacher = unpack_pair(input, teacher_input)
        if teacher is not None:
            check_teacher_input(student, teacher, self.why_unseen)
            return student, target, teacher
        if not training:
            return student, target, student
        is_first, self._has_checked = not self._has_checked, True  # once: it waits for the device
        if self.why_unseen:
            if is_first:
                _refuse_both_views(student, target)
            return student, target, student
        if self.layout == "flat":
            return split_flat(student, target, is_first)
        raise InputError(
            "teacher_view 'clean' needs two views of every image, got one tensor; give (student views, teacher views) "
            "as torch's default collate makes them of an IGOverlayDataset with teacher_view='clean', build the task "
            "with view_layout='flat' for the batches of timm's prefetcher, or set teacher_view='same'"
        )


def _refuse_both_views(input: Tensor, target: Tensor) -> None:
    """Refuse a batch that holds each image twice, as timm's prefetcher flattens two views: most have no overlay."""
    half = len(input) // 2
    if half < 2 or 2 * half != len(input) or is_soft(target) or not torch.equal(target[:half], target[half:]):
        return
    is_repeated = (input[:half] == input[half:]).flatten(1).all(1)
    if 2 * int(is_repeated.sum()) <= half:
        return
    # of one image in all places, a constant one for example, nothing follows: only an image that is there once counts
    _, which, counts = input[:half].flatten(1).unique(dim=0, return_inverse=True, return_counts=True)
    if 2 * int((is_repeated & (counts[which] == 1)).sum()) > half:
        raise InputError(
            "the batch holds each image twice, as timm's prefetcher lays out a dataset with teacher_view='clean'; "
            "build the task with teacher_view='clean' and view_layout='flat', or the dataset with teacher_view='same'"
        )


def unpack_pair(input: Views, teacher_input: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return student's and teacher's input of a batch, the second None where it came as one tensor.

    Raises:
        InputError: another number of views than two, or the teacher's given twice.
    """
    if isinstance(input, Tensor):
        return input, teacher_input
    if teacher_input is not None or len(input) != 2:
        raise InputError(
            f"two views are one pair (student's, teacher's), got {len(input)} parts"
            f"{' and teacher_input' if teacher_input is not None else ''}; give one or the other"
        )
    return input[0], input[1]


def split_flat(input: Tensor, target: Tensor, is_checked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return student's input, targets and teacher's input of a batch that holds both views, one after the other.

    Args:
        input: (2B, C, H, W): the student's views, then the teacher's, as timm's fast_collate lays out
            ((student, teacher), label) items.
        target: (2B,) class indices, repeated.
        is_checked: see that they are repeated, for which the device is waited for.

    Raises:
        InputError: a batch of another form, or soft targets: Mixup behind the loader mixes an image's two views apart.
    """
    if is_soft(target):
        raise InputError(
            "view_layout 'flat' needs class indices, got soft targets: Mixup and CutMix behind timm's loader mix the "
            "two views of an image with others; use view_layout='pair' with "
            "timm_igkd.distillation.mixup.TwoViewMixup, or set teacher_view='same'"
        )
    is_whole = len(input) % 2 == 0 and len(input) == len(target)
    if not is_whole or (is_checked and not torch.equal(*target.chunk(2))):
        other = " that are not repeated" if is_whole else ""
        raise InputError(
            "view_layout 'flat' needs a batch of the student's views, then the teacher's, with the targets repeated; "
            f"got {len(input)} images and {len(target)} targets{other}; make the loader's items ((student view, "
            "teacher view), label), or set teacher_view='same'"
        )
    student, teacher = input.chunk(2)
    return student, target[: len(student)], teacher


def check_teacher_input(input: Tensor, teacher_input: Tensor, why_unseen: str) -> None:
    """Refuse a second view that nobody would see, or that is not one of each image.

    Args:
        why_unseen: why the teacher does not look at a second view; "" where it does.
    """
    if why_unseen:
        raise InputError(
            f"a second view is for a live teacher with teacher_view='clean', but {why_unseen}; leave it out"
        )
    if len(teacher_input) != len(input):
        raise InputError(
            f"teacher_input must hold one view per image of input ({len(input)}), got {len(teacher_input)}; make both "
            "from the same batch"
        )
