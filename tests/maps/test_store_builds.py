"""Map stores are the same bytes however they were built, and rows are recomputed as they are."""

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from store_parts import N, altered, build, files_of, rehashed, shards_of
from tiny_parts import ImageList, noise_image, ramp, tiny_teacher

from timm_igkd.attribution.options import IGOptions
from timm_igkd.attribution.teacher_copy import answer_to_noise, answers_alike, teacher_copy
from timm_igkd.data.loading import load_labeled_images
from timm_igkd.errors import InputError, InputTypeError
from timm_igkd.files import read_mapping, write_json
from timm_igkd.maps.build import check_teacher, recompute_rows, teacher_difference
from timm_igkd.maps.manifest import read_manifest
from timm_igkd.maps.row_format import encode_png
from timm_igkd.maps.store import MapStore

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
    assert re.search(rf"rebuilding shard 1, which is damaged: .*{path.name}", printed.out + printed.err)
    assert "delete" not in printed.out + printed.err


def test_what_a_kill_leaves_is_no_shard_and_goes_away(copied, teacher, images, built):
    shard = shards_of(copied)[2]
    shard.rename(shard.with_name(f".{shard.name}.0123abcd.tmp"))
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


def test_a_store_that_was_begun_without_maps_is_called_so(teacher, images, tmp_path, monkeypatch):
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("timm_igkd.maps.build.ShardBuilder.build", stop)
        with pytest.raises(KeyboardInterrupt):
            build(teacher, images, tmp_path / "maps")
    with pytest.raises(InputError, match=r"a store without maps yet, begun with other settings: n is 10 there, 5 here"):
        build(teacher, images, tmp_path / "maps", limit=5)


