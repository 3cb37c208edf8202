"""Map stores: what is written comes back, belongs to its images, and is what the format says."""

import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from store_parts import TWO_STEPS, N, build, shards_of
from timm.data import ImageNetInfo
from tiny_parts import ImageList, noise_image, ramp, tiny_teacher, write_store

from timm_igkd.attribution.options import IGOptions, TeacherView
from timm_igkd.data.images import content_key
from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.maps.build import recompute_rows
from timm_igkd.maps.row_format import MapRow, decode_png, encode_png, quantize, rectify, row_hash, to_table
from timm_igkd.maps.store import MapStore

# ---- the format


def test_store_has_the_columns_of_its_format(built):
    rows = datasets.load_dataset("parquet", data_files=[str(path) for path in shards_of(built.path)], split="train")
    assert {name: str(kind) for name, kind in rows.features.items() if name not in ("map", "logits")} == {
        "key": "Value('string')",
        "label": "Value('int64')",
        "scale": "Value('float32')",
        "convergence_delta": "Value('float32')",
        "n_steps": "Value('int32')",
        "converged": "Value('bool')",
        "row_hash": "Value('string')",
    }
    assert isinstance(rows.features["map"], datasets.Image)
    assert rows.features["logits"].feature.dtype == "float32"


def test_store_without_logits_has_no_such_column(teacher, images, tmp_path):
    store = build(teacher, images, tmp_path)
    assert not store.has_logits
    assert "logits" not in store.rows.features


def test_folder_opens_with_datasets_and_shows_maps_as_images(built):
    rows = datasets.load_dataset(str(built.path), split="unknown")
    assert len(rows) == N
    image = rows[3]["map"]
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size, image.format) == ("L", (16, 16), "PNG")
    np.testing.assert_array_equal(np.asarray(image), built.levels(3))


def test_split_named_by_a_slice_opens_with_datasets(teacher, images, tmp_path):
    images = ImageList(images.images[:2], images.labels[:2])
    images.split = "train[:2]"
    build(teacher, images, tmp_path)
    assert list(datasets.load_dataset(str(tmp_path))) == ["train_2"]


def test_rows_saved_and_reloaded_are_equal(tmp_path):
    dataset = ImageList([noise_image(seed) for seed in range(5)], [3, 1, 4, 1, 5])
    maps = [ramp(index, 12, 9) for index in range(5)]
    logits = [np.random.default_rng(seed).normal(size=7).astype(np.float32) for seed in range(5)]
    store = write_store(tmp_path, dataset, maps, logits=logits, shard_size=2)
    assert len(store) == 5
    for row in range(5):
        assert store.rows[row]["key"] == content_key(dataset.images[row])
        assert store.rows[row]["label"] == dataset.labels[row]
        np.testing.assert_array_equal(store.levels(row), maps[row])
        np.testing.assert_array_equal(store.logits(row), logits[row])


def test_numbers_of_a_row_survive_the_table():
    row = MapRow("k", 2, ramp(0, 4, 4), 0.1, -3.5, 216, False)
    found = to_table([row]).to_pylist()[0]
    assert (found["key"], found["label"], found["n_steps"], found["converged"]) == ("k", 2, 216, False)
    assert found["scale"] == np.float32(0.1)
    assert found["convergence_delta"] == -3.5
    assert found["row_hash"] == row_hash(row)


def test_unsigned_levels_are_255_times_map_over_scale():
    values = np.random.default_rng(0).random((9, 7)).astype(np.float32) * 3
    levels, scale = quantize(values, False, "x")
    assert scale == values.max()
    np.testing.assert_array_equal(levels, np.round(255 * values / values.max()))
    assert levels.dtype == np.uint8


def test_signed_levels_are_128_plus_127_times_map_over_scale():
    values = np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32)
    levels, scale = quantize(values, True, "x")
    assert scale == np.abs(values).max()
    np.testing.assert_array_equal(levels, 128 + np.round(127 * values / scale))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("constant", [0.0, 2.5])
def test_constant_map_has_scale_0_and_no_level_of_its_own(signed, constant):
    levels, scale = quantize(np.full((3, 3), constant, np.float32), signed, "x")
    assert scale == 0
    assert (levels == (128 if signed else 0)).all()


def test_tiny_values_are_scaled_up():
    levels, scale = quantize(np.array([[1e-30, 5e-31]], np.float32), False, "x")
    assert scale > 0
    assert levels.tolist() == [[255, 128]]


def test_rectified_levels_are_the_positive_part():
    levels = Image.fromarray(np.array([[1, 127, 128, 129, 191, 255]], np.uint8))
    assert np.asarray(rectify(levels)).tolist() == [[0, 0, 0, 2, 126, 255]]


def test_png_keeps_every_level():
    np.testing.assert_array_equal(decode_png(encode_png(ramp(0, 33, 5))), ramp(0, 33, 5))


