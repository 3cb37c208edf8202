"""Shares of a data set keep the shares of its classes."""

import pytest
import torch

from timm_igkd.data.labels import stratified_indices
from timm_igkd.errors import InputError


def test_subsets_keep_the_share_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    chosen = stratified_indices(labels, 0.8, seed=0)
    assert torch.bincount(labels[chosen]).tolist() == [40, 24, 16]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert not torch.equal(chosen, stratified_indices(labels, 0.8, seed=1))


@pytest.mark.parametrize("fraction", [0.0, 1.5, float("nan")])
def test_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(InputError, match="fraction must be in"):
        stratified_indices(torch.zeros(3), fraction, 0)