@pytest.mark.parametrize("dataset", ["images", ["a", "b"]])
def test_what_gives_no_images_leaves_no_store(dataset, teacher, tmp_path):
    with pytest.raises(InputTypeError, match=r"\(PIL image, label\), got str|is a str, expected \(PIL image, label\)"):
        build(teacher, dataset, tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


def test_another_teacher_into_the_same_folder_is_refused(copied, images):
    with pytest.raises(InputError, match=r"other settings: teacher.weights_sha256 is"):
        build(tiny_teacher(classes=3, size=16, seed=1), images, copied, logits=True)


def test_a_teacher_of_other_arguments_into_the_same_folder_is_refused(copied, teacher, images):
    """They change no tensor, and no number that the manifest had."""
    other = tiny_teacher(classes=3, size=16, act_layer="gelu")
    other.load_state_dict(teacher.state_dict())
    with pytest.raises(InputError, match=r"of the same weights answered otherwise there.* other arguments"):
        build(other, images, copied, logits=True)
    with pytest.raises(
        InputError, match="than the one given: one of these weights with other arguments: it answers otherwise"
    ):
        check_teacher(MapStore(copied).provenance, other)
    check_teacher(MapStore(copied).provenance, teacher)
    content = read_mapping(copied / "manifest.json")
    content["teacher"]["answer"] = None  # as in a store from before it was written
    write_json(copied / "manifest.json", content)
    assert read_manifest(copied).teacher.answer is None


def test_answers_are_alike_but_for_rounding(teacher):
    answer = answer_to_noise(teacher_copy(teacher))
    assert len(answer) == 3
    assert answer == answer_to_noise(teacher_copy(tiny_teacher(classes=3, size=16)))
    assert answers_alike(answer, tuple(logit * 1.0005 for logit in answer))
    assert answers_alike(answer, answer_to_noise(teacher_copy(copy.deepcopy(teacher).half())))
    assert answers_alike(None, answer)
    assert answers_alike((0.0, 0.0), (0.0, 0.0))
    assert not answers_alike(answer, tuple(logit * 1.01 for logit in answer))
    assert not answers_alike(answer, answer[:2])


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


@pytest.mark.parametrize("name", ["README.md", "notes/draft.txt", ".images/cat.png"])
def test_a_folder_of_somebody_else_is_left_as_it_is(name, teacher, images, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=r"holds '(README.md|notes|.images)' but no manifest.json, so it is no store"):
        build(teacher, images, tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [name.rpartition("/")[2]]
    assert (tmp_path / name).read_text() == "mine"


def test_card_that_was_edited_stays_and_is_said_to(copied, teacher, images, capsys):
    card = copied / "README.md"
    ours = card.read_text()
    card.write_text(ours.replace("# ", "# My own: ", 1))
    edited = card.read_text()
    assert edited != ours
    build(teacher, images, copied, logits=True)
    assert card.read_text() == edited
    assert "README.md was edited by hand and stays; delete it for a new card" in capsys.readouterr().out
    card.unlink()
    build(teacher, images, copied, logits=True)
    assert card.read_text() == ours


@pytest.mark.parametrize("labels", ["required", "ignored"])
def test_a_store_among_the_images_is_refused_and_beside_them_is_not(labels, teacher, tiny_images, tmp_path):
    images = tiny_images("folder", classes=3)
    (tmp_path / "link").symlink_to(images)
    for out in (images / "train" / "maps", tmp_path / "link" / "train" / "a" / "b"):
        found = load_labeled_images(str(images / "train"), "train", labels=labels)
        with pytest.raises(InputError, match=r"lies among the images of .*; choose another --out"):
            build(teacher, found, out, options=IGOptions(target="predicted"))
        assert not out.exists()
    found = load_labeled_images(str(images), "train")
    assert build(teacher, found, images / "maps") is not None
    assert len(load_labeled_images(str(images), "train")) == len(found)


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
        InputError, match="image 7 has no map: the store covers the first 5 of 10 images of split 'unknown'"
    ):
        store.find(images.images[7], images.labels[7], 7, "image 7")


def test_limit_beyond_the_dataset_is_the_whole(teacher, images, tmp_path):
    assert build(teacher, images, tmp_path, limit=999).provenance.n == N


# ---- recompute


def test_recomputed_maps_are_the_stored_ones(built, teacher, images):
    worst, correlation, *_ = recompute_rows(built, teacher, images, 5)
    assert worst <= 1
    assert correlation > 0.9999


def test_recompute_detects_another_teacher(built, images):
    worst, correlation, *_ = recompute_rows(built, tiny_teacher(classes=3, size=16, seed=5), images, 5)
    assert worst > 2
    assert correlation < 0.999


def test_recompute_detects_a_map_made_constant(copied, teacher, images):
    blank = np.zeros((16, 16), np.uint8)
    rehashed(copied, 0, blank, 0.0)
    worst, correlation, *_ = recompute_rows(MapStore(copied), teacher, images, 1)
    assert worst > 2
    assert correlation == 0


def test_recompute_names_another_normalisation(built, images):
    other = tiny_teacher(classes=3, size=16)
    other.pretrained_cfg["std"] = (1, 1, 1)
    with pytest.raises(
        InputError, match=r"saw images otherwise: its std is \[.*\] there, \[1, 1, 1\] here; give the same"
    ):
        recompute_rows(built, other, images, 2)


@pytest.mark.parametrize("indices", [None, (2, 1, 0)])
def test_a_teacher_of_other_outputs_for_the_classes_is_another(built, teacher, images, indices):
    made = replace(built.provenance, teacher=replace(built.provenance.teacher, class_indices=indices))
    assert teacher_difference(made, teacher) is None
    found = teacher_difference(made, teacher, images)
    assert found is None if indices is None else "it had other outputs for these images' classes; give" in found


def test_recompute_holds_the_numbers_of_a_map_against_their_own(copied, teacher, images):
    store = MapStore(copied)
    found = recompute_rows(store, teacher, images, N)
    assert max(found.scale, found.delta) < 0.01
    numbers = store.row(0)
    rehashed(copied, 0, store.levels(0), 10 * numbers.scale)
    found = recompute_rows(MapStore(copied), teacher, images, N)
    assert found.levels <= 1
    assert found.scale == pytest.approx(0.9, abs=0.01)
    assert found.delta < 0.01
    rehashed(copied, 0, store.levels(0), numbers.scale, convergence_delta=123.0)
    found = recompute_rows(MapStore(copied), teacher, images, N)
    assert found.scale < 0.01
    assert found.delta == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("count", [0, N + 1])
def test_recompute_of_more_maps_than_there_are_is_refused(built, teacher, images, count):
    with pytest.raises(InputError, match="recompute must be in"):
        recompute_rows(built, teacher, images, count)


def test_link_that_leads_nowhere_is_told(teacher, images, tmp_path):
    (tmp_path / "maps").symlink_to(tmp_path / "unmounted" / "disk")
    with pytest.raises(InputError, match=r"maps' is a link to '.*disk', which is not there; mount or make it"):
        build(teacher, images, tmp_path / "maps")