@pytest.mark.parametrize("reduction", ["abs_sum", "sum", "positive"])
def test_float_map_is_within_half_a_level_of_what_was_stored(teacher, images, tmp_path, reduction):
    store = build(teacher, images, tmp_path, options=IGOptions(n_steps=2, reduction=reduction))
    assert store.signed is (reduction == "sum")
    steps = 127 if store.signed else 255
    values = store.float_map(0)
    assert np.abs(values).max() == pytest.approx(store.rows[0]["scale"])
    assert bool(values.min() < 0) is store.signed
    levels, scale = quantize(values, store.signed, "x")
    np.testing.assert_array_equal(levels, store.levels(0))
    assert scale / steps > 0


def test_a_row_is_what_was_stored_and_its_map_is_decoded_once(built, teacher, images, monkeypatch):
    store, opened, opens = MapStore(built.path), [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(args) or opens(*args, **options))
    levels = store.levels(3)
    assert len(opened) == 1
    recompute_rows(store, teacher, images, N)
    assert len(opened) == 1 + N
    row, cells = store.row(3), store.rows[3]
    assert row_hash(row) == cells["row_hash"]
    assert (row.scale, row.n_steps, row.converged) == (cells["scale"], cells["n_steps"], cells["converged"])
    for found in (row.map, store.levels(3), np.asarray(store.overlay_map(3))):
        np.testing.assert_array_equal(found, levels)


# ---- what a build writes


def test_rows_are_the_images_in_order(built, images):
    assert built.rows["key"][:] == [content_key(image) for image in images.images]
    assert built.rows["label"][:] == images.labels
    assert built.rows["n_steps"][:] == [2] * N
    assert all(built.rows["converged"][:])


def test_shards_hold_the_asked_rows(built):
    assert [pq.read_metadata(path).num_rows for path in shards_of(built.path)] == [4, 4, 2]
    assert shards_of(built.path)[0].name == "unknown-00000-of-00003.parquet"


@pytest.mark.parametrize("name", ["lr=0.1", "hf:::x", "é", os.fsdecode(b"a\xff")])
def test_shards_are_read_by_arrow_alone_whatever_their_folder_is_called(built, tmp_path, monkeypatch, name):
    """Python's files end a process by an abort, now and then: a thread of Arrow frees them after the read."""
    read: list[type] = []
    for function in (pq.read_table, pq.read_metadata):
        monkeypatch.setattr(
            pq, function.__name__, lambda file, f=function, **given: (read.append(type(file)), f(file, **given))[1]
        )
    folder = shutil.copytree(built.path, tmp_path / name)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / f"{name} cache"))
    store = MapStore(folder)
    assert [store.row(row).label for row in range(N)] == [built.row(row).label for row in range(N)]
    assert set(read) == {pa.OSFile}


def test_stored_logits_are_the_models(built, teacher, images):
    with torch.no_grad():
        expected = teacher(torch.stack([TeacherView(teacher)(image) for image in images.images]))
    torch.testing.assert_close(torch.from_numpy(np.stack([built.logits(row) for row in range(N)])), expected)


def test_stored_delta_is_the_gap_of_the_maps_sum(teacher, images, tmp_path):
    options = IGOptions(n_steps=2, reduction="sum")
    store = build(teacher, images, tmp_path, options=options)
    with torch.no_grad():
        inputs = torch.stack([TeacherView(teacher)(image) for image in images.images])
        change = (
            (teacher(inputs) - teacher(inputs[:1] * 0)).gather(1, torch.tensor(images.labels)[:, None])[:, 0].numpy()
        )
    for row in range(N):
        rounding = store.rows[row]["scale"] / 127 * np.sqrt(16 * 16)
        assert store.float_map(row).sum() - change[row] == pytest.approx(
            store.rows[row]["convergence_delta"], abs=rounding
        )


def test_constant_image_at_its_baseline_gives_a_map_of_zeros(teacher, tmp_path):
    black = ImageList([Image.new("RGB", (16, 16)), noise_image(0)], [0, 1])
    store = build(teacher, black, tmp_path, options=IGOptions(n_steps=2, baseline="black"))
    assert store.rows[0]["scale"] == 0
    assert not store.levels(0).any()
    assert store.provenance.statistics.constant_maps == 1


@pytest.mark.parametrize("size", [1, 5, 8])
def test_map_size_makes_smaller_maps(teacher, images, tmp_path, size):
    store = build(teacher, images, tmp_path, map_size=size)
    assert {store.levels(row).shape for row in range(N)} == {(size, size)}


def test_map_size_averages(teacher, images, tmp_path):
    whole, half = build(teacher, images, tmp_path / "a"), build(teacher, images, tmp_path / "b", map_size=8)
    expected = whole.float_map(0).reshape(8, 2, 8, 2).mean((1, 3))
    assert np.abs(half.float_map(0) - expected).max() <= whole.rows[0]["scale"] / 255


def test_map_size_beyond_the_teachers_input_keeps_it(teacher, images, tmp_path):
    assert build(teacher, images, tmp_path, map_size=99).levels(0).shape == (16, 16)


