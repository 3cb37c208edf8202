"""Settings of a build: what no manifest can hold is refused before it is written; what nothing uses is no setting."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from store_parts import build, files_of
from tiny_parts import ImageList, noise_image, tiny_manifest, tiny_score

from timm_igkd.attribution.options import IGOptions
from timm_igkd.errors import InputError, UserError
from timm_igkd.maps.manifest import read_manifest
from timm_igkd.maps.scores import SCORE, read_score
from timm_igkd.maps.store import MapStore
from timm_igkd.maps.store_files import first_difference, open_manifest
from timm_igkd.records import write_record

FOUR = ImageList([noise_image(seed) for seed in range(4)], [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_size": 2.5}, "shard_size must be a whole number, got 2.5"),
        ({"map_size": 8.5}, "map_size must be a whole number, got 8.5"),
        ({"chunk_size": 1.5}, "chunk_size must be a whole number, got 1.5"),
        ({"limit": 2.5}, "limit must be a whole number, got 2.5"),
        ({"limit": True}, "limit must be a whole number, got bool"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"shard": (0, 2.5)}, "shard must be two whole numbers, got (0, 2.5)"),
        ({"shard": (False, True)}, "shard must be two whole numbers, got (False, True)"),
        ({"shard": 3}, "shard must be two whole numbers, got 3"),
        ({"teacher_name": 3}, "teacher_name must be a name, got int"),
        ({"logits": 1}, "logits must be True or False, got int"),
        ({"compile": np.bool_(True)}, "compile must be True or False, got bool"),
        ({"options": lambda: IGOptions(max_steps=9.5)}, "max_steps must be a whole number, got 9.5"),
    ],
)
def test_setting_that_no_manifest_can_hold_is_refused_before_one_is_written(teacher, settings, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        build(teacher, FOUR, tmp_path / "maps", **{name: v() if callable(v) else v for name, v in settings.items()})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "maps").exists()


def test_numbers_of_numpy_and_torch_make_the_same_store(teacher, tmp_path):
    plain = {"limit": 3, "map_size": 8, "shard_size": 2, "chunk_size": 4, "shard": (0, 1)}
    options = {"options": IGOptions(n_steps=np.int64(2), tolerance=np.float32(0.5))}
    build(teacher, FOUR, tmp_path / "plain", **plain, options=IGOptions(n_steps=2, tolerance=0.5))
    others = {name: np.int64(value) for name, value in plain.items() if name != "shard"}
    others |= {"map_size": torch.tensor(8), "shard": (np.int32(0), np.int64(1))}
    build(teacher, FOUR, tmp_path / "numpy", **others, **options)
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "numpy")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("versions", {"torch": np.float32(2)}, "not JSON serializable"),
        ("dtype", "float32", None),
        ("logits", 1, "logits must be true or false, found 1"),
    ],
)
def test_manifest_that_could_not_be_read_back_is_not_written(part, value, message, tmp_path):
    manifest = replace(tiny_manifest(4), **{part: value})
    if message is None:
        assert open_manifest(tmp_path, manifest) == manifest
        return
    with pytest.raises(InputError, match=message):
        open_manifest(tmp_path / "maps", manifest)
    assert not (tmp_path / "maps").exists()


def test_option_that_fixed_steps_do_not_use_is_no_other_setting(teacher, tmp_path):
    first = build(teacher, FOUR, tmp_path / "maps", options=IGOptions(n_steps=2, tolerance=0.5))
    again = build(teacher, FOUR, tmp_path / "maps", options=IGOptions(n_steps=2, max_steps=9))
    assert again.provenance == first.provenance
    with pytest.raises(InputError, match=r"options\.n_steps is 2 there, 'auto' here"):
        build(teacher, FOUR, tmp_path / "maps", options=IGOptions(n_steps="auto"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (IGOptions(n_steps="auto", tolerance=0.5), "options.tolerance is 0.99 there, 0.5 here"),
        (IGOptions(n_steps="auto", max_steps=9), "options.max_steps is 64 there, 9 here"),
        (IGOptions(method="saliency"), "options.method is 'ig' there, 'saliency' here"),
        (IGOptions(n_steps=3), "options.n_steps is 'auto' there, 3 here"),
        (IGOptions(n_steps="auto"), None),
    ],
)
def test_used_options_are_settings(options, message):
    assert first_difference(tiny_manifest(4, options=IGOptions(n_steps="auto")), tiny_manifest(4, options=options)) == (
        message
    )


def test_score_is_of_maps_whose_unused_options_differ(teacher, tmp_path):
    store = build(teacher, FOUR, tmp_path / "maps", options=IGOptions(n_steps=2))
    score = replace(tiny_score(store.provenance), options=IGOptions(n_steps=2, tolerance=0.5))
    write_record(store.path / SCORE, score)
    assert read_score(store.path, store.provenance) == score
    write_record(store.path / SCORE, replace(score, options=IGOptions(n_steps=3)))
    assert read_score(store.path, store.provenance) is None


def test_store_with_an_unused_option_in_one_of_its_files_opens(teacher, tmp_path):
    store = build(teacher, FOUR, tmp_path / "maps", options=IGOptions(n_steps=2))
    content = json.loads((store.path / "manifest.json").read_text())
    content["options"]["max_steps"] = 9
    (store.path / "manifest.json").write_text(json.dumps(content))
    assert read_manifest(store.path).options.max_steps == 9
    assert len(MapStore(store.path)) == 4
