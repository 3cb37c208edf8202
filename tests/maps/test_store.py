"""Map stores: what is written comes back, belongs to its images, and is the same however it was built."""

import io
import json
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from tiny_parts import ImageList, noise_image, ramp, tiny_teacher, write_store
from torch import nn

from timm_igkd.attribution.options import IGOptions, TeacherView
from timm_igkd.data.images import content_key
from timm_igkd.data.items import read_item
from timm_igkd.data.loading import load_labeled_images
from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.files import read_mapping
from timm_igkd.maps.build import compute_maps, recompute_rows
from timm_igkd.maps.manifest import Provenance
from timm_igkd.maps.row_format import MapRow, decode_png, encode_png, quantize, rectify, row_hash, to_table
from timm_igkd.maps.store import MapStore
from timm_igkd.models.loading import save_model

N, SHARD = 10, 4
TWO_STEPS = IGOptions(n_steps=2)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return tiny_teacher(classes=3, size=16)


@pytest.fixture(scope="module")
def images() -> ImageList:
    return ImageList([noise_image(seed) for seed in range(N)], [index % 3 for index in range(N)], name="noise")


def build(teacher: nn.Module, dataset: Any, folder: Path, **options: Any) -> MapStore | None:
    defaults = {"options": TWO_STEPS, "shard_size": SHARD, "progress": False}
    return compute_maps(teacher, dataset, folder, **defaults | options)


@pytest.fixture(scope="module")
def built(teacher, images, tmp_path_factory) -> MapStore:
    """A store that no test alters."""
    store = build(teacher, images, tmp_path_factory.mktemp("built") / "maps", logits=True)
    assert store is not None
    return store


