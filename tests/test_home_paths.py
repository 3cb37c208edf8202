"""A path that begins with ~ is of the home folder, whichever function it is given to."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from hub_parts import HUB_MARKS
from store_parts import build
from tiny_parts import ImageList, noise_image, tiny_teacher

from timm_igkd import export_student, load_model, push_student, save_model
from timm_igkd.data.loading import load_labeled_images
from timm_igkd.data.unlabeled import load_unlabeled_images
from timm_igkd.errors import InputTypeError
from timm_igkd.files import given_path, output_file, write_json
from timm_igkd.maps.push import push_maps
from timm_igkd.maps.store import MapStore
from timm_igkd.overlay.preview import overlay_samples, write_preview
from timm_igkd.records import folder_written_apart

FOUR = ImageList([noise_image(seed) for seed in range(4)], [0, 1, 0, 1])


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A home folder, and another folder to run in, into which nothing may be written."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert list((tmp_path / "here").iterdir()) == []


@pytest.fixture
def teacher():
    return tiny_teacher(classes=2, size=16)


@pytest.mark.parametrize("kind", [str, Path])
def test_given_path_is_expanded(kind, home):
    assert given_path("out", kind("~/maps")) == home / "maps"
    assert given_path("out", kind("a/~/maps")) == Path("a/~/maps")


@pytest.mark.parametrize("value", [3, None, b"~", ["~"]])
def test_what_is_no_path_is_refused_by_its_name(value):
    with pytest.raises(InputTypeError, match=r"^out must be a path, got"):
        given_path("out", value)


@pytest.mark.parametrize("kind", [str, Path])
def test_maps_are_built_opened_and_built_on_there(kind, teacher, home):
    store = build(teacher, FOUR, kind("~/maps"), shard=(0, 2), shard_size=2)
    assert store is None
    store = build(teacher, FOUR, kind("~/maps"), shard_size=2)
    assert store.path == home / "maps"
    assert MapStore(kind("~/maps")).row(3).key == store.row(3).key


@pytest.mark.parametrize("name", ["~", "lr=0.1", "hf:::x"])
def test_folder_of_any_name_holds_a_store(name, teacher, tmp_path, monkeypatch):
    """pyarrow would take the first for the home folder, make a column of the second, open an address for the third."""
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    built = build(teacher, FOUR, Path(".") / name / "maps", shard_size=2)
    assert MapStore(Path(".") / name / "maps").row(3).key == built.row(3).key
    monkeypatch.chdir(tmp_path / "here")


def test_cache_lies_there(teacher, home, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", "~/cache")
    build(teacher, FOUR, "~/maps").row(0)
    assert len(list((home / "cache").rglob("*.arrow"))) == 1


def test_images_are_read_from_there(tiny_images, home):
    shutil.move(tiny_images(kind="folder"), home / "images")
    assert len(load_labeled_images("~/images", "train")) == 8
    assert len(load_labeled_images(Path("~/images"), "train")) == 8
    assert len(load_labeled_images("folder/", "train", data_dir="~/images")) == 8
    assert len(load_unlabeled_images("~/images")) == 8


def test_folder_that_needs_a_tree_of_links_has_it_there(tiny_images, home, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("~/cache"))
    folder = tiny_images(kind="folder", name="a[b]")
    assert len(load_labeled_images(str(folder), "train")) == 8
    assert (home / "cache" / "timm_igkd" / "folders").is_dir()


def test_outputs_are_written_there(teacher, home):
    store = build(teacher, FOUR, home / "maps")
    write_preview("~/grid.png", overlay_samples(store, FOUR, 2))
    write_json(Path("~/a.json"), {})
    with folder_written_apart(Path("~/folder"), "last.txt") as written:
        (written / "last.txt").write_text("x")
    assert {"grid.png", "a.json", "folder"} <= set(os.listdir(home))
    assert output_file("~/b.json") == home / "b.json"


def test_models_are_saved_loaded_and_exported_there(teacher, home):
    save_model(teacher, "~/model")
    weights = load_model("local-dir:~/model", checkpoint=Path("~/model/model.safetensors")).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in teacher.state_dict().items())
    export_student(teacher, "~/export")
    assert {"model", "export"} <= set(os.listdir(home))
    assert (home / "export" / "export.json").is_file()


@HUB_MARKS[0]
@HUB_MARKS[1]
def test_student_is_pushed_from_there(hub, teacher, home):
    save_model(teacher, home / "model", label_names=["a", "b"])
    push_student("~/model", "user/student", license="mit")
    assert "model.safetensors" in hub.repo("user/student").files


@HUB_MARKS[0]
@HUB_MARKS[1]
def test_store_is_pushed_from_there(hub, teacher, home):
    build(teacher, FOUR, home / "maps")
    push_maps("~/maps", "user/maps")
    assert "manifest.json" in hub.repo("user/maps", "datasets").files
