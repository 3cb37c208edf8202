"""What a push may take the place of: an earlier push of the same, and nothing else unless it is told to."""

import copy
import json

import pytest
from hub_parts import HUB_MARKS, IMAGES, build_maps, make_run, one_error_line, plain_student
from tiny_parts import tiny_teacher

from timm_igkd import IGOptions, compute_maps, push_maps, push_student, save_model
from timm_igkd.cli.main import main
from timm_igkd.errors import InputError, RunError
from timm_igkd.hub.cards import metadata

pytestmark = HUB_MARKS
STUDENT, MAPS = "user/student", "user/maps"
TIMM_FOLDER = {"config.json": b'{"architecture": "vit_tiny_patch16_224"}', "model.safetensors": b"fine-tuned"}


def push(command, folder, repo, *options):
    return main([command, str(folder), "--repo-id", repo, *options])


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (TIMM_FOLDER, "config.json"),
        (TIMM_FOLDER | {"config.json": b'"architecture"'}, "config.json"),
        (TIMM_FOLDER | {"config.json": b"null"}, "config.json"),
        ({"train/cat/1.png": b"picture"}, "train/cat/1.png"),
        ({"docs/notes.txt": b"text"}, "docs/notes.txt"),
    ],
)
def test_a_student_takes_the_place_of_no_other_model_unless_told_to(hub, student_run, capfd, files, named):
    hub.add(STUDENT).commit(files | {"README.md": b"# Birds"})
    assert push("push-student", student_run, STUDENT) == 1
    line = one_error_line(capfd)
    assert f"holds something else already ({named!r})" in line
    assert "--replace" in line
    assert hub.repo(STUDENT).files == files | {"README.md": b"# Birds"}
    assert push("push-student", student_run, STUDENT, "--replace") == 0
    assert hub.repo(STUDENT).files["README.md"].startswith(b"---\n")
    assert push("push-student", student_run, STUDENT) == 0


@pytest.mark.parametrize("flags", [[], ["--replace"]])
def test_an_edited_card_of_a_push_of_before_says_whose_it_is_and_stays(hub, student_run, flags):
    push_student(student_run, STUDENT)
    repo = hub.repo(STUDENT)
    card = repo.files["README.md"].replace(b"## Use", b"## How to use it")
    config = {key: value for key, value in json.loads(repo.files["config.json"]).items() if key != "pushed_by"}
    repo.commit(repo.files | {"README.md": card, "config.json": json.dumps(config).encode()})
    assert push("push-student", student_run, STUDENT, *flags) == 0
    assert repo.files["README.md"] == card
    assert b"pushed_by" in repo.files["config.json"]


def test_texts_and_pictures_at_the_root_are_left_as_they_are(hub, student_run):
    texts = {"LICENSE": b"mine", "notes.txt": b"mine", "me.png": b"mine", "README.md": b"# Soon"}
    hub.add(STUDENT).commit(texts)
    assert push_student(student_run, STUDENT).card_kept
    assert texts.items() <= hub.repo(STUDENT).files.items()


def test_a_picture_of_the_name_of_ours_is_not_overwritten(hub, store, capfd):
    hub.add(MAPS, "datasets").commit({"maps.png": b"mine"})
    assert push("push-maps", store.path, MAPS) == 1
    assert "('maps.png')" in one_error_line(capfd)
    assert hub.repo(MAPS, "datasets").files == {"maps.png": b"mine"}


def test_maps_of_another_split_take_the_place_of_none_unless_told_to(hub, store, tmp_path, capfd):
    push_maps(store.path, MAPS)
    before = hub.repo(MAPS, "datasets").files
    other, images = tmp_path / "other", copy.copy(IMAGES)
    images.split = "test"
    compute_maps(tiny_teacher(), images, other, options=IGOptions(n_steps=2), shard_size=4, progress=False)
    assert push("push-maps", other, MAPS) == 1
    assert "of split 'train', these are of 'test'" in one_error_line(capfd)
    assert hub.repo(MAPS, "datasets").files == before
    push_maps(other, MAPS, replace=True)
    names = {name for name in hub.repo(MAPS, "datasets").files if name.startswith("data/")}
    assert names == {f"data/test-0000{shard}-of-00003.parquet" for shard in range(3)}


