"""Every case of the list of bad input ends as its group says: exit code, one line, nothing that looks complete."""

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from command_lines import Runner, encoded, files_of, is_store, maps_of, tiny_run, two_splits, write_rows
from fixture_parts import ImageFactory, tiny_image
from PIL import Image
from tiny_parts import tiny_teacher

from timm_igkd import MapStore
from timm_igkd.models.loading import save_model


@pytest.fixture
def store(command: Runner, tiny_images: ImageFactory, teacher_folder: Path, tmp_path: Path) -> Path:
    """Return the maps of 8 images, in tmp_path / "maps"; the images are in tmp_path / "images"."""
    outcome = command(*maps_of(tiny_images(), teacher_folder, tmp_path / "maps"))
    assert outcome.code == 0, outcome.error
    return tmp_path / "maps"


# ---- exit code 2: data ----


def corrupt_image(folder: Path) -> Path:
    cells = [encoded(tiny_image(index, index % 2, 16, 0)) for index in range(4)]
    cells[2] = {"bytes": cells[2]["bytes"][:60], "path": "third.png"}
    return write_rows(folder, cells, [0, 1, 0, 1])


def corrupt_parquet(folder: Path) -> Path:
    whole = corrupt_image(folder) / "train-00000-of-00001.parquet"
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return folder


def deep_image(folder: Path) -> Path:
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 250)
    return write_rows(folder, [encoded(tiny_image(0, 0, 16, 0)), encoded(deep)], [0, 1])


def empty_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def good(folder: Path) -> Path:
    return write_rows(folder, [encoded(tiny_image(index, index % 2, 16, 0)) for index in range(4)], [0, 1, 0, 1])


def with_test_split(folder: Path) -> Path:
    """Put a test split of good images beside what a folder holds of the training split."""
    if any(folder.glob("train-*")):
        (written,) = good(folder.parent / "good").glob("train-*")
        shutil.copy(written, folder / written.name.replace("train", "test"))
    return folder


ONE_SPLIT = ["--validation-split", "none", "--validation-fraction", 0]
TINY_MODELS = ["--teacher", "test_resnet", "--student", "none", "--compare", "none"]
TINY_RUN = ["--protocol", "demo", "--name", "run", *TINY_MODELS, *ONE_SPLIT, "--batch-size", 2, "--teacher-epochs", 1]

