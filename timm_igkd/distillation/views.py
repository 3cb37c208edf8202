"""The two views of a batch: the student's, and the teacher's without the overlay. Nothing is guessed from targets."""

from collections.abc import Sequence

from torch import Tensor

from timm_igkd.distillation.losses import is_soft
from timm_igkd.errors import InputError

VIEW_LAYOUTS = ("pair", "flat")
Views = Tensor | Sequence[Tensor]


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


def split_flat(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return student's input, targets and teacher's input of a batch that holds both views, one after the other.

    Args:
        input: (2B, C, H, W): the student's views, then the teacher's, as timm's fast_collate lays out
            ((student, teacher), label) items.
        target: (2B,) class indices, repeated.

    Raises:
        InputError: a batch of another form, or soft targets: Mixup behind the loader mixes an image's two views apart.
    """
    if is_soft(target):
        raise InputError(
            "view_layout 'flat' needs class indices, got soft targets: Mixup and CutMix behind timm's loader mix the "
            "two views of an image with others; use view_layout='pair' with "
            "timm_igkd.distillation.mixup.TwoViewMixup, or set teacher_view='same'"
        )
    if len(input) % 2 or len(input) != len(target):
        raise InputError(
            "view_layout 'flat' needs a batch of the student's views, then the teacher's, with the targets repeated; "
            f"got {len(input)} images and {len(target)} targets; make the loader's items ((student view, teacher "
            "view), label), or set teacher_view='same'"
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


ONE_VIEW = (
    "teacher_view 'clean' needs two views of every image, got one tensor; give (student views, teacher views) as "
    "torch's default collate makes them of an IGOverlayDataset with teacher_view='clean', build the task with "
    "view_layout='flat' for the batches of timm's prefetcher, or set teacher_view='same'"
)