@pytest.fixture
def copied(built, tmp_path) -> Path:
    """A copy to alter."""
    return Path(shutil.copytree(built.path, tmp_path / "copied"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards_of(folder: Path) -> list[Path]:
    return sorted((folder / "data").glob("*.parquet"))


def altered(folder: Path, row: int, **cells: Any) -> Path:
    """Rewrite the shard of one row with other cells, as someone would who repairs nothing else."""
    path = shards_of(folder)[row // SHARD]
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[row % SHARD] |= cells
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return folder


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
    rows = datasets.load_dataset(str(built.path), split="train")
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


# ---- what a build writes


def test_rows_are_the_images_in_order(built, images):
    assert built.rows["key"][:] == [content_key(image) for image in images.images]
    assert built.rows["label"][:] == images.labels
    assert built.rows["n_steps"][:] == [2] * N
    assert all(built.rows["converged"][:])


def test_shards_hold_the_asked_rows(built):
    assert [pq.read_metadata(path).num_rows for path in shards_of(built.path)] == [4, 4, 2]
    assert shards_of(built.path)[0].name == "train-00000-of-00003.parquet"


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


# ---- the same bytes however it is built


def test_same_build_gives_the_same_bytes(built, teacher, images, tmp_path):
    build(teacher, images, tmp_path, logits=True)
    assert files_of(tmp_path) == files_of(built.path)


def test_building_again_changes_nothing(copied, teacher, images):
    before = files_of(copied)
    build(teacher, images, copied, logits=True)
    assert files_of(copied) == before


def test_two_machines_merged_give_the_bytes_of_one(built, teacher, images, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert build(teacher, images, first, logits=True, shard=(0, 2)) is None
    assert build(teacher, images, second, logits=True, shard=(1, 2)) is None
    assert [len(shards_of(folder)) for folder in (first, second)] == [2, 1]
    shutil.copytree(second / "data", first / "data", dirs_exist_ok=True)
    assert len(build(teacher, images, first, logits=True)) == N
    assert files_of(first) == files_of(built.path)


def test_two_machines_in_one_folder_give_the_bytes_of_one(built, teacher, images, tmp_path):
    assert build(teacher, images, tmp_path, logits=True, shard=(0, 2)) is None
    assert len(build(teacher, images, tmp_path, logits=True, shard=(1, 2))) == N
    assert files_of(tmp_path) == files_of(built.path)


def test_unfinished_store_is_refused_with_the_remedy(teacher, images, tmp_path):
    build(teacher, images, tmp_path, shard=(0, 2))
    with pytest.raises(InputError, match=r"not complete \(2 of 3 shards\); run the same .* again"):
        MapStore(tmp_path)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_part_out_of_range_is_refused(teacher, images, tmp_path, shard):
    with pytest.raises(InputError, match="shard must be i/n with 0 <= i < n"):
        build(teacher, images, tmp_path, shard=shard)
    assert not list(tmp_path.iterdir())


def test_resume_keeps_finished_shards(copied, teacher, images, built):
    first, second, third = shards_of(copied)
    (copied / "provenance.json").unlink()
    second.unlink()
    times = first.stat().st_mtime_ns, third.stat().st_mtime_ns
    build(teacher, images, copied, logits=True)
    assert (first.stat().st_mtime_ns, third.stat().st_mtime_ns) == times
    assert files_of(copied) == files_of(built.path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "altered map", "lost row"])
def test_resume_rebuilds_a_damaged_shard_and_names_it(copied, teacher, images, built, damage, capsys):
    path = shards_of(copied)[1]
    data = bytearray(path.read_bytes())
    if damage == "altered map":
        altered(copied, 5, map={"bytes": encode_png(ramp(0, 16, 16)), "path": None})
    elif damage == "lost row":
        pq.write_table(pq.read_table(path).slice(0, 3), path)
    else:
        data[len(data) // 3] ^= 0x10
        path.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "empty": b""}[damage])
    build(teacher, images, copied, logits=True)
    assert files_of(copied) == files_of(built.path)
    printed = capsys.readouterr()
    assert re.search(rf"rebuilding: .*{path.name}", printed.out + printed.err)


def test_what_a_kill_leaves_is_no_shard_and_goes_away(copied, teacher, images, built):
    shard = shards_of(copied)[2]
    shard.rename(shard.with_name(f".{shard.name}.123.tmp"))
    (copied / "provenance.json").unlink()
    build(teacher, images, copied, logits=True)
    assert files_of(copied) == files_of(built.path)


def test_corrupt_image_is_named_and_finished_shards_stay(teacher, tiny_images, tmp_path):
    folder = tiny_images(kind="folder", n=10, classes=3)
    dataset = load_labeled_images(str(folder), "train")
    bad = Path(dataset.rows[6]["image"]["path"])
    good = bad.read_bytes()
    bad.write_bytes(good[:80])
    with pytest.raises(InputError, match=rf"image 6 \({bad.name}\) of .* cannot be decoded"):
        build(teacher, dataset, tmp_path / "maps")
    assert len(shards_of(tmp_path / "maps")) == 1
    assert not (tmp_path / "maps" / "provenance.json").exists()
    bad.write_bytes(good)
    assert len(build(teacher, dataset, tmp_path / "maps")) == 10
    build(teacher, dataset, tmp_path / "uninterrupted")
    assert files_of(tmp_path / "maps") == files_of(tmp_path / "uninterrupted")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"options": IGOptions(n_steps=3)}, "options.n_steps is 2 there, 3 here"),
        ({"options": IGOptions(n_steps=2, baseline="black")}, "options.baseline is 'mean' there, 'black' here"),
        ({"options": IGOptions(n_steps=2, output="probability")}, "options.output"),
        ({"options": IGOptions(n_steps=2, reduction="sum")}, "options.reduction"),
        ({"options": IGOptions(n_steps=2, target="predicted")}, "options.target"),
        ({"engine": "captum"}, "engine is 'fast' there, 'captum' here"),
        ({"map_size": 8}, "map_size is None there, 8 here"),
        ({"logits": False}, "logits is True there, False here"),
        ({"limit": 5}, "n is 10 there, 5 here"),
        ({"shard_size": 5}, "shard_rows is 4 there, 5 here"),
        ({"chunk_size": 3}, "chunk_size is .* there, 3 here"),
    ],
)
def test_other_settings_into_the_same_folder_are_refused_and_named(copied, teacher, images, change, name):
    before = files_of(copied)
    with pytest.raises(InputError, match=f"holds maps made with other settings: {name}.* choose another --out"):
        build(teacher, images, copied, **{"logits": True} | change)
    assert files_of(copied) == before


