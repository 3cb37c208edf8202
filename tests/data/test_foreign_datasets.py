"""Data sets of timm, torchvision and others: the same items, and no image in an unreadable one's place."""

import sys

import datasets
import numpy as np
import pytest
import timm.data
import torch
import torchvision
from data_parts import keys
from PIL import Image
from timm.data import dataset_factory
from tiny_parts import ImageList, noise_image

from timm_igkd.data.items import class_names, dataset_name, read_item, row_name
from timm_igkd.data.loading import load_labeled_images
from timm_igkd.data.named_datasets import TIMMS_SPLITS
from timm_igkd.errors import InputError, InputTypeError


def test_timms_folder_is_read_without_what_reads_rows(tiny_images, monkeypatch):
    """A training process that reads none is spared pandas too."""
    folder = tiny_images(kind="folder")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load_labeled_images("folder/", "train", data_dir=str(folder))) > 0


def test_timm_folder_holds_the_same_items(tiny_images):
    folder = tiny_images(kind="folder")
    ours, theirs = load_labeled_images(str(folder), "train"), timm.data.ImageDataset(str(folder / "train"))
    assert sorted(keys(theirs)) == sorted(keys(ours))
    assert class_names(theirs) == ours.class_names
    assert read_item(theirs, 7)[1] == 1


def test_unreadable_file_is_not_replaced_by_timms_next_one(tiny_images):
    folder = tiny_images(kind="folder") / "train"
    found = timm.data.ImageDataset(str(folder))
    (folder / "class_0" / "0002.png").write_bytes(b"cut")
    assert read_item(found, 2)[1] == 0
    with pytest.raises(InputError, match=r"image 1 \(.*0002.png\) of .* cannot be decoded"):
        read_item(found, 1)


def test_deleted_file_is_not_replaced_by_timms_next_one(tiny_images):
    folder = tiny_images(kind="folder") / "train"
    found = timm.data.ImageDataset(str(folder))
    (folder / "class_0" / "0002.png").unlink()
    with pytest.raises(InputError, match=r"image 1 \(.*0002.png\) of .* cannot be read"):
        read_item(found, 1)


def test_timms_target_transform_is_applied(tiny_images):
    folder = tiny_images(kind="folder") / "train"
    found = timm.data.ImageDataset(str(folder), target_transform=lambda target: target + 5)
    assert read_item(found, 0)[1] == 5


def test_timm_dataset_by_name_holds_the_same_items(tiny_images):
    folder = tiny_images(kind="folder")
    found = load_labeled_images("folder/", "train", data_dir=str(folder))
    assert sorted(keys(found)) == sorted(keys(load_labeled_images(str(folder), "train")))


def test_timm_dataset_by_name_without_its_folder_is_an_error(tmp_path):
    with pytest.raises(InputError, match="timm dataset 'folder/' split 'train' under"):
        load_labeled_images("folder/", "train", data_dir=str(tmp_path))


def test_torchvision_folder_holds_the_same_items(tiny_images):
    folder = tiny_images(kind="folder")
    found = torchvision.datasets.ImageFolder(str(folder / "train"))
    assert sorted(keys(found)) == sorted(keys(load_labeled_images(str(folder), "train")))
    assert class_names(found) == ("class_0", "class_1")
    assert dataset_name(found) == str(folder / "train")


def test_torchvision_unreadable_file_is_named_by_its_row(tiny_images):
    folder = tiny_images(kind="folder") / "train"
    found = torchvision.datasets.ImageFolder(str(folder))
    (folder / "class_0" / "0002.png").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"image 1 \(0002.png\) of .* cannot be decoded"):
        read_item(found, 1)
    (folder / "class_0" / "0002.png").unlink()
    with pytest.raises(InputError, match=r"image 1 \(0002.png\) of .* cannot be read .*; repair or remove it"):
        read_item(found, 1)


def test_torchvision_folder_of_16_bit_images_is_refused(tiny_images):
    folder = tiny_images(kind="folder") / "train"
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(folder / "class_0" / "0002.png")
    with pytest.raises(InputError, match=r"image 1 \(0002.png\) of .* has 16-bit pixels"):
        read_item(torchvision.datasets.ImageFolder(str(folder)), 1)


def test_torchvision_folders_own_transforms_and_loader_are_used(tiny_images):
    folder = str(tiny_images(kind="folder") / "train")
    half = {"transform": lambda image: image.resize((8, 8)), "target_transform": lambda target: target + 5}
    image, label = read_item(torchvision.datasets.ImageFolder(folder, **half), 0)
    assert (image.size, label) == ((8, 8), 5)
    black = torchvision.datasets.ImageFolder(folder, loader=lambda path: Image.new("RGB", (4, 4)))
    assert read_item(black, 0)[0].getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("kind", ["torchvision", "other"])
def test_huge_image_of_any_dataset_is_refused_in_one_line(kind, tiny_images, monkeypatch):
    folder = tiny_images(kind="folder") / "train"
    options = {} if kind == "torchvision" else {"loader": lambda path: Image.open(path).convert("RGB")}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of 256
    with pytest.raises(
        InputError, match=r"^image 0 \(0000.png\) of .* \(Image size .256 pixels. exceeds .*; repair or remove"
    ):
        read_item(torchvision.datasets.ImageFolder(str(folder), **options), 0)