@pytest.mark.parametrize("part", ["dataset", "teacher"])
def test_maps_of_other_images_or_another_teacher_are_told_by_name(hub, store, part):
    push_maps(store.path, MAPS)
    files = dict(hub.repo(MAPS, "datasets").files)
    manifest = json.loads(files["manifest.json"])
    manifest[part]["name"] = "other"
    hub.repo(MAPS, "datasets").commit(files | {"manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(RunError, match=r"of (data set|teacher) 'other', these are of"):
        push_maps(store.path, MAPS)


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        ("dataset", {"class_names": ["bird", "fish"]}, "of another data set 'noise', of other classes"),
        ("dataset", {"class_names": 5}, "of another data set 'noise', of other classes"),
        ("teacher", {"architecture": "resnet18"}, "of another teacher .*, a 'resnet18'"),
        ("options", {"method": "grad_cam"}, "of method 'grad_cam', these are of 'ig'"),
    ],
)
def test_maps_of_folders_of_one_name_are_told_apart(hub, store, part, changes, told):
    """Of a folder only the last part of its path is told, and each run's teacher is in one called teacher."""
    push_maps(store.path, MAPS)
    files = dict(hub.repo(MAPS, "datasets").files)
    manifest = json.loads(files["manifest.json"])
    manifest[part] |= changes
    hub.repo(MAPS, "datasets").commit(files | {"manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(RunError, match=told):
        push_maps(store.path, MAPS)


def test_maps_of_before_methods_had_names_are_integrated_gradients(hub, store):
    push_maps(store.path, MAPS)
    files = dict(hub.repo(MAPS, "datasets").files)
    manifest = json.loads(files["manifest.json"])
    del manifest["options"]["method"]
    hub.repo(MAPS, "datasets").commit(files | {"manifest.json": json.dumps(manifest).encode()})
    push_maps(store.path, MAPS)
    assert json.loads(hub.repo(MAPS, "datasets").files["manifest.json"])["options"]["method"] == "ig"


def test_a_student_of_other_classes_takes_the_place_of_none_unless_told_to(hub, student_run, tmp_path, capfd):
    """One of the same classes is a newer one, whatever its architecture."""
    push_student(student_run, STUDENT)
    before = hub.repo(STUDENT).files
    save_model(plain_student(), tmp_path / "birds", label_names=["crow", "rook"])
    assert push("push-student", tmp_path / "birds", STUDENT) == 1
    assert "holds a student of other classes ('cat'); choose another name" in one_error_line(capfd)
    three = tiny_teacher("test_resnet", classes=3)
    with pytest.raises(RunError, match="holds a student of 2 classes, this one has 3; choose"):
        push_student(three, STUDENT)
    assert hub.repo(STUDENT).files == before
    save_model(tiny_teacher("test_vit"), tmp_path / "vit", label_names=["cat", "dog"])
    push_student(tmp_path / "vit", STUDENT)
    push_student(three, STUDENT, replace=True)


@pytest.mark.parametrize("names", [5, "cat", None, [], {"0": "cat", "1": "dog"}])
def test_names_on_the_hub_that_are_the_same_or_none_are_no_matter(hub, student_run, names):
    push_student(student_run, STUDENT)
    files = dict(hub.repo(STUDENT).files)
    config = json.loads(files["config.json"]) | {"label_names": names}
    hub.repo(STUDENT).commit(files | {"config.json": json.dumps(config).encode()})
    push_student(student_run, STUDENT)
    assert json.loads(hub.repo(STUDENT).files["config.json"])["label_names"] == ["cat", "dog"]


def test_runs_of_other_seeds_are_of_no_model(hub):
    with pytest.raises(InputError, match="runs of other seeds belong to a run folder, but the student is a model"):
        push_student(plain_student(), STUDENT, seed_runs=["/nowhere"])


def test_a_file_that_the_repository_ignores_is_an_error_and_nothing_is_removed(hub, store, tmp_path, capfd):
    push_maps(store.path, MAPS)
    repo = hub.repo(MAPS, "datasets")
    repo.commit(repo.files | {".gitignore": b"data/\n"})
    before = dict(repo.files)
    repo.ignored = r"data/.*"
    smaller = build_maps(tmp_path / "smaller", reduction="sum")
    assert push("push-maps", smaller.path, MAPS) == 1
    assert "has a .gitignore by which it would not take 'data/train-00000" in one_error_line(capfd)
    assert repo.files == before


def test_a_kept_card_of_other_results_is_said_to_be_outdated(hub, student_run, tmp_path, capfd):
    push_student(student_run, STUDENT)
    repo = hub.repo(STUDENT)
    repo.commit(repo.files | {"README.md": repo.files["README.md"].replace(b"## Use", b"## How to use it")})
    assert push("push-student", student_run, STUDENT) == 0
    assert "edited by hand and kept;" in capfd.readouterr().err
    other = make_run(tmp_path / "other", plain_student(seed=4), top1=71.0)
    assert push("push-student", other, STUDENT) == 0
    assert "kept, though it tells of other splits or results than these; --overwrite-card" in capfd.readouterr().err


@pytest.mark.parametrize("card", ["", "# Title", "---\n[1\n---\n", "---\n- a\n---\n", "---\nlicense: mit\n"])
def test_metadata_that_cannot_be_read_is_none(card):
    assert metadata(card) == {}
    assert metadata("---\r\nlicense: mit\r\n---\r\n# Title") == {"license": "mit"}
