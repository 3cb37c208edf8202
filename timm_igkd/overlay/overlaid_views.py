"""What all datasets with overlays share: settings, the coin, the blend, and a transform after it, for one view or two.

The map is blended into the untransformed image, which then goes through any transform; so the map follows every crop
and flip with no special case.
"""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from timm.data import AugMixDataset, create_loader

from timm_igkd.data.items import dataset_name, parts, refuse_overlaid
from timm_igkd.distillation.options import TeacherViewMode
from timm_igkd.errors import InputError, InputTypeError, check_choice, check_kind, check_whole
from timm_igkd.maps.store import MapStore
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.controls import OverlaySource, control_map
from timm_igkd.overlay.timm_ops import take_overlay_out
from timm_igkd.random_streams import derive_seed, restored_state, seed_global, uniforms


class TwoViews(tuple):
    """(student view, teacher view) of one image; timm's `fast_collate` flattens a batch of them to 2B."""

    @property
    def shape(self) -> Any:
        """Asked for by timm's FastCollateMixup alone, which would mix only one of the views."""
        raise InputTypeError(
            "FastCollateMixup cannot mix a dataset with two views (teacher_view='clean'); "
            "use timm_igkd.distillation.mixup.TwoViewMixup after a plain collate, or teacher_view='same'"
        )


