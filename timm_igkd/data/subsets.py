"""A share of a data set that keeps the share of every class."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from timm_igkd.errors import InputError
from timm_igkd.random_streams import generator


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


def stratified_limit(labels: np.ndarray, count: int, seed: int, purpose: str = "limit") -> np.ndarray:
    """Return the sorted indices of `count` random images that keep the share of every class, [count] int64.

    Args:
        labels: [N] int64.
        count: of images to keep; at N and above all are.
        seed: of the choice.
        purpose: names the stream of random numbers.
    """
    place = np.empty(len(labels))  # where an image stands within its class, from 0 to 1
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        place[generator(seed, purpose, int(label)).permutation(rows)] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.sort(np.lexsort((np.arange(len(labels)), place))[:count])
