"""Mixup and CutMix with one draw for the student's and the teacher's view."""

from typing import Any

from timm.data import Mixup
from torch import Tensor

from timm_igkd.errors import InputError, check_whole
from timm_igkd.random_streams import derive_seed, seeded


class TwoViewMixup:
    """timm's Mixup with lambda, box and partner drawn once per batch from their own stream.

    Without indices of the stream each call draws anew, as timm's Mixup does, from the seed and the number of the call.

    Args:
        seed: of the run; of several processes without indices, one for each.
        **mixup_args: timm's: mixup_alpha, cutmix_alpha, cutmix_minmax, prob, switch_prob, mode, label_smoothing,
            num_classes.
    """

    def __init__(self, seed: int = 0, **mixup_args: Any):
        self.seed, self.mixup = check_whole("seed", seed), Mixup(**mixup_args)
        self._calls = 0  # without indices

    def __call__(
        self, student: Tensor, teacher: Tensor | None, target: Tensor, *stream: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Mix a batch.

        Args:
            student: [B, 3, H, W], B even.
            teacher: the same images' other view, or None.
            target: [B] int64.
            stream: indices of the draw, for example (epoch, batch), which a resumed training repeats.

        Returns:
            Mixed views and soft targets [B, classes].

        Raises:
            InputError: views of two sizes: a box in pixels would be another part of each.
        """
        if teacher is not None and teacher.shape[-2:] != student.shape[-2:]:
            raise InputError(
                f"both views must have one size to be mixed alike, got {tuple(student.shape[-2:])} and "
                f"{tuple(teacher.shape[-2:])}; make both of the student's, a live teacher resizes by itself"
            )
        seed = derive_seed(self.seed, "mixup", *stream) if stream else self._next_seed()
        mixed_teacher = None
        if teacher is not None:
            with seeded(seed):
                mixed_teacher, _ = self.mixup(teacher.clone(), target)
        with seeded(seed):
            mixed_student, mixed_target = self.mixup(student.clone(), target)
        return mixed_student, mixed_teacher, mixed_target

    def _next_seed(self) -> int:
        self._calls += 1
        return derive_seed(self.seed, "mixup without indices", self._calls)
