"""Which images a run fits and chooses by."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from timm_igkd.errors import InputError
from timm_igkd.runs.data import cut_validation, load_other_split, load_split
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


def test_limit_draws_by_the_seed(config):
    def labels_and_pixels(seed):
        split = load_split(replace(config, seed=seed), "train", 8)
        return [split.read(index)[0].tobytes() for index in range(len(split))]

    assert labels_and_pixels(0) == labels_and_pixels(0) != labels_and_pixels(1)


def test_first_label_beyond_those_of_the_training_split_is_refused(config):
    rows = datasets.load_dataset(config.dataset, split="train").select(range(4)).remove_columns("label")
    for split, last in (("train", 3), ("validation", 3), ("test", 4)):
        rows.add_column("label", [0, 1, 2, last]).to_parquet(
            str(Path(config.dataset) / f"{split}-00000-of-00001.parquet")
        )
    plain = replace(config, label_column="label")
    train = load_split(plain, "train")
    assert len(load_other_split(plain, "validation", train)) == 4
    with pytest.raises(InputError, match="has label 4, the training split's classes are 0 to 3"):
        load_other_split(plain, "test", train)
