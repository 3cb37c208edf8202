"""Labels: whole numbers that count classes from 0, the order of the classes, and shares that keep every class's."""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.data import ImageNetInfo
from timm.utils.misc import natural_key
from torch import Tensor

from timm_igkd.data.images import Name, text
from timm_igkd.errors import InputError, InputTypeError, nearest
from timm_igkd.random_streams import generator

_WORDNET_ID = re.compile(r"n\d{8}")
_FEWER, _MISSED = 0.8, 4  # of the classes that a draw has: a share and a number that chance hardly reaches

UNLABELED = -1
"""The label of an image without one, as `datasets` and timm have it; a data set with labels may not hold it."""


def to_label(value: Any, name: Name) -> int:
    """Return one label as an int.

    Args:
        value: a whole number of Python, numpy or torch (0 dimensions), also as a float (1.0) or bool.
        name: how a message calls the image.

    Raises:
        InputError: a number that is not whole, or beyond 64 bits. InputTypeError: no number; nothing is rounded or
        parsed.
    """
    item: Any = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if not isinstance(item, int | float):
        kind = "None" if item is None else type(value).__name__
        shape = f" of shape {tuple(value.shape)}" if getattr(value, "ndim", 0) else ""
        raise InputTypeError(
            f"{text(name)} has a label of type {kind}{shape}, expected a whole number that counts the classes from 0; "
            "encode the labels first"
        )
    if not math.isfinite(item) or item != int(item) or not -(2**63) <= item < 2**63:
        raise InputError(f"{text(name)} has label {item!r}, expected a whole number that counts the classes from 0")
    return int(item)


def class_order(names: Sequence[str]) -> list[str]:
    """Return class names in timm's order: naturally (2 before 10), upper and lower case alike; ties as text."""
    return sorted(sorted(names), key=natural_key)


def label_table(names: Sequence[str], wanted: Sequence[str], what: str) -> np.ndarray | None:
    """Return the label that each of `names` has among `wanted`, [len(names)] int64; None where nothing changes.

    Args:
        names: classes of some images, in the order that their labels count.
        wanted: classes in the order that labels shall count; may hold more of them.
        what: how a message calls the images.

    Raises:
        InputError: a class that is not among `wanted`.
    """
    position = {name: label for label, name in enumerate(wanted)}
    missing = [name for name in names if name not in position]
    if missing:
        hint = nearest(missing[0], wanted)
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{what} has class {missing[0]!r}{more}, which the training images' {len(wanted)} classes lack{hint}; "
            "remove these images, or give splits of the same classes"
        )
    if [position[name] for name in names] == list(range(len(names))):
        return None
    return np.array([position[name] for name in names], dtype=np.int64)


def readable_names(names: Sequence[str]) -> list[str]:
    """Return class names as people read them: the first of ImageNet's words for each WordNet id that timm knows.

    Two ids of one word, such as both cranes, keep their ids behind it; other names stay as they are.
    """
    if not any(_WORDNET_ID.fullmatch(name) for name in names):
        return list(names)
    info = ImageNetInfo("imagenet22k")
    known = {name for name in names if _WORDNET_ID.fullmatch(name)} & set(info.label_names())
    words = [info.label_name_to_description(name).split(",")[0] if name in known else name for name in names]
    return [f"{word} ({name})" if words.count(word) > 1 else word for word, name in zip(words, names, strict=True)]


def evenly_spread(total: int, count: int, labels: np.ndarray | None = None) -> list[int]:
    """Return `count` of `total` rows: they are cut into `count` equal stretches, and the first row of each is taken.

    Where classes lie in turn that would leave some of them out: then one of each stretch is drawn (seed 0), that is,
    where a class of which five images or more were to be expected is not there, or the draw has clearly more classes.

    Args:
        total: rows.
        count: of them; all where there are fewer.
        labels: [total] of the rows, where they are known.
    """
    count = min(count, total)
    starts = [k * total // max(1, count) for k in range(count + 1)]
    first = starts[:-1]
    if labels is None or not count:
        return first
    draws = generator(0, "evenly spread")
    drawn = [int(draws.integers(low, high)) for low, high in itertools.pairwise(starts)]
    own, others = (len(np.unique(labels[rows])) for rows in (first, drawn))
    has_fewer = own < _FEWER * others and others - own >= _MISSED
    return drawn if has_fewer or _leaves_out_a_class(labels, first) else first


def _leaves_out_a_class(labels: np.ndarray, chosen: Sequence[int]) -> bool:
    """Return whether a class of which five images or more were to be expected is not among the chosen ones."""
    classes, counts = np.unique(labels, return_counts=True)
    expected = counts * (len(chosen) / len(labels))
    return bool((~np.isin(classes, labels[list(chosen)]) & (expected >= 5)).any())


def stratified_indices(
    labels: Tensor | np.ndarray | Sequence[int], fraction: float, seed: int, purpose: str = "subset"
) -> Tensor:
    """Return the sorted indices of a random share of every class, [n] int64.

    Args:
        labels: [N] int64.
        fraction: in (0, 1]; 1 returns all.
        seed: of the choice.
        purpose: names the stream of random numbers, so that two choices of one run are independent.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction must be in (0, 1], got {fraction:g}")
    table, kept = np.asarray(labels), []
    for label in np.unique(table):
        rows = np.flatnonzero(table == label)
        kept.append(generator(seed, purpose, int(label)).permutation(rows)[: round(fraction * len(rows))])
    return torch.from_numpy(np.sort(np.concatenate(kept)))


def stratified_limit(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the sorted indices of `count` random images that keep the share of every class, [count] int64.

    Args:
        labels: [N] int64.
        count: of images to keep; at N and above all are.
        seed: of the choice.
    """
    place = np.empty(len(labels))  # where an image stands within its class, from 0 to 1
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        place[generator(seed, "limit", int(label)).permutation(rows)] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.sort(np.lexsort((np.arange(len(labels)), place))[:count])


def check_numbers(labels: np.ndarray, names: Sequence[str] | None, num_classes: int, what: str) -> None:
    """Refuse labels that are not the numbers of a training split's classes, which have no names.

    Args:
        labels: [n], of another split.
        names: of its classes, or None.
        num_classes: of the training split.
        what: how the message calls the other split.

    Raises:
        InputError: they have names, by which nobody can tell whether they are numbered alike, or one is too large.
    """
    if names is not None:
        raise InputError(
            f"{what} names its classes, the training split does not, so that they may be numbered otherwise; make both "
            "label columns a ClassLabel, or both numbers"
        )
    largest = int(labels.max())
    if largest >= num_classes:
        raise InputError(
            f"{what} has label {largest}, the training split's classes are 0 to {num_classes - 1}; give splits of the "
            "same classes"
        )
