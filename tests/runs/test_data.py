"""Which images a run fits and chooses by."""

from dataclasses import replace

import numpy as np
import pytest

from timm_igkd.runs.data import cut_validation, load_split
from timm_igkd.runs.settings import RunConfig


@pytest.fixture
def config(tiny_images) -> RunConfig:
    """A run on 40 images of class 0 to 3."""
    images = tiny_images(n=40, classes=4)
    return RunConfig(protocol="demo", dataset=str(images), validation_split=None, validation_fraction=0.3)


def test_validation_cut_keeps_the_share_of_every_class(config):
    train = load_split(config, "train")
    fitting, validation = cut_validation(config, train)
    assert validation is not None
    assert np.bincount(validation.labels).tolist() == [3] * 4
    assert np.bincount(fitting.labels).tolist() == [7] * 4


def test_cut_parts_the_images_and_follows_the_seed(config):
    train = load_split(config, "train")

    def cut(seed):
        parts = cut_validation(replace(config, seed=seed), train)
        return [{part.read(index)[0].tobytes() for index in range(len(part))} for part in parts]

    first, again, other = cut(0), cut(0), cut(1)
    assert not first[0] & first[1]
    assert len(first[0] | first[1]) == 40
    assert first == again != other


def test_no_fraction_means_no_validation(config):
    train = load_split(config, "train")
    assert cut_validation(replace(config, validation_fraction=0.0), train) == (train, None)
