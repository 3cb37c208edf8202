"""The overlay in a stream: timm's `wds/` and `hfids/` datasets, their training images overlaid with their own maps."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import IterableImageDataset

from timm_igkd.data.images import content_key
from timm_igkd.data.items import dataset_name
from timm_igkd.data.streams import StreamReader
from timm_igkd.distillation.options import TeacherViewMode
from timm_igkd.errors import InputTypeError
from timm_igkd.maps.store import MapStore
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.controls import OverlaySource
from timm_igkd.overlay.overlaid_views import OverlaidViews
from timm_igkd.random_streams import StreamIndices, restored_state

_AT_ONCE = 16  # to put the global generators aside costs as much as a tenth of reading an image


class IGOverlayStream(OverlaidViews, IterableImageDataset):
    """Overlay the images of timm's streaming dataset, between its reader and its transform; maps are found by content.

    The reader shuffles, divides shards among processes and workers and repeats images as it does without overlays.
    Coin, exponent and transform of an image come from (seed, epoch, content key, occurrence): how often it has come
    before in this epoch and process. For a script that never calls `set_epoch`, a worker goes on counting and its draws
    come from torch's seed of the pass it was started for, too, so that no pass repeats another.

    Args:
        dataset: timm's, from `create_dataset("wds/…" or "hfids/…")`, not iterated over yet.
        seed: of all draws.

    The other arguments, but for `with_maps`, and the attributes are `IGOverlayDataset`'s.
    """

    def __init__(
        self,
        dataset: IterableImageDataset,
        maps: MapStore | None,
        overlay: IGOverlay | None = None,
        *,
        teacher_view: TeacherViewMode = "same",
        overlay_source: OverlaySource = "aligned",
        seed: int = 0,
        with_logits: bool = False,
    ):
        if not isinstance(dataset, IterableImageDataset | OverlaidViews):
            raise InputTypeError(
                f"expected timm's IterableImageDataset, got a {type(dataset).__name__}; open the stream with "
                "timm.data.create_dataset (hfids/…, wds/…)"
            )
        OverlaidViews.__init__(self, dataset, maps, overlay, teacher_view, overlay_source, seed, with_logits)
        IterableImageDataset.__init__(self, root=None, reader=dataset.reader, target_transform=dataset.target_transform)
        self.name = dataset_name(dataset)
        self.images = StreamReader(self, self.name)
        self._indices = StreamIndices()
        self._is_told = torch.zeros((), dtype=torch.bool).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._is_told.share_memory_()

    def _name(self, index: Any) -> str:
        return f"an image of stream {self.name!r}"

    def set_epoch(self, count: int) -> None:
        """Tell the epoch to the reader and to the draws; the count of a prepared loader only where none was told."""
        if self._set_epoch(count):
            super().set_epoch(count)
            self._is_told.fill_(True)

    def check_first_image(self) -> None:
        """Raise InputError unless the first image that this process can read has a map."""
        first = self.images.first()
        if first is not None:
            self.maps.find(*first, None, lambda: f"the first image of stream {self.name!r}")

    def __iter__(self) -> Iterator[tuple]:
        epoch, images = int(self._epoch), iter(self.images)
        worker = torch.utils.data.get_worker_info()
        started = () if worker is None or self._is_told else (worker.seed - worker.id,)
        while read := list(itertools.islice(images, _AT_ONCE)):
            with restored_state():  # of the training loop, or of a collate function that draws
                items = [
                    self._item(image, label, None, *self._indices.of(content_key(image), epoch), *started)
                    for image, label in read
                ]
            yield from items
