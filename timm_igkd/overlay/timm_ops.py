"""The overlay in timm's registry of augmentations: op `IGOverlay`, and `tigkd` in a RandAugment string.

    timm.data.create_loader(dataset, …, auto_augment="rand-m9-n2-p0.5-tigkd")

`tigkd` is timm's section `t` with the set's name `igkd`, as in its own `tweights` and `t3a`: the increasing set plus
`IGOverlay`. Importing the package adds the two entries below and changes no set and no policy of timm's.
"""

import copy
import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from timm.data import auto_augment

from timm_igkd.errors import InputError

OP_NAME = "IGOverlay"
SET_NAMES = ("igkd", "tigkd")  # of the section "tigkd", and as an argument written in full
_POSTERIZE = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")


def overlay_op(image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
    """Return the image, and warn: without an `IGOverlayDataset`, which takes this op out, there are no maps."""
    _warn_once()
    return image


@functools.cache  # Python's own "once a place" begins anew wherever filters of warnings change, as for each image read
def _warn_once() -> None:
    warnings.warn(
        f"{OP_NAME} changes nothing outside a timm_igkd.IGOverlayDataset: the image's map is unknown here; set the "
        "transform on such a dataset, or train with: timm-igkd run",
        stacklevel=3,
    )


def unchanged(image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
    """Return the image; stands in the op's place in a pipeline whose dataset overlays before it."""
    return image


def register() -> None:
    """Add the op and the set to timm; a second call changes nothing."""
    auto_augment.NAME_TO_OP[OP_NAME] = overlay_op
    auto_augment.LEVEL_TO_ARG[OP_NAME] = None
    timms_choices: Any = auto_augment.rand_augment_choices
    if getattr(timms_choices, "names_igkd", False):
        return

    def rand_augment_choices(name: str, increasing: bool = True) -> Any:
        if name in SET_NAMES:
            return [*timms_choices("", increasing=True), OP_NAME]
        return timms_choices(name, increasing=increasing)

    rand_augment_choices.names_igkd = True  # type: ignore[attr-defined]
    auto_augment.rand_augment_choices = rand_augment_choices


def posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """Keep the highest bits of each channel as timm does; none of them, timm's range ends there, is black."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **kwargs)


@contextmanager
def posterize_to_black() -> Iterator[None]:
    """Let policies of timm's that are created meanwhile posterize to 0 bits.

    timm 1.0.31 keeps "4 down to 0" bits as the magnitude grows to 10, and its `mstd` reaches 10 in a few images of a
    thousand; Pillow before 13 made such an image black, Pillow 13 raises "bits must be between or equal to 1 and 8".
    Importing the package changes none of timm's ops: who builds the policy asks for this.
    """
    timms = {name: auto_augment.NAME_TO_OP[name] for name in _POSTERIZE}
    auto_augment.NAME_TO_OP.update(dict.fromkeys(_POSTERIZE, posterize))
    try:
        yield
    finally:
        auto_augment.NAME_TO_OP.update(timms)


def take_overlay_out(transform: Any) -> tuple[Any, float | None]:
    """Return (the transform without overlay ops, the probability they had), or (transform, None) where it has none.

    RandAugment draws n of its K ops with replacement and applies each with probability p, so that at least one overlay
    is applied with probability 1 - (1 - m * p / K) ** n for m overlay ops among the K. For `rand-…-n2-p0.5-tigkd`, with
    m = 1 and K = 16, that is 1 - (1 - 0.5 / 16) ** 2 = 0.0615. RandAugment's magnitude means nothing to the overlay,
    whose strength is `IGOverlay`'s.

    The copy keeps an op that does nothing in the place of each overlay op, because every other op keeps its own
    probability then.

    Args:
        transform: a RandAugment, or a Compose (timm's pipelines, torchvision's) with RandAugments in it; the objects
            given are not changed. Anything else comes back as it is.

    Raises:
        InputError: overlay ops in a RandAugment with weights, which draws without replacement.
    """
    if isinstance(transform, auto_augment.RandAugment):
        return _from_rand_augment(transform)
    parts = getattr(transform, "transforms", None)
    if type(transform).__name__ != "Compose" or not isinstance(parts, list | tuple):
        return transform, None
    taken = [take_overlay_out(part) for part in parts]
    found = [probability for _, probability in taken if probability is not None]
    if not found:
        return transform, None
    without = copy.copy(transform)
    without.transforms = [part for part, _ in taken]
    return without, 1 - math.prod(1 - probability for probability in found)


def _from_rand_augment(transform: Any) -> tuple[Any, float | None]:
    ops: list[Any] = list(transform.ops)
    overlays = [op for op in ops if getattr(op, "aug_fn", None) is overlay_op]
    if not overlays:
        return transform, None
    if transform.choice_weights is not None:
        raise InputError(
            f"{OP_NAME} in a RandAugment with weights is not supported; name the set 'tigkd' in its string"
        )
    share = sum(min(max(op.prob, 0.0), 1.0) for op in overlays) / len(ops)
    without = copy.copy(transform)
    without.ops = [_silent(op) if op in overlays else op for op in ops]
    return without, 1 - (1 - share) ** transform.num_layers


def _silent(op: Any) -> Any:
    silent = copy.copy(op)
    silent.aug_fn = unchanged
    return silent


register()
