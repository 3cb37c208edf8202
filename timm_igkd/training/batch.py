"""What a training step is given, and what gives it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from timm_igkd.errors import InputError
from timm_igkd.random_streams import generator


@dataclass(frozen=True)
class Batch:
    """One training batch on the device.

    Attributes:
        student: [B, 3, H, W] float32, normalised.
        teacher: [B, 3, H, W] float32, the same images' other view under the same crop and flip, or None: one view.
        labels: [B] int64, UNLABELED (data/labels.py) where there is none, or [B, classes] float32 of Mixup and CutMix.
        logits: [B, classes] float32, stored teacher logits of the clean images, or None.
        maps: [B, 1, H, W] float32 in [0, 1], each image's map in the coordinates of its view, for a loss that compares
            attributions; None where the maker of the batches was not asked for them.
    """

    student: Tensor
    teacher: Tensor | None
    labels: Tensor
    logits: Tensor | None = None
    maps: Tensor | None = None


class Batches(Protocol):
    """Makes the batches of every epoch; what it makes depends on the seed and the epoch alone."""

    batch_size: int

    def __len__(self) -> int:
        """Return the steps of an epoch, as many in every process."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of one epoch for this process."""


def steps_per_epoch(num_images: int, batch_size: int, num_processes: int, max_steps: int | None = None) -> int:
    """Return the whole steps of an epoch; images that fill no step are left out of it.

    Raises:
        InputError: there are fewer images than a step needs.
    """
    images_per_step = batch_size * num_processes
    if num_images < images_per_step:
        raise InputError(
            f"a step needs {images_per_step} images (batch_size {batch_size}, processes {num_processes}), there are "
            f"{num_images} to train on; lower batch_size"
        )
    steps = num_images // images_per_step
    return steps if max_steps is None else min(steps, max_steps)


def epoch_order(
    num_images: int, batch_size: int, steps: int, seed: int, epoch: int, process_index: int = 0, num_processes: int = 1
) -> np.ndarray:
    """Return the images of one process in one epoch, [steps * batch_size] int64.

    One permutation per (seed, epoch), whoever makes the batches; the processes take its batches in turn.
    """
    order = generator(seed, "order", epoch).permutation(num_images)[: steps * num_processes * batch_size]
    return order.reshape(steps, num_processes, batch_size)[:, process_index].reshape(-1)
