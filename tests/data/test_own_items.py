"""Subclasses of data sets that we read past: one with a `__getitem__` of its own is asked for its items."""

import numpy as np
import pytest
import timm.data
import torch
import torchvision
from data_parts import keys
from PIL import Image
from store_parts import build
from tiny_parts import ImageList, noise_image, tiny_teacher
from torch.utils.data import ConcatDataset, Subset

from timm_igkd.data.images import content_key
from timm_igkd.data.items import (
    class_names,
    dataset_name,
    first_part,
    gives_items_of,
    known_labels,
    read_item,
    read_items,
    refuse_among_images,
    refuse_overlaid,
)
from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.data.loading import load_labeled_images
from timm_igkd.data.unlabeled import content_hash_of
from timm_igkd.errors import InputError
from timm_igkd.maps.build import compute_maps
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.dataset import IGOverlayDataset

FOUR = ImageList([noise_image(seed) for seed in range(4)], [0, 1, 0, 1], name="four")


class RemappedPart(Subset):
    """Swaps two labels and mirrors the images."""

    def __getitem__(self, index):
        image, label = self.dataset[self.indices[index]]
        return image.transpose(0), 1 - label

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class RemappedSum(ConcatDataset):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.transpose(0), 1 - label


class SmallImages(timm.data.ImageDataset):
    def __getitem__(self, index):
        file, label = self.reader[index]
        with file:
            return Image.open(file).resize((4, 4)), label + 3


class SmallFolder(torchvision.datasets.ImageFolder):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.resize((4, 4)), label + 3


class SmallRows(LabeledImages):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.resize((4, 4)), label + 3


def small_rows(folder) -> SmallRows:
    rows = load_labeled_images(str(folder), "train")
    rows.__class__ = SmallRows
    return rows


@pytest.mark.parametrize("wrapped", [RemappedPart(FOUR, [2, 1]), RemappedSum([Subset(FOUR, [2]), Subset(FOUR, [1])])])
def test_a_wrapper_with_items_of_its_own_gives_them(wrapped):
    images, labels = zip(*(read_item(wrapped, index) for index in range(2)), strict=True)
    assert labels == (1, 0)
    assert [content_key(image) for image in images] == [content_key(FOUR[i][0].transpose(0)) for i in (2, 1)]
    assert [label for _, label in read_items(wrapped, [1, 0])] == [0, 1]


def test_a_part_of_a_wrapper_with_items_of_its_own_gives_them_too():
    nested = Subset(ConcatDataset([FOUR, RemappedPart(FOUR, [3])]), [4, 0])
    assert [read_item(nested, index)[1] for index in range(2)] == [0, 0]
    assert keys(nested) == [content_key(noise_image(3).transpose(0)), content_key(noise_image(0))]


def test_name_classes_and_labels_are_those_of_the_wrapper_that_gives_the_items():
    classes = ImageList(FOUR.images, FOUR.labels)
    classes.classes, classes.targets = ["a", "b"], [0, 1, 0, 1]
    plain, remapped = Subset(classes, [2, 1]), RemappedPart(classes, [2, 1])
    assert (dataset_name(plain), class_names(plain), first_part(plain)) == ("list", ("a", "b"), classes)
    assert known_labels(plain).tolist() == [0, 1]
    assert (dataset_name(remapped), class_names(remapped), first_part(remapped)) == ("RemappedPart", None, remapped)
    assert known_labels(remapped) is None


@pytest.mark.parametrize("kind", [SmallImages, SmallFolder])
def test_a_folder_with_items_of_its_own_gives_them(kind, tiny_images):
    found = kind(str(tiny_images(kind="folder") / "train"))
    image, label = read_item(found, 5)
    assert (image.size, label) == ((4, 4), 4)
    assert known_labels(found) is None


def test_rows_with_items_of_their_own_are_asked_for_them(tiny_images):
    found = small_rows(tiny_images())
    assert (read_item(found, 1)[0].size, read_item(found, 1)[1]) == ((4, 4), 4)
    assert [label for _, label in read_items(found, [0, 1])] == [3, 4]
    assert known_labels(found) is None
    assert content_hash_of(found, None) is None


def test_rows_that_are_read_otherwise_are_so_in_batches_too(tiny_images):
    class Darker(LabeledImages):
        def read(self, index):
            image, label = super().read(index)
            return image.point(lambda level: level // 2), label

    found = load_labeled_images(str(tiny_images()), "train")
    found.__class__ = Darker
    assert [content_key(image) for image, _ in read_items(found, [0, 1])] == keys(found)[:2]


def test_maps_are_of_the_items_that_a_wrapper_gives(tmp_path):
    remapped = RemappedPart(FOUR, [0, 1, 2, 3])
    store = build(tiny_teacher(classes=2, size=16), remapped, tmp_path / "maps")
    assert [store.row(row).label for row in range(4)] == [1, 0, 1, 0]
    store.verify(remapped)
    with pytest.raises(InputError, match="row 0 does not belong to image 0"):
        store.verify(FOUR)


def test_overlaid_images_are_refused_in_any_wrapper():
    overlaid = RemappedPart(IGOverlayDataset(FOUR, None, IGOverlay(overlay_prob=0.0)), [0])
    with pytest.raises(InputError, match="is overlaid already"):
        refuse_overlaid(overlaid)


def test_output_among_the_images_of_any_wrapper_is_refused(tiny_images):
    folder = tiny_images(kind="folder") / "train"
    found = RemappedPart(timm.data.ImageDataset(str(folder)), [0])
    with pytest.raises(InputError, match="lies among the images"):
        refuse_among_images(found, folder / "maps", "choose another")


def test_a_subclass_without_items_of_its_own_is_looked_through(tiny_images):
    class Named(Subset):
        note = "mine"

    folder = tiny_images(kind="folder") / "train"
    found = Named(timm.data.ImageDataset(str(folder)), [1])
    assert gives_items_of(found, Subset)
    (folder / "class_0" / "0002.png").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"image 1 \(.*0002.png\) of .* cannot be decoded"):  # not timm's next one
        read_item(found, 0)


def test_labels_behind_a_target_transform_are_not_known_without_it():
    found = ImageList(FOUR.images, FOUR.labels)
    found.targets = np.array([0, 1, 0, 1])
    assert known_labels(found).tolist() == [0, 1, 0, 1]
    found.target_transform = lambda label: 1 - label
    assert known_labels(found) is None


def test_build_of_a_part_names_split_and_revision_of_what_it_is_of(tiny_images, tmp_path):
    images = load_labeled_images(str(tiny_images(split="test")), "test")
    images.revision = "0a1b"
    store = compute_maps(
        tiny_teacher(classes=2, size=16), torch.utils.data.Subset(images, [3, 0]), tmp_path / "maps", progress=False
    )
    source = store.provenance.dataset
    assert (source.split, source.revision, source.num_images, source.is_part) == ("test", "0a1b", 2, True)


def test_classes_of_torchvisions_imagenet_are_its_wordnet_ids_else_its_words():
    found = ImageList(FOUR.images, FOUR.labels)
    found.classes = [("tench", "Tinca tinca"), ("goldfish",)]
    assert class_names(found) == ("tench, Tinca tinca", "goldfish")
    found.wnids = ["n01440764", "n01443537"]
    assert class_names(found) == ("n01440764", "n01443537")
