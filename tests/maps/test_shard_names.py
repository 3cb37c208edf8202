"""Names of shards: words that `datasets` takes for a split, whatever the images' own is called."""

import json

import datasets
import pytest
from hub_parts import HUB_MARKS
from store_parts import build, shards_of
from tiny_parts import ImageList, noise_image, tiny_manifest
from torch import nn

from timm_igkd.hub.cards import metadata
from timm_igkd.maps.manifest import SourceDataset
from timm_igkd.maps.push import push_maps
from timm_igkd.maps.store import MapStore
from timm_igkd.maps.store_files import split_in_names


def images_of(split: str) -> ImageList:
    images = ImageList([noise_image(seed) for seed in range(5)], [0, 1, 2, 0, 1])
    images.split = split
    return images


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("train", "train"),
        ("all", "all_splits"),
        ("All", "All_splits"),
        ("[all]", "all_splits"),
        ("all[:3]", "all_3"),
        ("train+test", "train_test"),
        ("unknown", "unknown"),
    ],
)
def test_split_is_a_word_that_is_one_split(split, name):
    assert split_in_names(tiny_manifest(2, dataset=SourceDataset(name="x", split=split, num_images=2))) == name


@pytest.mark.parametrize("split", ["all", "All", "train[:50%]+test", "unknown"])
def test_rows_of_any_split_are_read_as_the_card_says(teacher: nn.Module, split, tmp_path):
    store = build(teacher, images_of(split), tmp_path / "maps", shard_size=2)
    (files,) = metadata((tmp_path / "maps" / "README.md").read_text())["configs"][0]["data_files"]
    rows = datasets.load_dataset(str(tmp_path / "maps"), split=files["split"], cache_dir=str(tmp_path / "cache"))
    assert rows["key"][:] == [store.row(row).key for row in range(5)]


def earlier_store(teacher: nn.Module, folder) -> MapStore:
    """Build a store of split `all` whose shards are called as an earlier version called them."""
    build(teacher, images_of("all"), folder, shard_size=2)
    for path in shards_of(folder):
        path.rename(path.with_name(path.name.replace("all_splits", "all")))
    return MapStore(folder)


def test_shards_of_an_earlier_version_are_read_and_built_on(teacher, tmp_path):
    store = earlier_store(teacher, tmp_path / "maps")
    keys = [store.row(row).key for row in range(5)]
    shards_of(store.path)[1].unlink()
    again = build(teacher, images_of("all"), store.path, shard_size=2)
    assert [again.row(row).key for row in range(5)] == keys
    assert [path.name for path in shards_of(store.path)] == [f"all-0000{shard}-of-00003.parquet" for shard in range(3)]


@HUB_MARKS[0]
@HUB_MARKS[1]
def test_shards_of_an_earlier_version_are_pushed_under_the_names_of_the_card(hub, teacher, tmp_path):
    push_maps(earlier_store(teacher, tmp_path / "maps").path, "user/maps")
    files = hub.repo("user/maps", "datasets").files
    assert {name for name in files if name.startswith("data/")} == {
        f"data/all_splits-0000{shard}-of-00003.parquet" for shard in range(3)
    }
    assert 'split="all_splits"' in files["README.md"].decode()
    assert json.loads(files["manifest.json"])["dataset"]["split"] == "all"
    assert len(MapStore("user/maps").rows) == 5