class OverlaidViews:
    """The base of `IGOverlayDataset`, whose arguments these are, and of `IGOverlayStream`."""

    is_overlaid = True

    def __init__(
        self,
        dataset: Any,
        maps: MapStore | None,
        overlay: IGOverlay | None,
        teacher_view: TeacherViewMode,
        overlay_source: OverlaySource,
        seed: int | None,
        with_logits: bool,
        with_maps: bool = False,
    ):
        check_choice("teacher_view", teacher_view, get_args(TeacherViewMode))
        check_choice("overlay_source", overlay_source, get_args(OverlaySource))
        if maps is not None:
            check_store("maps", maps)
        if overlay is not None:
            prob = overlay if isinstance(overlay, float) else IGOverlay.overlay_prob
            check_kind("overlay", overlay, IGOverlay, "an IGOverlay", f"give IGOverlay(overlay_prob={prob})")
        refuse_overlaid(dataset)
        for part in parts(dataset):
            if getattr(part, "transform", None) is not None:
                raise InputError(
                    f"{dataset_name(part)!r} has a transform already; the overlay comes first, so "
                    f"set the transform on the {type(self).__name__} instead"
                )
            _refuse_other_items(part)
        self.overlay = overlay or IGOverlay(overlay_prob=0.0 if maps is None else IGOverlay.overlay_prob)
        if maps is None and (self.overlay.overlay_prob > 0 or with_logits or with_maps):
            raise InputError(
                "overlays, stored logits and maps of views need maps, got none; build them: timm-igkd maps"
            )
        if maps is not None and (self.overlay.overlay_prob > 0 or with_maps):
            maps.require_maps()
        self._labels_decide = False
        if maps is not None and with_logits:
            maps.require_logits(dataset)
            self._labels_decide = maps.labels_decide(dataset)
        if maps is not None:
            maps.map_rows()  # once, before workers would
        self._maps = maps
        self.teacher_view, self.overlay_source = teacher_view, overlay_source
        self.seed = None if seed is None else check_whole("seed", seed)
        self.with_logits, self.with_maps = with_logits, with_maps
        self.transform = None
        self._epoch, self._is_told_by_script = torch.zeros((), dtype=torch.int64).share_memory_(), False
        self._coins: tuple[tuple[int, int], np.random.Generator] | None = None  # with process and seed they are of

    @property
    def transform(self) -> Callable[[Image.Image], Any] | None:
        """The transform as it was assigned."""
        return self._transform

    @transform.setter
    def transform(self, transform: Callable[[Image.Image], Any] | None) -> None:
        self._check_loader(sys._getframe(1))
        applied, probability = take_overlay_out(transform)
        if probability is not None and self._maps is None:
            raise InputError("the transform's IGOverlay needs maps, got none; build them with: timm-igkd maps")
        if probability and self._maps is not None:
            self._maps.require_maps()
        self._transform, self._applied = transform, applied
        self.overlay_prob = self.overlay.overlay_prob if probability is None else probability

    def _check_loader(self, caller: FrameType) -> None:
        """Refuse a `timm.data.create_loader` with which overlays, views or draws would not be what they are said to be.

        It sets the transform, and asks the dataset nothing afterwards: what it was called with is all there is to see.
        """
        is_clean, has_more = self.teacher_view == "clean", self.with_logits or self.with_maps
        if (is_clean or has_more or self.seed is not None) and caller.f_code is AugMixDataset._set_transforms.__code__:
            raise InputError(
                "timm's augmentation splits (AugMixDataset) augment outside of the dataset, where two views, a seed, "
                "logits and maps do nothing; use num_aug_splits=0, or leave these out"
            )
        if caller.f_code is not create_loader.__code__:
            return
        asked = caller.f_locals
        for is_so, why in (
            (
                is_clean
                and asked["use_prefetcher"]
                and asked["is_training"]
                and not asked["no_aug"]
                and asked["re_prob"] > 0,
                "random erasing in timm's prefetcher erases the two views differently; use "
                "create_loader(use_prefetcher=False) with re_prob, or teacher_view='same'",
            ),
            (
                asked.get("input_size_choices") is not None
                and (is_clean or self.seed is not None or "igkd" in (asked["auto_augment"] or "")),
                "timm's scheduled input sizes put the transform outside of the dataset, where two views, a seed and "
                "tigkd do nothing; leave input_size_choices out, or these",
            ),
            (
                self.seed is not None
                and asked["use_multi_epochs_loader"]
                and not isinstance(self, torch.utils.data.IterableDataset),
                "timm's multi-epochs loader fetches images of the next epoch before it is told, so that draws by seed "
                "and epoch repeat; use persistent_workers=True in its place, or leave the seed out",
            ),
            (
                has_more and asked["use_prefetcher"] and asked["collate_fn"] is None,
                "timm's prefetcher keeps image and label alone of each item, so that logits and maps were lost; use "
                "create_loader(use_prefetcher=False)",
            ),
        ):
            if is_so:
                raise InputError(why)

    @property
    def maps(self) -> MapStore:
        """The store; an InputError where there is none."""
        if self._maps is None:
            raise InputError("this dataset has no maps")
        return self._maps

    def _set_epoch(self, epoch: int) -> bool:
        """Tell the epoch, through memory shared with persistent workers; False where who tells it has no say.

        A loader that Accelerate prepared tells its own count of whole passes as each begins, after the script has told
        its epoch. That count is for scripts which tell the dataset none.
        """
        teller = _teller_of_epochs(sys._getframe(1))
        if teller == "pass" and self._is_told_by_script:
            return False
        self._is_told_by_script = teller == "script"
        self._epoch.fill_(epoch)
        return True

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_coins": None}  # each worker seeds its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # a copy's is in nobody's memory but its own

    def draw(self, *indices: int) -> tuple[bool, float]:
        """Toss the coin of the image with these indices: (overlaid or not, the map's exponent)."""
        if self.seed is None:
            made_of = os.getpid(), torch.initial_seed()  # a worker that was forked has its parent's
            if self._coins is None or self._coins[0] != made_of:
                self._coins = made_of, np.random.default_rng(made_of[1] & (1 << 63) - 1)
            coin, strength = self._coins[1].random(2)
        else:
            coin, strength = uniforms(self.seed, "overlay", int(self._epoch), *indices)
        return coin < self.overlay_prob, self.overlay.power(strength)

    def _name(self, index: Any) -> str:
        """Return how messages call the image at hand."""
        raise NotImplementedError

    def overlaid(self, image: Image.Image, label: int, index: int | None, power: float) -> Image.Image:
        """Return an image blended with its map, or with what the control puts in the map's place."""
        return self.overlay.apply(image, self._levels(image, label, index), power)

    def _levels(self, image: Image.Image, label: int, index: int | None) -> Image.Image:
        return control_map(self.maps, self._row(image, label, index), image, self.overlay_source, self.seed or 0)

    def _row(self, image: Image.Image, label: int, index: int | None) -> int:
        return self.maps.find(image, label, index, lambda: self._name(index))

    def _item(self, image: Image.Image, label: int, index: int | None, *draws: int) -> tuple:
        """Return what the loader gets of an image; `draws` are the indices by which it owns its random numbers."""
        is_overlaid, power = self.draw(*draws) if self.overlay_prob else (False, 1.0)
        student = self.overlaid(image, label, index, power) if is_overlaid else image
        more = []
        if self.with_logits:
            told = label if self._labels_decide else None
            logits = self.maps.logits(self._row(image, label, index), told, lambda: self._name(index))
            more.append(torch.from_numpy(logits))
        if self.with_maps:
            more.append(self._view_of_map(self._levels(image, label, index), *draws))
        return self._transformed(student, image if is_overlaid else None, *draws), label, *more

    def _view_of_map(self, levels: Image.Image, *indices: int) -> torch.Tensor:
        """Transform a map as an image of three equal channels, with the random numbers that its image gets next."""
        self._seed_transform(*indices)
        with restored_state() if self.seed is None else nullcontext():
            view = None if self._applied is None else torch.as_tensor(self._applied(levels.convert("RGB")))
        if view is None or view.dtype != torch.uint8:
            found = "there is none" if view is None else f"this one gives {view.dtype}"
            raise InputError(
                f"maps of views need a transform that ends in uint8 pixels, {found}; normalise whole batches, as "
                "WorkerBatches does, or drop with_maps"
            )
        return view[:1]

    def _seed_transform(self, *indices: int) -> None:
        if self.seed is not None:
            seed_global(derive_seed(self.seed, "transform", int(self._epoch), *indices))

    def _transformed(self, student: Image.Image, clean: Image.Image | None, *indices: int) -> Any:
        """Transform the student's view, and the teacher's with the same random numbers where it differs."""
        self._seed_transform(*indices)
        transform = self._applied or (lambda image: image)
        if self.teacher_view == "same":
            return transform(student)
        if clean is None:
            view = transform(student)
            return TwoViews((view, view))
        with restored_state():
            teacher = transform(clean)
        return TwoViews((transform(student), teacher))


