"""Shares of a data set keep the shares of its classes."""

import os
import shutil

import datasets
import pytest
import torch
from command_lines import two_splits
from tiny_parts import noise_image, png

from timm_igkd.data.folders import splits_share
from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.data.labels import stratified_indices
from timm_igkd.data.loading import load_labeled_images
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


@pytest.mark.parametrize(
    ("split", "other", "expected"),
    [
        ("train", "test", False),
        ("train", "train", True),
        ("train[:8]", "train[:8]", True),
        ("train[:8]", "train", True),
        ("train[:8]", "train[8:]", None),
        ("train[:8] + test", "train[8:]", None),
        ("train[:8]+test", "train[8:]+test", True),
        ("train[:8]", "test[8:]", False),
        ("all", "test", True),
        ("all[:8]", "test", True),
        ("all[:8]", "test[2:]", None),
    ],
)
def test_names_of_splits_tell_what_they_share(split, other, expected):
    assert splits_share(split, other) is expected
    assert splits_share(other, split) is expected


def test_parts_of_a_split_share_what_is_in_both(tiny_images):
    images = load_labeled_images(str(two_splits(tiny_images)), "train")
    first, second = images.subset(range(8)), images.subset(range(8, 16))
    assert not first.shares_images(second)
    assert first.shares_images(images)
    assert images.shares_images(second)
    assert first.subset([7]).shares_images(images.subset([7, 8]))
    assert first.num_shared(images.subset([6, 7, 8])) == 2


def test_a_folder_is_the_same_however_it_is_spelled_and_holds_what_is_within(tiny_images, tmp_path, monkeypatch):
    folder = two_splits(tiny_images)
    monkeypatch.chdir(folder.parent)
    test = load_labeled_images(str(folder), "test")
    for name in (f"{folder}/", folder.name, f"./{folder.name}", os.path.join(folder, "..", folder.name)):
        assert load_labeled_images(name, "test").shares_images(test)
        assert not load_labeled_images(name, "train").shares_images(test)
    copied = shutil.copytree(folder, tmp_path / "elsewhere")
    assert not load_labeled_images(str(copied), "test").shares_images(test)  # by name; the files are not compared
    assert load_labeled_images(str(copied), "test").num_shared(test) == len(test)


def test_sizes_are_told_by_spread_images_and_a_damaged_one_is_named_by_its_own_row(tmp_path):
    images = [{"bytes": png(noise_image(seed)), "path": None} for seed in range(8)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})

    def opened(cells):
        rows = datasets.Dataset.from_dict({"image": cells, "label": [0, 1] * 4}, features)
        return LabeledImages(rows.cast_column("image", datasets.Image(decode=False)), "eight", "train")

    assert opened(images).common_size(4) == (16, 16)  # images 0, 2, 4 and 6
    other = {"bytes": png(noise_image(9, 20, 16)), "path": None}
    assert opened([*images[:6], other, images[7]]).common_size(4) is None
    with pytest.raises(InputError, match=r"^image 6 of 'eight' split 'train' cannot be decoded"):
        opened([*images[:6], {"bytes": b"no image", "path": None}, images[7]]).common_size(4)
