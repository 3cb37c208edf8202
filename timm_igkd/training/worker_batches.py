"""Batches through timm's pipeline: images decoded, overlaid and transformed one by one in DataLoader workers."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils.data

from timm_igkd.distillation.mixup import TwoViewMixup
from timm_igkd.errors import InputError
from timm_igkd.overlay.dataset import IGOverlayDataset
from timm_igkd.training.batch import Batch, epoch_order, steps_per_epoch


class _Order(torch.utils.data.Sampler[int]):
    """The indices of one epoch; set before each."""

    def __init__(self) -> None:
        self.indices: list[int] = []

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class WorkerBatches:
    """Training batches of an `IGOverlayDataset`: any timm or torchvision transform, Mixup and CutMix.

    Args:
        dataset: with its transform set, and a seed; items are (views, label[, logits][, map]).
        batch_size: images per step and process; images that fill no step are left out of an epoch.
        seed: of order and Mixup; the dataset has its own.
        device: where the batches go.
        workers: processes that decode and transform; they change no number.
        max_steps: stop every epoch early.
        mixup: mixes every batch, both views alike.
        mean: per channel, of the normalisation of views that come as uint8 pixels; others are taken as they are.
        std: per channel, of the same.
        memory_format: of the views.
        process_index: which of `num_processes` this is; each takes its share of every epoch's order.
        num_processes: processes that train together.

    Raises:
        InputError: fewer images than a step needs, or maps of images that are mixed.
    """

    def __init__(
        self,
        dataset: IGOverlayDataset,
        batch_size: int,
        seed: int,
        device: torch.device,
        *,
        workers: int = 0,
        max_steps: int | None = None,
        mixup: TwoViewMixup | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        memory_format: torch.memory_format = torch.contiguous_format,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if mixup is not None and dataset.with_maps:
            raise InputError("Mixup and CutMix leave no map to an image; drop them, or with_maps of the dataset")
        self.dataset, self.batch_size, self.seed, self.device, self.mixup = dataset, batch_size, seed, device, mixup
        self.process_index, self.num_processes = process_index, num_processes
        self.memory_format = memory_format
        self._mean, self._std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
        self._white = torch.tensor(255.0, device=device)  # by a number, a GPU would multiply with its inverse
        self.steps = steps_per_epoch(len(dataset), batch_size, num_processes, max_steps)
        self._order = _Order()
        self._loader: Any = torch.utils.data.DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=self._order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # its base seed is drawn here, not from the stream of the training
        )

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of one epoch for this process."""
        self.dataset.set_epoch(epoch)
        shape = len(self.dataset), self.batch_size, self.steps
        self._order.indices = epoch_order(*shape, self.seed, epoch, self.process_index, self.num_processes).tolist()
        for step, (views, labels, *more) in enumerate(self._loader):
            student, teacher = views if isinstance(views, list) else (views, None)
            maps = more.pop() if self.dataset.with_maps else None
            batch = Batch(
                self._view(student),
                None if teacher is None else self._view(teacher),
                self._to_device(labels),
                self._to_device(more[0]) if more else None,
                None if maps is None else self._to_device(maps).float().div_(self._white),
            )
            yield batch if self.mixup is None else self._mixed(batch, self.mixup, epoch, step)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _view(self, images: torch.Tensor) -> torch.Tensor:
        images = self._to_device(images).contiguous(memory_format=self.memory_format)
        if images.dtype != torch.uint8:
            return images
        return images.float().div_(self._white).sub_(self._mean).div_(self._std)

    def _mixed(self, batch: Batch, mixup: TwoViewMixup, epoch: int, step: int) -> Batch:
        views = mixup(batch.student, batch.teacher, batch.labels, epoch, step, self.process_index)
        return Batch(*views, batch.logits)