def _teller_of_epochs(frame: FrameType | None) -> Literal["script", "loader", "pass"]:
    """Return who tells an epoch: the script, Accelerate's loader that was told by it, or a pass as it begins."""
    teller: Literal["script", "loader"] = "script"
    while frame is not None:
        if frame.f_globals.get("__name__") == "accelerate.data_loader":
            if frame.f_code.co_name == "__iter__":
                return "pass"
            teller = "loader"
        frame = frame.f_back
    return teller


def check_store(name: str, store: Any) -> None:
    """Raise InputTypeError unless something is an open store of maps."""
    folder = repr(str(store)) if isinstance(store, str | Path) else "folder"
    check_kind(name, store, MapStore, "a MapStore", f"open it with MapStore({folder})")


def _refuse_other_items(dataset: Any) -> None:
    """Refuse a timm dataset whose items are not (RGB image, label)."""
    mode, more = getattr(dataset, "input_img_mode", "RGB"), getattr(dataset, "additional_features", None)
    if mode not in ("RGB", None):
        raise InputError(
            f"overlays need RGB images, {dataset_name(dataset)!r} has input_img_mode {mode!r}; leave it out"
        )
    if more:
        raise InputError(
            f"{dataset_name(dataset)!r} adds {', '.join(map(str, more))} to its items (additional_features), expected "
            "(image, label) alone; leave them out"
        )