def test_images_of_any_size_and_one_pixel_get_maps(teacher, tmp_path):
    dataset = ImageList([noise_image(0, 1, 1), noise_image(1, 50, 20), noise_image(2)], [0, 1, 2])
    store = build(teacher, dataset, tmp_path)
    store.verify(dataset)
    assert store.levels(0).shape == (16, 16)


def test_provenance_says_what_made_the_maps(built, teacher):
    found = built.provenance
    assert found.dataset.name == "noise"
    assert found.dataset.num_images == found.n == N
    assert found.teacher.architecture == "test_resnet"
    assert found.teacher.mean == tuple(teacher.pretrained_cfg["mean"])
    assert len(found.teacher.weights_sha256) == 64
    assert found.options == TWO_STEPS
    assert {"timm", "torch", "captum", "pillow", "datasets"} <= found.versions.keys()
    assert len(found.keys_hash) == 32


def test_keys_hash_depends_on_the_order(built, teacher, images, tmp_path):
    turned = ImageList(images.images[::-1], images.labels[::-1], name="noise")
    assert build(teacher, turned, tmp_path).provenance.keys_hash != built.provenance.keys_hash


def test_dataset_card_names_teacher_data_and_options(built):
    card = (built.path / "README.md").read_text()
    assert "test_resnet" in card
    assert "noise" in card
    assert built.provenance.teacher.weights_sha256 in card
    assert built.provenance.keys_hash in card


@pytest.mark.parametrize("engine", ["captum", "fast"])
def test_both_engines_build_the_same_maps_to_a_level(built, teacher, images, tmp_path, engine):
    store = build(teacher, images, tmp_path, engine=engine)
    assert max(np.abs(store.levels(row).astype(int) - built.levels(row)).max() for row in range(N)) <= 1
    assert store.provenance.engine == engine


def test_wordnet_classes_are_mapped_to_the_teachers_1000(tmp_path):
    model = tiny_teacher("test_resnet", classes=1000, size=16)
    assert (model.pretrained_cfg["num_classes"], model.num_classes) == (1000, 1000)
    names = ["n03445777", "n01440764"]
    columns = ImageNetInfo().label_names()
    indices = [columns.index(name) for name in names]
    dataset = ImageList([noise_image(0), noise_image(1), noise_image(2)], [0, 1, 0])
    dataset.classes = names
    store = build(model, dataset, tmp_path / "a", logits=True, options=IGOptions(n_steps=2, reduction="sum"))
    assert store.provenance.teacher.class_indices == tuple(indices)
    with torch.no_grad():
        inputs = torch.stack([TeacherView(model)(image) for image in dataset.images])
        expected = model(inputs)[:, indices]
    torch.testing.assert_close(torch.from_numpy(np.stack([store.logits(row) for row in range(3)])), expected)
    direct = ImageList(dataset.images, [indices[0], indices[1], indices[0]])
    same = build(model, direct, tmp_path / "b", options=IGOptions(n_steps=2, reduction="sum"))
    assert all(np.array_equal(same.levels(row), store.levels(row)) for row in range(3))
    assert [same.rows[name][:] == store.rows[name][:] for name in ("scale", "convergence_delta")] == [True, True]


def test_label_the_teacher_does_not_know_is_named(teacher, tmp_path):
    with pytest.raises(InputError, match="image 1 of 'list' has label 3, but the teacher knows classes 0 to 2"):
        build(teacher, ImageList([noise_image(0), noise_image(1)], [0, 3]), tmp_path)


def test_unknown_label_is_no_matter_for_the_predicted_class(teacher, tmp_path):
    dataset = ImageList([noise_image(0), noise_image(1)], [0, -1])
    assert len(build(teacher, dataset, tmp_path, options=IGOptions(n_steps=2, target="predicted"))) == 2


def test_a_path_is_never_a_repository_of_the_hub():
    with pytest.raises(MissingFileError, match="maps/run1"):
        MapStore(Path("maps/run1"))


@pytest.mark.parametrize("index", [-1, -N, -N - 1, np.int64(-3)])
def test_negative_position_is_from_the_end_of_the_images(built, images, index):
    wanted = index % N
    assert built.find(*images[wanted], index, "it") == wanted


@pytest.mark.parametrize("index", [-1, -5, -N])
def test_negative_position_of_a_prefix_is_one_that_it_covers_or_not(teacher, images, tmp_path, index):
    store = build(teacher, images, tmp_path / "maps", limit=4)
    if index == -N:
        assert store.find(*images[index], index, "it") == 0
        return
    with pytest.raises(InputError, match=r"^it has no map: the store covers the first 4 of 10 images"):
        store.find(*images[index], index, "it")


def test_other_images_at_a_position_that_a_prefix_covers_are_not_told_to_build_more(teacher, images, tmp_path):
    store = build(teacher, images, tmp_path / "maps", limit=4)
    with pytest.raises(InputError, match=r"in none of the 4 rows, .* split '.*', the first of 10 images .* this data"):
        store.find(noise_image(99), 0, 2, "it")