def test_another_teacher_into_the_same_folder_is_refused(copied, images):
    with pytest.raises(InputError, match=r"other settings: teacher.weights_sha256 is"):
        build(tiny_teacher(classes=3, size=16, seed=1), images, copied, logits=True)


def test_another_normalisation_into_the_same_folder_is_refused(copied, images):
    other = tiny_teacher(classes=3, size=16)
    other.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    with pytest.raises(InputError, match=r"other settings: teacher.mean is"):
        build(other, images, copied, logits=True)


def test_other_data_of_the_same_name_into_the_same_folder_is_refused(copied, teacher, images):
    other = ImageList([noise_image(seed + 50) for seed in range(N)], images.labels, name="noise")
    with pytest.raises(InputError, match="holds maps of other data: row 0 is not image 0 of 'noise'"):
        build(teacher, other, copied, logits=True)


def test_folder_with_other_files_is_no_store(teacher, images, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds data but no manifest.json, so it is no store"):
        build(teacher, images, tmp_path)


def test_file_in_the_stores_place_is_an_error(teacher, images, tmp_path):
    (tmp_path / "maps").write_text("mine")
    with pytest.raises(InputError, match="maps' is a file, expected a folder"):
        build(teacher, images, tmp_path / "maps")
    assert (tmp_path / "maps").read_text() == "mine"


@pytest.mark.parametrize("name", ["limit", "map_size", "shard_size", "chunk_size"])
def test_size_below_1_is_refused(teacher, images, tmp_path, name):
    with pytest.raises(InputError, match=f"{name} must be"):
        build(teacher, images, tmp_path, **{name: 0})


def test_limited_store_says_that_it_is_a_prefix(teacher, images, tmp_path):
    store = build(teacher, images, tmp_path, limit=5)
    assert len(store) == 5
    assert (store.provenance.n, store.provenance.dataset.num_images) == (5, N)
    assert "a prefix, the first 5 of 10 images" in (tmp_path / "README.md").read_text()
    store.verify(images)
    with pytest.raises(
        InputError, match="image 7 has no map: the store covers the first 5 of 10 images of split 'train'"
    ):
        store.find(images.images[7], images.labels[7], 7, "image 7")


def test_limit_beyond_the_dataset_is_the_whole(teacher, images, tmp_path):
    assert build(teacher, images, tmp_path, limit=999).provenance.n == N


# ---- verify


def test_verify_passes_on_its_data(built, images):
    built.verify(images)


def test_verify_passes_on_a_copied_folder(copied, images):
    MapStore(copied).verify(images)


def test_verify_passes_on_rows_encoded_again_without_loss(built, images):
    again = []
    for image, kind in zip(images.images, ("PNG", "BMP", "TIFF", "WEBP", "PPM") * 2, strict=True):
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
        again.append(Image.open(buffer))
    built.verify(ImageList(again, images.labels))


def test_verify_names_the_row_of_a_shuffled_copy(built, images):
    order = [0, 1, 3, 2, *range(4, N)]
    shuffled = ImageList([images.images[i] for i in order], [images.labels[i] for i in order], name="shuffled")
    with pytest.raises(InputError, match="row 2 does not belong to image 2 of 'shuffled': the pixels differ"):
        built.verify(shuffled)


@pytest.mark.parametrize("n", [N, 4, 20])
def test_verify_names_the_row_of_another_split(built, n):
    other = ImageList([noise_image(seed + 100) for seed in range(n)], [0] * n, name="other")
    with pytest.raises(InputError, match="row 0 does not belong to image 0 of 'other'"):
        built.verify(other)


@pytest.mark.parametrize(("n", "row"), [(4, 4), (12, 10)])
def test_verify_names_the_first_row_without_its_counterpart(built, images, n, row):
    more = [*images.images, noise_image(50), noise_image(51)][:n]
    other = ImageList(more, [index % 3 for index in range(n)])
    with pytest.raises(
        InputError, match=f"has {n} images, but the maps were made from a split of 10; row {row} is the first"
    ):
        built.verify(other)


def test_verify_names_the_row_of_a_changed_label(built, images):
    other = ImageList(images.images, [*images.labels[:6], 2, *images.labels[7:]], name="relabelled")
    with pytest.raises(InputError, match="row 6 has label 0, image 6 of 'relabelled' has 2"):
        built.verify(other)


@pytest.mark.parametrize("row", [0, 5, 9])
def test_verify_names_the_row_of_an_altered_map(copied, built, images, row):
    levels = built.levels(row).copy()
    levels[3, 3] ^= 1
    altered(copied, row, map={"bytes": encode_png(levels), "path": None})
    with pytest.raises(InputError, match=rf"the map of image {row} of 'noise' \(row {row}\) is damaged"):
        MapStore(copied).verify(images)


@pytest.mark.parametrize("cells", [{"scale": 7.0}, {"map": {"bytes": b"no picture", "path": None}}])
def test_verify_names_the_row_of_an_altered_cell(copied, images, cells):
    altered(copied, 6, **cells)
    with pytest.raises(InputError, match=r"the map of image 6 of 'noise' \(row 6\) is damaged"):
        MapStore(copied).verify(images)


def test_verify_reads_the_files_and_not_a_cache_of_them(copied, built, images):
    import os

    MapStore(copied).verify(images)
    times = shards_of(copied)[1].stat()
    altered(copied, 5, scale=7.0)
    os.utime(shards_of(copied)[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match=r"\(row 5\) is damaged"):
        MapStore(copied).verify(images)


def rehashed(folder: Path, row: int, levels: np.ndarray, scale: float) -> None:
    """Give a row another map and the hash that fits it."""
    cells = pq.read_table(shards_of(folder)[row // SHARD]).to_pylist()[row % SHARD]
    numbers = {name: cells[name] for name in ("key", "label", "convergence_delta", "n_steps", "converged")}
    made = MapRow(map=levels, scale=scale, logits=np.asarray(cells["logits"], np.float32), **numbers)
    altered(folder, row, map={"bytes": encode_png(levels), "path": None}, scale=scale, row_hash=row_hash(made))


def test_maps_swapped_with_fitting_hashes_fail_recompute(copied, built, teacher, images):
    for row, other in ((0, 1), (1, 0)):
        rehashed(copied, row, built.levels(other), built.rows[other]["scale"])
    store = MapStore(copied)
    store.verify(images)
    worst, correlation = recompute_rows(store, teacher, images, N)
    assert worst > 2
    assert correlation < 0.999


def test_missing_store_is_an_error(tmp_path):
    with pytest.raises(MissingFileError, match=r"map store .*nowhere' does not exist; build it with"):
        MapStore(tmp_path / "nowhere")


def test_other_folder_is_no_store(tmp_path):
    with pytest.raises(MissingFileError, match="is no map store"):
        MapStore(tmp_path)


def test_lost_shard_is_an_error(copied):
    shards_of(copied)[1].unlink()
    with pytest.raises(InputError, match=r"not complete \(2 of 3 shards\)"):
        MapStore(copied)


def test_cut_shard_is_an_error(copied):
    path = shards_of(copied)[1]
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"cannot be read|corrupt"):
        MapStore(copied)


def test_broken_manifest_is_an_error(copied):
    (copied / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest.json' is not JSON"):
        MapStore(copied)


# ---- recompute


def test_recomputed_maps_are_the_stored_ones(built, teacher, images):
    worst, correlation = recompute_rows(built, teacher, images, 5)
    assert worst <= 1
    assert correlation > 0.9999


def test_recompute_detects_another_teacher(built, images):
    worst, correlation = recompute_rows(built, tiny_teacher(classes=3, size=16, seed=5), images, 5)
    assert worst > 2
    assert correlation < 0.999


def test_recompute_detects_a_map_made_constant(copied, teacher, images):
    blank = np.zeros((16, 16), np.uint8)
    rehashed(copied, 0, blank, 0.0)
    worst, correlation = recompute_rows(MapStore(copied), teacher, images, 1)
    assert worst > 2
    assert correlation == 0


def test_recompute_names_another_normalisation(built, images):
    other = tiny_teacher(classes=3, size=16)
    other.pretrained_cfg["std"] = (1, 1, 1)
    with pytest.raises(InputError, match=r"made with the teacher's std .*, but this teacher has \[1, 1, 1\]"):
        recompute_rows(built, other, images, 2)


@pytest.mark.parametrize("count", [0, N + 1])
def test_recompute_of_more_maps_than_there_are_is_refused(built, teacher, images, count):
    with pytest.raises(InputError, match="recompute must be in"):
        recompute_rows(built, teacher, images, count)


# ---- the commands


@pytest.fixture
def on_disk(teacher, tiny_images, tmp_path) -> dict[str, Any]:
    """A saved teacher, a folder of images with two splits, and the flags that build their store."""
    saved = tiny_teacher(classes=2, size=16)
    save_model(saved, tmp_path / "teacher")
    tiny_images(split="test", n=5)
    data = ["--dataset", tiny_images(n=N)]
    teacher_flags = ["--teacher", f"local-dir:{tmp_path / 'teacher'}"]
    store = tmp_path / "maps"
    build_flags = ["maps", *teacher_flags, *data, "--split", "train", "--n-steps", 2, "--shard-size", SHARD]
    return {"data": data, "teacher": teacher_flags, "store": store, "build": build_flags, "saved": saved}


def test_maps_verify_and_preview(command, on_disk, tmp_path):
    assert command(*on_disk["build"], "--out", on_disk["store"]).code == 0
    checked = command("verify", "--maps", on_disk["store"], *on_disk["data"], "--split", "train", "--recompute", 3)
    assert (checked.code, checked.error) == (0, "")
    assert "all 10 rows match" in checked.output
    assert "3 maps computed again" in checked.output
    flags = [
        "--maps",
        on_disk["store"],
        *on_disk["data"],
        "--split",
        "train",
        "--out",
        tmp_path / "grid.png",
        "--count",
        5,
    ]
    assert command("preview", *flags).code == 0
    with Image.open(tmp_path / "grid.png") as opened:
        picture = opened.copy()
    panel = 96  # images of 16 pixels are shown six times as large
    assert picture.size == (20 + 4 * (3 * panel + 8 + 20), 20 + 20 + 2 * (panel + 20 + 20))
    pixels = np.asarray(picture)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500


def test_verify_of_another_split_ends_with_2_and_the_rows_name(command, on_disk):
    command(*on_disk["build"], "--out", on_disk["store"])
    found = command("verify", "--maps", on_disk["store"], *on_disk["data"], "--split", "test")
    assert found.code == 2
    assert "row 0 does not belong to image 0 of" in found.error


def test_verify_with_another_teacher_ends_with_2(command, on_disk, tmp_path):
    command(*on_disk["build"], "--out", on_disk["store"])
    save_model(tiny_teacher(classes=2, size=16, seed=9), tmp_path / "other")
    flags = [*on_disk["data"], "--split", "train", "--recompute", 2, "--teacher", f"local-dir:{tmp_path / 'other'}"]
    found = command("verify", "--maps", on_disk["store"], *flags)
    assert found.code == 2
    assert "made by another teacher" in found.error


def test_limited_store_is_verified_as_a_prefix(command, on_disk):
    command(*on_disk["build"], "--out", on_disk["store"], "--limit", 3)
    found = command("verify", "--maps", on_disk["store"], *on_disk["data"], "--split", "train")
    assert found.code == 0
    assert "3 rows, a prefix of 10 images" in found.output


def test_parts_are_merged_by_the_command(command, on_disk, tmp_path):
    whole = tmp_path / "whole"
    command(*on_disk["build"], "--out", whole)
    part = command(*on_disk["build"], "--out", on_disk["store"], "--shard", "0/2")
    assert part.code == 0
    assert "shards 0/2 are done; other machines' shards are missing" in part.output
    assert "10 maps" in command(*on_disk["build"], "--out", on_disk["store"], "--shard", "1/2").output
    assert files_of(on_disk["store"]) == files_of(whole)


def test_other_settings_end_with_2_and_the_settings_name(command, on_disk):
    command(*on_disk["build"], "--out", on_disk["store"])
    found = command(*on_disk["build"], "--out", on_disk["store"], "--reduction", "sum")
    assert found.code == 2
    assert "options.reduction is 'abs_sum' there, 'sum' here" in found.error


def test_map_size_and_logits_are_flags(command, on_disk):
    assert command(*on_disk["build"], "--out", on_disk["store"], "--map-size", 8, "--logits").code == 0
    store = MapStore(on_disk["store"])
    assert store.levels(0).shape == (8, 8)
    assert store.has_logits
    assert read_mapping(on_disk["store"] / "provenance.json")["map_size"] == 8


def test_teacher_of_another_image_size_is_fed_that_size(command, tiny_images, tmp_path):
    """A ViT built for 32x32 says 160x160 in its pretrained_cfg."""
    model = timm.create_model("test_vit", num_classes=2, img_size=32)
    save_model(model, tmp_path / "teacher")
    flags = ["--teacher", f"local-dir:{tmp_path / 'teacher'}", "--teacher-args", "img_size=32", "--n-steps", 1]
    found = command("maps", *flags, "--dataset", tiny_images(n=2), "--split", "train", "--out", tmp_path / "maps")
    assert (found.code, found.error) == (0, "")
    assert MapStore(tmp_path / "maps").levels(0).shape == (32, 32)


@pytest.mark.slow
@pytest.mark.shared
def test_imagenette_maps_are_built_verified_and_shown(command, shared, tmp_path):
    teacher = f"local-dir:{shared}/weights/mobilenetv2_100.coral_in1k"
    data = ["--dataset", shared / "data" / "imagenette_small", "--split", "validation"]
    maps = tmp_path / "maps"
    built = command("maps", "--teacher", teacher, *data, "--limit", 20, "--n-steps", 16, "--out", maps)
    assert (built.code, built.error) == (0, "")
    assert command("verify", "--maps", maps, *data, "--recompute", 2).code == 0
    assert command("preview", "--maps", maps, *data, "--out", tmp_path / "grid.png", "--count", 8).code == 0
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width > 2000
    train = command("verify", "--maps", maps, "--dataset", shared / "data" / "imagenette_small", "--split", "train")
    assert train.code == 2
    assert "row 0 does not belong to image 0" in train.error


@pytest.mark.shared
def test_imagenette_names_are_wordnet_ids(shared):
    dataset = load_labeled_images(str(shared / "data" / "imagenette_small"), "validation")
    assert len(dataset) == 500
    assert all(name in ImageNetInfo().label_names() for name in dataset.class_names)
    assert read_item(dataset, 0)[0].size == (224, 224)


def test_provenance_is_plain_json_with_the_names_of_its_fields(built):
    found = json.loads((built.path / "provenance.json").read_text())
    assert found == json.loads(json.dumps(asdict(built.provenance), allow_nan=False))
    assert list(found) == [field.name for field in fields(Provenance)]


def test_every_image_has_a_noise_baseline_of_its_own(tmp_path, monkeypatch):
    asked = []
    real = TeacherView.baseline

    def record(self, inputs, kind, seeds):
        asked.extend(seeds)
        return real(self, inputs, kind, seeds)

    monkeypatch.setattr(TeacherView, "baseline", record)
    images = ImageList([noise_image(seed, 16, 16) for seed in (0, 1, 2, 0)], [0, 1, 0, 0])
    options = IGOptions(n_steps=1, baseline="noise")
    store = compute_maps(tiny_teacher(size=16), images, tmp_path / "maps", options=options, progress=False)
    assert len(asked) == 4
    assert len(set(asked)) == 3, "one for each image, the same for equal ones"
    assert store is not None
    assert np.array_equal(store.levels(0), store.levels(3))
