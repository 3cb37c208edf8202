"""Batches of a whole data set of small images that lies on the device: no worker, no copy, no decoding."""

from collections.abc import Iterator

import torch

from timm_igkd.errors import check_count
from timm_igkd.overlay.device_images import DeviceImages
from timm_igkd.overlay.device_views import DeviceAugmentation, DeviceViews
from timm_igkd.training.batch import Batch, epoch_order, steps_per_epoch

_BATCHES_AT_ONCE = {"cuda": 16, "cpu": 4}


class DeviceBatches:
    """Training batches of a dataset that lies on the device.

    Args:
        data: images, and maps where the overlay's probability is above 0.
        augmentation: what is done to them.
        batch_size: images per step and process; images that fill no step are left out of an epoch.
        seed: order, coins, crops, flips and squares all derive from it, in streams of their own.
        batches_at_once: batches that are augmented together, by default what suits the device; it changes speed and
            memory, no number.
        max_steps: stop every epoch early.
        with_maps: batches hold the images' maps in the coordinates of the views.
        memory_format: of the views; channels last costs no copy.
        process_index: which of `num_processes` this is; each takes its share of every epoch's order.
        num_processes: processes that train together.

    Raises:
        InputError: fewer images than a step needs, or no maps for the overlay or `with_maps`.
    """

    def __init__(
        self,
        data: DeviceImages,
        augmentation: DeviceAugmentation,
        batch_size: int,
        seed: int,
        batches_at_once: int | None = None,
        *,
        max_steps: int | None = None,
        with_maps: bool = False,
        memory_format: torch.memory_format = torch.channels_last,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        batch_size = check_count("batch_size", batch_size)
        self.steps = steps_per_epoch(len(data), batch_size, num_processes, max_steps)
        self.views = DeviceViews(data, augmentation, seed, with_maps=with_maps)
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.batches_at_once = batches_at_once or _BATCHES_AT_ONCE.get(data.labels.device.type, 1)
        self.with_maps, self.memory_format = with_maps, memory_format
        self.process_index, self.num_processes = process_index, num_processes

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of one epoch for this process."""
        draws = self.views.draws(epoch)
        order = epoch_order(
            len(self.data), self.batch_size, self.steps, self.seed, epoch, self.process_index, self.num_processes
        )
        on_device = torch.from_numpy(order).to(self.data.labels.device)
        for batches in on_device.split(self.batch_size * self.batches_at_once):
            drawn = draws.at(batches)
            student, teacher = self.views.views(batches, drawn)
            maps = self.views.maps(batches, drawn) if self.with_maps else None
            for start in range(0, len(batches), self.batch_size):
                part = slice(start, start + self.batch_size)
                index = batches[part]
                yield Batch(
                    student[part].contiguous(memory_format=self.memory_format),
                    None if teacher is None else teacher[part].contiguous(memory_format=self.memory_format),
                    self.data.labels[index],
                    None if self.data.logits is None else self.data.logits[index],
                    None if maps is None else maps[part],
                )