def test_image_that_is_read_late_is_refused_like_one_that_is_read_at_once(tmp_path):
    noise_image(0).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:400])
    (tmp_path / "deep.ppm").write_bytes(b"P6 2 2 65535\n" + bytes(24))
    with Image.open(tmp_path / "cut.png") as cut, Image.open(tmp_path / "deep.ppm") as deep:
        found = ImageList([cut, deep], [0, 0])
        with pytest.raises(InputError, match=r"image 0 of 'list' cannot be read \(image file is truncated"):
            read_item(found, 0)
        with pytest.raises(InputError, match="image 1 of 'list' has 16-bit pixels"):
            read_item(found, 1)


def test_dataset_of_tensors_is_an_error():
    found = torchvision.datasets.FakeData(size=2, transform=torchvision.transforms.ToTensor())
    with pytest.raises(InputTypeError, match="image 0 of 'FakeData' is a Tensor, expected a PIL image"):
        read_item(found, 0)


def test_raw_rows_of_datasets_are_an_error_with_the_remedy(tiny_images):
    rows = datasets.load_dataset(str(tiny_images()), split="train")
    with pytest.raises(
        InputTypeError, match=r"image 0 .* is a dict, expected \(PIL image, label\).*load_labeled_images"
    ):
        read_item(rows, 0)


def test_greyscale_items_of_any_dataset_become_rgb():
    image, _ = read_item(ImageList([noise_image(0).convert("L")], [0]), 0)
    assert image.mode == "RGB"


def test_subset_reads_and_names_the_row_of_its_dataset(tiny_images):
    found = load_labeled_images(str(tiny_images()), "train")
    part = torch.utils.data.Subset(torch.utils.data.Subset(found, [7, 5, 3]), [2, 0])
    assert keys(part) == [keys(found)[3], keys(found)[7]]
    assert row_name(part, 0) == found.row_name(3)
    assert class_names(part) == found.class_names


def test_subset_of_timms_dataset_does_not_replace_an_unreadable_file(tiny_images):
    folder = tiny_images(kind="folder") / "train"
    part = torch.utils.data.Subset(timm.data.ImageDataset(str(folder)), [1, 0])
    (folder / "class_0" / "0002.png").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"image 1 \(.*0002.png\)"):
        read_item(part, 0)


def test_concatenated_datasets_do_not_replace_an_unreadable_file(tiny_images):
    first = tiny_images(kind="folder", name="a") / "train"
    second = tiny_images(kind="folder", name="b", seed=1) / "train"
    found = torch.utils.data.ConcatDataset([timm.data.ImageDataset(str(folder)) for folder in (first, second)])
    assert keys(found) == keys(found.datasets[0]) + keys(found.datasets[1])
    (second / "class_0" / "0002.png").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"image 1 \(.*0002.png\)"):
        read_item(found, 9)
    assert class_names(found) == ("class_0", "class_1")


def test_data_dir_of_a_dataset_that_has_none_is_refused(tiny_images, tmp_path):
    with pytest.raises(InputError, match=r"--data-dir .*cache has no effect on .*images'"):
        load_labeled_images(str(tiny_images()), "train", data_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["a b", "{}", "new\nline", "hfds/a b", "-a", "a/b c", "a" * 97])
def test_name_that_is_no_folder_and_no_id_of_the_hub_is_refused_without_asking_it(name):
    with pytest.raises(InputError, match="is neither a folder that is there nor an id of the Hub"):
        load_labeled_images(name, "train")


@pytest.mark.parametrize("split", ["tset", "train[:3]", "holdout"])
@pytest.mark.parametrize("name", ["folder/", "torch/image_folder"])
def test_a_split_that_timm_would_read_as_another_is_refused(name, split, tiny_images):
    with pytest.raises(InputError, match=r"has no split .*, its folders are .'train'.; name one"):
        load_labeled_images(name, split, data_dir=str(tiny_images(kind="folder")))


@pytest.mark.parametrize("split", ["trian", "train[:4]"])
def test_a_split_that_timm_would_read_as_the_test_split_is_refused(split, tmp_path):
    with pytest.raises(InputError, match=r"'torch/cifar10' has no split .*, timm knows"):
        load_labeled_images("torch/cifar10", split, data_dir=str(tmp_path))


def test_names_of_a_split_are_those_that_timm_takes_for_one_another():
    assert (set(dataset_factory._TRAIN_SYNONYM), set(dataset_factory._EVAL_SYNONYM)) == TIMMS_SPLITS


def test_timm_dataset_knows_its_split(tiny_images):
    assert load_labeled_images("folder/", "train", data_dir=str(tiny_images(kind="folder"))).split == "train"


def test_classes_can_be_an_array():
    images = ImageList([noise_image(0, 8, 8)], [0])
    images.classes = np.array(["a", "b"])
    assert class_names(images) == ("a", "b")


def test_concatenated_datasets_are_read_from_their_end_too():
    parts = [ImageList([noise_image(seed, 8, 8)], [seed]) for seed in (0, 1)]
    assert read_item(torch.utils.data.ConcatDataset(parts), -1)[1] == 1