BAD_DATA: dict[str, tuple[Callable[[Path], Path], list[str], str]] = {
    "missing folder": (lambda folder: folder, [], "does not exist"),
    "empty folder": (empty_folder, [], "holds no data"),
    "missing split": (good, ["--split", "validation"], "'validation'.*train"),
    "missing image column": (good, ["--image-column", "imag"], "did you mean 'image'"),
    "missing label column": (good, ["--label-column", "labels"], "did you mean 'label'"),
    "column of another kind": (good, ["--image-column", "label"], "expected one image per row as Image"),
    "corrupt image": (corrupt_image, [], r"image 2 \(third.png\).*cannot be decoded"),
    "corrupt parquet": (corrupt_parquet, [], "corrupt"),
    "16-bit image": (deep_image, [], "image 1 of.*16 bits"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_ends_maps_with_2(case: str, command: Runner, teacher_folder: Path, tmp_path: Path) -> None:
    make, options, message = BAD_DATA[case]
    outcome = command(*maps_of(make(tmp_path / "data"), teacher_folder, tmp_path / "maps", *options))
    assert outcome.code == 2
    assert re.search(message, outcome.error)
    assert not is_store(tmp_path / "maps")


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_ends_the_recipe_with_2(case: str, recipe: Runner, tmp_path: Path) -> None:
    make, options, message = BAD_DATA[case]
    options = ["--train-split" if option == "--split" else option for option in options]
    images = with_test_split(make(tmp_path / "data"))
    outcome = recipe(*TINY_RUN, "--n-steps", 2, "--dataset", images, *options)
    assert outcome.code == 2
    assert re.search(message, outcome.error)
    run = tmp_path / "runs" / "run"
    assert not (run / "teacher").exists()
    assert not list(run.glob(".stages/teacher.json"))


def test_corrupt_image_in_a_worker_ends_the_recipe_with_2(recipe: Runner, tmp_path: Path) -> None:
    images = with_test_split(corrupt_image(tmp_path / "data"))
    outcome = recipe(*TINY_RUN, "--workers", 1, "--dataset", images)
    assert outcome.code == 2
    assert "third.png" in outcome.error


# ---- exit code 2: maps and models that do not belong together ----


def test_maps_of_other_data_are_refused(command: Runner, store: Path, tiny_images: ImageFactory) -> None:
    other = tiny_images(seed=1, name="other")
    before = files_of(store)
    outcome = command("verify", "--maps", store, "--dataset", other, "--split", "train")
    assert outcome.code == 2
    assert "row 0" in outcome.error
    teacher = store.parent / "teacher"
    outcome = command(*maps_of(other, teacher, store))
    assert outcome.code == 2
    assert "other settings: dataset.name" in outcome.error
    assert files_of(store) == before


def test_maps_go_on_with_the_same_images_by_another_path(
    command: Runner, store: Path, tiny_images: ImageFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(store)
    monkeypatch.setenv("HOME", str(store.parent))
    monkeypatch.chdir(tiny_images())
    outcome = command(*maps_of(".", store.parent / "teacher", store))
    assert outcome.code == 0, outcome.error
    assert files_of(store) == before
    assert command("verify", "--maps", f"~/{store.name}", "--dataset", ".", "--split", "train").code == 0
    assert len(MapStore(f"~/{store.name}")) == len(MapStore(store))


def test_maps_of_changed_images_under_the_same_name_are_refused(
    command: Runner, store: Path, tiny_images: ImageFactory
) -> None:
    tiny_images(seed=1)  # overwrites the folder that the maps were made of
    before = files_of(store)
    outcome = command(*maps_of(store.parent / "images", store.parent / "teacher", store))
    assert outcome.code == 2
    assert "maps of other data" in outcome.error
    assert files_of(store) == before


def test_maps_of_another_teacher_are_refused(command: Runner, store: Path, tmp_path: Path) -> None:
    save_model(tiny_teacher(classes=2, size=16, seed=1), tmp_path / "other")
    before = files_of(store)
    outcome = command(*maps_of(tmp_path / "images", tmp_path / "other", store))
    assert outcome.code == 2
    assert "teacher.name" in outcome.error
    shutil.rmtree(tmp_path / "teacher")
    (tmp_path / "other").rename(tmp_path / "teacher")
    outcome = command(*maps_of(tmp_path / "images", tmp_path / "teacher", store))
    assert outcome.code == 2
    assert "teacher.weights_sha256" in outcome.error
    argv = ["--maps", store, "--dataset", tmp_path / "images", "--split", "train", "--recompute", 2]
    outcome = command("verify", *argv)
    assert outcome.code == 2
    assert "another teacher" in outcome.error
    assert files_of(store) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--n-steps", 3], "options.n_steps is 2 there, 3 here"),
        (["--baseline", "black"], "options.baseline"),
        (["--limit", 4], "n is 8 there, 4 here"),
        (["--map-size", 8], "map_size"),
        (["--logits"], "logits"),
        (["--engine", "captum"], "engine"),
    ],
)
def test_maps_of_other_options_are_refused(
    options: list[object], named: str, command: Runner, store: Path, tmp_path: Path
) -> None:
    before = files_of(store)
    outcome = command(*maps_of(tmp_path / "images", tmp_path / "teacher", store, *options))
    assert outcome.code == 2
    assert named in outcome.error
    assert files_of(store) == before


@pytest.fixture
def teacher_of_5(tmp_path: Path) -> Path:
    save_model(tiny_teacher(classes=5, size=16), tmp_path / "five")
    return tmp_path / "five"


def test_teacher_of_other_classes_is_refused(
    command: Runner, recipe: Runner, tiny_images: ImageFactory, teacher_of_5: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    images = two_splits(tiny_images)
    outcomes = [
        command(*maps_of(images, teacher_of_5, tmp_path / "maps")),
        recipe(*tiny_run(images, "--teacher-epochs", 0, "--teacher", f"local-dir:{teacher_of_5}")),
    ]
    split = ["--dataset", images, "--split", "test", "--out", tmp_path / "m.json"]
    models = ["--model", f"local-dir:{teacher_folder}", "--teacher", f"local-dir:{teacher_of_5}"]
    outcomes.append(command("evaluate", *models, *split))
    for outcome in outcomes:
        assert outcome.code == 2
        assert "5 classes" in outcome.error
    assert not any((tmp_path / name).exists() for name in ("maps", "runs", "m.json"))


def test_student_of_other_class_names_is_refused(
    command: Runner, tiny_images: ImageFactory, teacher_folder: Path, tmp_path: Path
) -> None:
    save_model(tiny_teacher(classes=2, size=16), tmp_path / "pets", label_names=["cat", "dog"])
    split = ["--dataset", tiny_images(), "--split", "train", "--out", tmp_path / "m.json"]
    outcome = command("evaluate", "--model", f"local-dir:{tmp_path / 'pets'}", *split)
    assert outcome.code == 2
    assert "'class_0' is not among them" in outcome.error
    assert not (tmp_path / "m.json").exists()


# ---- exit code 2: names and numbers ----


def test_unknown_names_offer_the_nearest(command: Runner, recipe: Runner, tmp_path: Path) -> None:
    yaml_file = tmp_path / "typo.yaml"
    yaml_file.write_text("overlay_probb: 0.2\n")
    dataset = ["--dataset", "digits", "--split", "train", "--out", tmp_path / "maps"]
    cases = [
        (command("maps", "--teacher", "resnet19", *dataset), "did you mean 'resnet18'"),
        (command("maps", "--teacher", "resnet18", *dataset, "--n-step", 3), "did you mean '--n-steps'"),
        (command("maps", "--teacher", "resnet18", *dataset, "--engine", "fats"), "fast"),
        (command("mapz"), "maps"),
        (recipe("--teacher", "test_resnett"), "did you mean 'test_resnet'"),
        (recipe("--student", "resnet19"), "did you mean 'resnet18'"),
        (recipe("--config", yaml_file), "did you mean 'overlay_prob'"),
        (recipe("--overlay-probb", 0.2), "did you mean '--overlay-prob'"),
        (recipe("--opt", "adamv"), "did you mean 'adam"),
        (recipe("--sched", "cosin"), "did you mean 'cosine'"),
        (recipe("--loss-type", "dk"), "did you mean 'dkd'"),
        (recipe("--aa", "rnd-m9"), "rand-m9-mstd0.5"),
        (recipe("--config", tmp_path / "none.yaml"), "does not exist"),
    ]
    for outcome, message in cases:
        assert outcome.code == 2, outcome
        assert message in outcome.error
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(
    "options",
    [  # what test_fuzz.py does not make: values that are wrong for one setting, or with another
        "--seed -1",
        "--student-drop 0",
        "--student-drop 50",
        "--overlay-prob 1.5",
        "--overlay-weight 2",
        "--overlay-max-power 0.5",
        "--temperature 0",
        "--distill-loss-weight 1.5",
        "--tolerance 1",
        "--batch-size 5000",
        "--mixup 0.2 --batch-size 3",
        "--smoothing 1.5",
        "--validation-split none --validation-fraction 1",
        "--name a/b",
        "--protocol demo --dataset torch/cifar10",
    ],
)
def test_numbers_out_of_range_end_the_recipe_before_it_writes(options: str, recipe: Runner, tmp_path: Path) -> None:
    outcome = recipe(*options.split())
    assert outcome.code == 2
    assert not (tmp_path / "runs").exists()


# ---- exit code 2: verify ----


def test_altered_map_fails_verify(command: Runner, store: Path, tmp_path: Path) -> None:
    shard = next((store / "data").glob("*.parquet"))
    rows = datasets.load_dataset("parquet", data_files=str(shard), split="train")
    rows = rows.cast_column("map", datasets.Image(decode=False))
    levels = np.array(Image.open(io.BytesIO(rows[3]["map"]["bytes"])))
    levels[0, 0] ^= 1
    cells = [encoded(Image.fromarray(levels)) if index == 3 else row["map"] for index, row in enumerate(rows)]
    features = rows.features
    altered = datasets.Dataset.from_dict(rows.to_dict() | {"map": cells}, features=features)
    altered.to_parquet(str(shard))
    outcome = command("verify", "--maps", store, "--dataset", tmp_path / "images", "--split", "train")
    assert outcome.code == 2
    assert "image 3 of" in outcome.error
    assert "is damaged: its hash differs" in outcome.error


def test_other_split_and_missing_store_fail_verify(
    command: Runner, store: Path, tiny_images: ImageFactory, tmp_path: Path
) -> None:
    images = tiny_images(split="test")
    outcome = command("verify", "--maps", store, "--dataset", images, "--split", "test")
    assert outcome.code == 2
    assert "image 0 of" in outcome.error
    outcome = command("verify", "--maps", tmp_path / "nothing", "--dataset", images, "--split", "test")
    assert outcome.code == 2
    assert "does not exist" in outcome.error


@pytest.mark.parametrize("name", ["p.jpg", "p"])
def test_preview_of_another_suffix_is_refused_before_the_store_is_opened(name, command: Runner, tmp_path: Path) -> None:
    data = ["--maps", tmp_path, "--dataset", tmp_path, "--split", "train"]
    outcome = command("preview", *data, "--out", tmp_path / name)
    assert outcome.code == 2
    assert f"a preview is a PNG file, {str(tmp_path / name)!r}" in outcome.error
    assert f"call it {str(tmp_path / 'p.png')!r}" in outcome.error


def test_store_without_provenance_is_not_complete(command: Runner, store: Path, tmp_path: Path) -> None:
    (store / "provenance.json").unlink()
    outcome = command(
        "preview", "--maps", store, "--dataset", tmp_path / "images", "--split", "train", "--out", "p.png"
    )
    assert outcome.code == 2
    assert "not complete" in outcome.error
