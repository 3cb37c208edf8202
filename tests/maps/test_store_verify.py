"""Map stores are held against their images, and what the commands say of them."""

import io
import json
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from store_parts import SHARD, N, altered, files_of, rehashed, shards_of
from timm.data import ImageNetInfo
from tiny_parts import ImageList, noise_image, tiny_teacher

from timm_igkd.attribution.options import IGOptions, TeacherView
from timm_igkd.data.items import read_item
from timm_igkd.data.labels import UNLABELED
from timm_igkd.data.loading import load_labeled_images
from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.files import read_mapping
from timm_igkd.maps.build import compute_maps, recompute_rows
from timm_igkd.maps.manifest import Provenance
from timm_igkd.maps.row_format import encode_png
from timm_igkd.maps.store import MapStore
from timm_igkd.models.loading import save_model

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


def test_maps_swapped_with_fitting_hashes_fail_recompute(copied, built, teacher, images):
    for row, other in ((0, 1), (1, 0)):
        rehashed(copied, row, built.levels(other), built.rows[other]["scale"])
    store = MapStore(copied)
    store.verify(images)
    worst, correlation, *_ = recompute_rows(store, teacher, images, N)
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


def test_maps_whose_scale_was_changed_are_found_by_computing_them_again(command, on_disk):
    command(*on_disk["build"], "--out", on_disk["store"], "--logits")
    rehashed(on_disk["store"], 0, MapStore(on_disk["store"]).levels(0), 1000.0)
    flags = ["--maps", on_disk["store"], *on_disk["data"], "--split", "train"]
    assert command("verify", *flags).code == 0
    found = command("verify", *flags, "--recompute", N)
    assert found.code == 2
    assert "have other numbers: scale by 1e+02 %, convergence delta by" in found.error


def test_wrong_number_of_maps_to_compute_again_is_told_before_all_are_read(command, on_disk):
    command(*on_disk["build"], "--out", on_disk["store"])
    flags = ["--maps", on_disk["store"], *on_disk["data"], "--split", "train", "--recompute", N + 1]
    found = command("verify", *flags)
    assert found.code == 2
    assert f"--recompute must be in [1, {N}]" in found.error
    assert "match" not in found.output


def test_arguments_of_the_teacher_belong_to_its_maps(command, on_disk):
    command(*on_disk["build"], "--out", on_disk["store"])
    other = ["--teacher-args", "act_layer=gelu"]
    again = command(*on_disk["build"], *other, "--out", on_disk["store"])
    assert again.code == 2
    assert "answered otherwise there" in again.error
    flags = ["--maps", on_disk["store"], *on_disk["data"], "--split", "train", *on_disk["teacher"], *other]
    for job in (["verify", "--recompute", 2], ["score", "--steps", 2, "--out", on_disk["store"] / "score.json"]):
        found = command(*job, *flags)
        assert found.code == 2
        assert "with other arguments: it answers otherwise; give the same --teacher-args" in found.error


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


def test_maps_made_without_labels_say_how_they_are_verified(teacher, images, tmp_path):
    plain = ImageList(images.images, [UNLABELED] * N, name="noise")
    store = compute_maps(teacher, plain, tmp_path / "maps", options=IGOptions(n_steps=2, target="predicted"))
    assert store is not None
    with pytest.raises(InputError, match=r"row 0 has label -1, .* has 0; it was made without labels: add --label-col"):
        store.verify(images)


def test_another_label_is_told_with_what_to_do(built, images):
    other = ImageList(images.images, [(label + 1) % 3 for label in images.labels], name="noise")
    with pytest.raises(InputError, match=r"row 0 has label 0, .* has 1; give the labels that it was made with, or"):
        built.verify(other)
