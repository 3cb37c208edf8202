"""What a store says of its images: their split, whether they were chosen, and what its card makes of both."""

import json
import types

import pytest
import timm.data
from store_parts import SHARD, build, files_of
from tiny_parts import ImageList, noise_image, tiny_manifest
from torch.utils.data import ConcatDataset, Subset

from timm_igkd.data.items import UNKNOWN_SPLIT, is_part, split_name
from timm_igkd.data.loading import load_labeled_images
from timm_igkd.errors import InputError
from timm_igkd.maps.card import _coverage
from timm_igkd.maps.manifest import SourceDataset, read_manifest
from timm_igkd.maps.store import MapStore

FOUR = ImageList([noise_image(seed) for seed in range(4)], [0, 1, 0, 1])


def images_with(**attributes) -> ImageList:
    images = ImageList(FOUR.images, FOUR.labels)
    vars(images).update(attributes)
    return images


@pytest.mark.parametrize(
    ("dataset", "wanted"),
    [
        (images_with(split="test"), "test"),
        (images_with(), UNKNOWN_SPLIT),
        (images_with(reader=types.SimpleNamespace(split="validation")), "validation"),  # timm's hfds/
        (images_with(train=False), "test"),  # torchvision's CIFAR
        (images_with(train=True), "train"),
        (images_with(split=lambda share: share), UNKNOWN_SPLIT),
        (Subset(Subset(images_with(split="test"), [2, 1]), [1]), "test"),
        (
            ConcatDataset([images_with(split="train"), images_with(split="test"), images_with(split="train")]),
            "train+test",
        ),
    ],
)
def test_split_is_what_the_images_or_their_reader_name(dataset, wanted):
    assert split_name(dataset) == wanted


def test_split_of_timms_folder_is_unknown_where_it_was_opened_without_ours(tiny_images):
    folder = tiny_images(kind="folder")
    assert split_name(timm.data.ImageDataset(str(folder / "train"))) == UNKNOWN_SPLIT
    assert split_name(load_labeled_images("folder/", "train", data_dir=str(folder))) == "train"


def test_chosen_images_are_told_from_all(tiny_images):
    rows = load_labeled_images(str(tiny_images()), "train")
    assert not is_part(rows)
    assert not is_part(Subset(FOUR, range(4)))
    assert not is_part(ConcatDataset([FOUR, FOUR]))
    assert is_part(rows.subset([0]))
    assert is_part(Subset(FOUR, [1, 0, 2, 3]))
    assert is_part(ConcatDataset([FOUR, Subset(FOUR, [0])]))


@pytest.mark.parametrize(
    ("chosen", "n", "words"),
    [
        (False, 4, "all 4 images, in order"),
        (True, 4, "4 chosen images"),
        (False, 3, "a prefix, the first 3 of 4 images"),
        (True, 3, "a prefix, the first 3 of 4 chosen images"),
    ],
)
def test_card_says_which_images_have_maps(chosen, n, words):
    source = SourceDataset(name="list", split="test", num_images=4, is_part=chosen)
    assert _coverage(tiny_manifest(n, dataset=source)) == words


def test_part_of_an_unknown_split_claims_neither_train_nor_all(teacher, images, tmp_path):
    build(teacher, Subset(images, [5, 0, 2]), tmp_path / "maps")
    source = read_manifest(tmp_path / "maps").dataset
    assert (source.split, source.is_part, source.num_images) == (UNKNOWN_SPLIT, True, 3)
    card = (tmp_path / "maps" / "README.md").read_text()
    assert "3 chosen images" in card
    assert "train" not in {path.name.partition("-")[0] for path in (tmp_path / "maps" / "data").iterdir()}
    MapStore(tmp_path / "maps").verify(Subset(images, [5, 0, 2]))


def earlier_store(folder) -> None:
    """Make a store what an earlier version wrote of images without a split: it called that train, and told no part."""
    for name in ("manifest.json", "provenance.json"):
        content = json.loads((folder / name).read_text())
        content["dataset"]["split"] = "train"
        del content["dataset"]["is_part"]
        (folder / name).write_text(json.dumps(content))
    for path in (folder / "data").iterdir():
        path.rename(path.with_name(path.name.replace(UNKNOWN_SPLIT, "train")))


def test_store_of_an_earlier_version_is_read_and_gone_on_with(teacher, images, tmp_path):
    build(teacher, images, tmp_path / "maps")
    earlier_store(tmp_path / "maps")
    rows = [MapStore(tmp_path / "maps").row(row).key for row in range(len(images))]
    (tmp_path / "maps" / "data" / "train-00001-of-00003.parquet").unlink()
    (tmp_path / "maps" / "provenance.json").unlink()
    before = files_of(tmp_path / "maps" / "data")
    store = build(teacher, images, tmp_path / "maps")
    assert store.provenance.dataset.split == "train"
    assert [store.row(row).key for row in range(len(images))] == rows
    after = files_of(tmp_path / "maps" / "data")
    assert len(after) == -(-len(images) // SHARD)
    assert before.items() <= after.items()


def test_store_of_a_named_split_is_not_gone_on_with_for_another(teacher, images, tmp_path):
    build(teacher, images, tmp_path / "maps")
    other = ImageList(images.images, images.labels, name="noise")
    other.split = "test"
    with pytest.raises(InputError, match=r"dataset\.split is 'unknown' there, 'test' here"):
        build(teacher, other, tmp_path / "maps")


def test_prefix_of_an_unknown_split_is_rebuilt_without_naming_one(teacher, images, tmp_path):
    store = build(teacher, images, tmp_path / "maps", limit=4)
    with pytest.raises(InputError, match=r"rebuild it without --limit: timm-igkd maps$"):
        store.find(images[7][0], 1, 7, "image 7")
