"""The card of a store of maps."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from hub_parts import code_blocks
from huggingface_hub import DatasetCard
from huggingface_hub.repocard_data import DatasetCardData
from PIL import Image
from tiny_parts import ImageList, noise_image, ramp, write_store

from timm_igkd.hub.cards import is_untouched
from timm_igkd.maps import card as card_module
from timm_igkd.maps import store_files
from timm_igkd.maps.card import dataset_card, map_picture

pytestmark = pytest.mark.hub


def test_store_holds_its_card_and_builds_it_the_same_each_time(store):
    text = (store.path / "README.md").read_text(encoding="utf-8")
    assert text == dataset_card(store.provenance)
    assert is_untouched(text)
    assert "maps.png" not in text


def test_metadata_of_the_dataset_card_is_valid(store):
    data = DatasetCard(dataset_card(store.provenance, "user/maps")).data
    assert isinstance(data, DatasetCardData)
    assert data.size_categories == ["n<1K"]
    assert data.task_categories == ["image-classification"]
    (config,) = data.configs
    assert config["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]


def test_dataset_card_tells_the_provenance(store):
    card = dataset_card(store.provenance, "user/maps")
    for part in (store.provenance.keys_hash, store.provenance.teacher.weights_sha256, "![Maps of 10 images"):
        assert part in card
    assert "all 10 images, in order" in card
    assert 'MapStore("user/maps")' in code_blocks(card)[0]


def test_words_of_the_template_keep_their_spaces(store):
    named = replace(store.provenance, dataset=replace(store.provenance.dataset, class_names=("a", "b")))
    card = dataset_card(named, "user/maps")
    assert "the image's label among 2 classes; -1" in card
    assert re.search(r"\| Made with \| timm\\_igkd [\d.]+\w*, python [\d.]+, torch ", card)


def test_card_of_a_prefix_says_so(store):
    provenance = replace(store.provenance, dataset=replace(store.provenance.dataset, num_images=90))
    assert "a prefix, the first 10 of 90 images" in dataset_card(provenance)


def test_picture_shows_maps_of_all_classes_and_is_the_same_each_time(store):
    first, again = (map_picture(store.path, store.provenance) for _ in range(2))
    assert first == again
    pixels = np.asarray(Image.open(io.BytesIO(first)).convert("L"))
    assert pixels.std() > 20


@pytest.fixture
def drawn(monkeypatch):
    """Return what is written below the maps of a picture, and which shards it reads."""
    captions, shards = [], []
    read = store_files.read_shard
    monkeypatch.setattr(store_files, "read_shard", lambda *args: (shards.append(args[2]), read(*args))[1])
    monkeypatch.setattr(card_module, "shorten", lambda label, *_: captions.append(label) or label)
    return captions, shards


def test_picture_reads_each_shard_once(tmp_path, drawn):
    images = ImageList([noise_image(index) for index in range(30)], [index % 3 for index in range(30)])
    store = write_store(tmp_path / "maps", images, [ramp(index, 8, 8) for index in range(30)], shard_size=8)
    captions, shards = drawn
    map_picture(store.path, store.provenance)
    assert shards == [0, 1, 2, 3]
    wanted = [index * 30 // 24 for index in range(24)]
    assert captions == [str(index % 3) for index in wanted]


def test_picture_names_classes_as_people_read_them(tmp_path, drawn):
    images = ImageList([noise_image(index) for index in range(4)], [0, 1, -1, 5])
    store = write_store(tmp_path / "maps", images, [ramp(index, 8, 8) for index in range(4)])
    named = replace(store.provenance.dataset, class_names=("n01440764", "n02102040"))
    map_picture(store.path, replace(store.provenance, dataset=named))
    assert drawn[0] == ["tench", "English springer", "no label", "5"]
