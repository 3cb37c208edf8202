"""The dataset wrapper: any dataset of (PIL image, label), its training images overlaid with their own maps."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch.utils.data

from timm_igkd.data.items import class_names, dataset_name, read_items, row_name
from timm_igkd.distillation.options import TeacherViewMode
from timm_igkd.errors import InputError, InputTypeError, check_images
from timm_igkd.maps.store import MapStore
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.controls import OverlaySource
from timm_igkd.overlay.overlaid_views import OverlaidViews
from timm_igkd.random_streams import restored_state


class IGOverlayDataset(OverlaidViews, torch.utils.data.Dataset):
    """Overlay a dataset's images with their attribution maps, before any transform.

    Args:
        dataset: map-style dataset of (PIL image, label), without a transform: timm's, torchvision's, LabeledImages, a
            Subset of one.
        maps: the store of this dataset's maps; an image without a map is an error, not a skip. None: no overlay, for
            an arm that shares everything else.
        overlay: probability and strength; default: the paper's where there are maps.
        teacher_view: "same": items are (student image, label), and a teacher in the loop sees the overlay too.
            "clean": items are ((student image, teacher image), label), the teacher's without overlay under the same
            random transform; random erasing belongs into the transform then, so that both views get the same.
        overlay_source: "aligned", or a control (see controls.py).
        seed: None: the transform draws from the worker's generators, as timm does, and the overlay from one of its
            own per worker. A number: every draw comes from (seed, purpose, epoch, index), whatever the number of
            workers; call `set_epoch` of this dataset before each epoch then. A loader that Accelerate prepared tells it
            its own count of whole passes as long as none is told, and what its own `set_epoch` is told, but nothing
            where a sampler takes the epoch (seedable, distributed). Copies of an image within an epoch, as a sampler
            with replacement or timm's RepeatAugSampler (`--aug-repeats`) gives them, are equal then: leave it out.
        with_logits: items go on with the teacher's stored logits of the clean image, [classes] float32.
        with_maps: items end with the map of the view, [1, H, W] uint8: the one that `overlay_source` names, whether the
            image is overlaid or not, brought through the transform with the same random numbers. The transform may then
            do nothing but geometry, to uint8 pixels.

    Attributes:
        transform: applied to the overlaid image; `timm.data.create_loader` sets it. Where it holds the op `IGOverlay`
            (`tigkd` in a RandAugment string), the dataset takes the op out and overlays with the string's probability.
        overlay_prob: the probability in force, of `overlay` or of the transform's string.

    Other attributes (`classes`, `reader`, `filename`, …) are the wrapped dataset's.

    Raises:
        InputTypeError: a stream, or maps that are no store. InputError: a dataset that is overlaid already, has a
            transform, images other than RGB or `additional_features`, or logits or maps of items without a store.
    """

    def __init__(
        self,
        dataset: Any,
        maps: MapStore | None,
        overlay: IGOverlay | None = None,
        *,
        teacher_view: TeacherViewMode = "same",
        overlay_source: OverlaySource = "aligned",
        seed: int | None = None,
        with_logits: bool = False,
        with_maps: bool = False,
    ):
        if not isinstance(dataset, OverlaidViews):
            _check_map_style(dataset)
        self.dataset = dataset
        super().__init__(dataset, maps, overlay, teacher_view, overlay_source, seed, with_logits, with_maps)

    def __len__(self) -> int:
        if sys._getframe(1).f_globals.get("__name__") == "timm.data.naflex_dataset":
            raise InputError(
                "timm's NaFlex loader leaves out every image whose item raises, so that one without a map would be "
                "missing without a word; train with timm.data.create_loader (no --naflex-loader)"
            )
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "dataset":  # not yet there while an object is unpickled
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, where the dataset tells them."""
        return class_names(self.dataset)

    @property
    def set_epoch(self) -> Callable[[int], object]:
        """Tell the epoch; only a dataset with a seed has this.

        timm's train.py tells the epoch to the dataset, or else to the distributed sampler: never to both.
        """
        if self.seed is None:
            raise AttributeError("a dataset without a seed has no epochs")
        return self._set_epoch

    def __getitem__(self, index: int) -> tuple:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple]:
        """Return the items of a batch, as a DataLoader asks for them.

        With a seed, the global generators are put aside once for all of them: that costs more than reading an image.
        """
        n = len(self.dataset)
        outside = next((index for index in indices if not -n <= index < n), None)
        if outside is not None:
            raise IndexError(f"index {outside} is outside of {n} images")
        indices = [index + n if index < 0 else index for index in indices]
        with nullcontext() if self.seed is None else restored_state():
            read = read_items(self.dataset, indices)
            return [self._item(*item, index, index) for index, item in zip(indices, read, strict=True)]

    def _name(self, index: Any) -> str:
        return row_name(self.dataset, index)


def _check_map_style(dataset: Any) -> None:
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise InputTypeError(
            f"{dataset_name(dataset)!r} is a stream, expected items by index; open it with timm.data.create_dataset "
            "(hfids/…, wds/…) and use IGOverlayStream"
        )
    check_images("dataset", dataset)
