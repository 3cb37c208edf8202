"""How alike two sets of maps are."""

import torch
from torch import Tensor


def map_correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Return the Pearson correlation of each pair of maps [N, H, W], [N] float64.

    A constant map has 1 with an equal one and 0 with any other.
    """
    first, second = (values.flatten(1).double() for values in (maps, others))
    equal = (first == second).all(dim=1)
    first, second = first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)
    norms = first.norm(dim=1) * second.norm(dim=1)
    return torch.where(norms > 0, (first * second).sum(1) / norms.clamp_min(1e-300), equal.double())
