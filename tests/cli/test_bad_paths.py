"""Paths and numbers that no command can use end with exit code 2 and one line; odd names that are real folders work."""

import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from command_lines import Runner, maps_of, tiny_run, two_splits
from fixture_parts import ImageFactory

from timm_igkd import MapStore, load_labeled_images
from timm_igkd.attribution.ig_options import IGOptions
from timm_igkd.cli.arguments import maps_argument
from timm_igkd.cli.exit_codes import run_reporting_errors
from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.random_streams import generator, uniforms


def symlink_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


def dangling_link(folder: Path) -> Path:
    (folder / "dangling").symlink_to("nowhere")
    return folder / "dangling"


def plain_file(folder: Path) -> Path:
    (folder / "file").write_text("no folder")
    return folder / "file"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


PATHS: dict[str, Callable[[Path], object]] = {
    "empty": lambda folder: "",
    "NUL": lambda folder: "a\0b",
    "300 characters": lambda folder: "x" * 300,
    "5,000 characters": lambda folder: "y/" * 2500,
    "not UTF-8": lambda folder: "a\udcffb",
    "symlink loop": symlink_loop,
    "dangling link": dangling_link,
    "file": plain_file,
    "below a file": lambda folder: plain_file(folder) / "below",
    "pipe": pipe,
    "/proc": lambda folder: "/proc",
    "in /proc": lambda folder: "/proc/nothing",
}
USES: dict[str, Callable[[object], list[object]]] = {
    "dataset": lambda path: ["maps", "--teacher", "test_resnet", "--dataset", path, "--split", "s", "--out", "o"],
    "data-dir": lambda path: [
        *("maps", "--teacher", "test_resnet", "--dataset", "folder/", "--split", "s", "--out", "o", "--data-dir", path)
    ],
    "maps": lambda path: ["verify", "--maps", path, "--dataset", "digits", "--split", "train"],
    "teacher": lambda path: ["maps", "--teacher", path, "--dataset", "digits", "--split", "train", "--out", "o"],
    "teacher folder": lambda path: [
        *("maps", "--teacher", f"local-dir:{path}", "--dataset", "digits", "--split", "train", "--out", "o")
    ],
    "checkpoint": lambda path: [
        *("evaluate", "--model", "test_resnet", "--checkpoint", path),
        *("--dataset", "digits", "--split", "train", "--out", "o"),
    ],
    "push-maps": lambda path: ["push-maps", path, "--repo-id", "user/name"],
    "push-student": lambda path: ["push-student", path, "--repo-id", "user/name"],
    "run's maps": lambda path: ["run", "--maps", path, "--", "train.py"],
}


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("use", USES)
def test_path_that_cannot_be_read_ends_with_2_and_one_line(kind, use, command: Runner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = command(*USES[use](PATHS[kind](tmp_path)))
    assert outcome.code == 2
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("kind", sorted({*PATHS} - {"file", "dangling link"}))  # those two a file may replace
@pytest.mark.parametrize("use", ["maps", "preview", "evaluate"])
def test_path_that_cannot_be_written_ends_with_2_and_one_line(
    kind, use, command: Runner, tiny_images: ImageFactory, teacher_folder: Path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = ["--dataset", tiny_images(), "--split", "train", "--out", PATHS[kind](tmp_path)]
    teacher = f"local-dir:{teacher_folder}"
    if use == "preview":
        fixed = ["--teacher", teacher, "--dataset", tmp_path / "images", "--split", "train", "--n-steps", 1]
        assert command("maps", *fixed, "--out", "store").code == 0
    argv = {
        "maps": ["maps", "--teacher", teacher, "--n-steps", 1],
        "preview": ["preview", "--maps", "store"],
        "evaluate": ["evaluate", "--model", teacher],
    }
    outcome = command(*argv[use], *data)
    assert outcome.code == 2
    if kind == "pipe":
        assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("out", [plain_file, dangling_link])
def test_maps_go_into_no_file_and_no_dangling_link(
    out, command: Runner, tiny_images: ImageFactory, teacher_folder: Path, tmp_path
):
    fixed = ["--teacher", f"local-dir:{teacher_folder}", "--dataset", tiny_images(), "--split", "train"]
    outcome = command("maps", *fixed, "--n-steps", 1, "--out", out(tmp_path))
    assert outcome.code == 2


@pytest.mark.parametrize("kind", ["parquet", "folder", "saved"])
@pytest.mark.parametrize("name", ["new\nline", "glob[*]?{a,b}!", "back\\slash", " space ", "ü"])
def test_folder_of_an_odd_name_works(
    kind, name, command: Runner, tiny_images: ImageFactory, teacher_folder: Path, tmp_path
):
    images = tiny_images(kind="parquet" if kind == "saved" else kind)
    if kind == "saved":
        datasets.load_dataset(str(images), split="train").save_to_disk(str(tmp_path / "saved"))
        images = tmp_path / "saved"
    expected = load_labeled_images(str(images), "train")
    keys = [(image.tobytes(), label) for image, label in (expected[i] for i in range(8))]
    odd = images.rename(tmp_path / name)
    found = load_labeled_images(str(odd), "train")
    assert [(image.tobytes(), label) for image, label in (found[i] for i in range(8))] == keys
    assert (found.name, found.class_names) == (str(odd), expected.class_names)
    out = tmp_path / f"maps of {name}"
    data = ["--dataset", odd, "--split", "train"]
    assert command("maps", "--teacher", f"local-dir:{teacher_folder}", *data, "--n-steps", 1, "--out", out).code == 0
    assert command("preview", "--maps", out, *data, "--out", tmp_path / f"{name}.png").code == 0
    assert len(MapStore(out)) == 8


def test_changed_content_of_an_odd_folder_is_seen(tiny_images: ImageFactory, tmp_path):
    odd = tiny_images(kind="folder", n=4).rename(tmp_path / "glob[*]")
    assert len(load_labeled_images(str(odd), "train")) == 4
    more = tiny_images(kind="folder", n=6)
    for path in more.rglob("*.png"):
        path.rename(odd / path.relative_to(more))
    assert len(load_labeled_images(str(odd), "train")) == 6


def test_dataset_without_rows_is_named(command: Runner, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    empty = datasets.Dataset.from_dict({"image": [], "label": []}, features=features)
    (tmp_path / "zero").mkdir()
    empty.to_parquet(str(tmp_path / "zero" / "train-00000-of-00001.parquet"))
    argv = ["maps", "--teacher", "test_resnet", "--dataset", tmp_path / "zero", "--split", "train"]
    outcome = command(*argv, "--out", tmp_path / "maps")
    assert outcome.code == 2
    assert "has no rows, expected at least one image" in outcome.error


# ---- numbers ----

TWENTY = "9" * 20
NUMBERS = [
    *[("evaluate", option, value) for option in ("--batch-size", "--workers") for value in (-1, "1.5", "x")],
    *[("evaluate", "--batch-size", 0), ("evaluate", "--workers", TWENTY), ("evaluate", "--corruptions", -1)],
    *[("maps", "--n-steps", value) for value in (0, -1, TWENTY, "9" * 5000, "1.5")],
    *[("maps", option, value) for option in ("--limit", "--map-size", "--shard-size") for value in (0, -1)],
    *[("maps", "--chunk-size", 0), ("maps", "--shard", "0/0"), ("maps", "--shard", "-1/2"), ("maps", "--shard", "2")],
    *[("maps", "--max-steps", TWENTY), ("maps", "--tolerance", "nan"), ("maps", "--teacher-args", "a=? [b]")],
]


@pytest.mark.parametrize(("name", "option", "value"), NUMBERS)
def test_number_out_of_range_ends_with_2(
    name, option, value, command: Runner, tiny_images: ImageFactory, teacher_folder: Path, tmp_path
):
    role = "--model" if name == "evaluate" else "--teacher"
    data = ["--dataset", tiny_images(), "--split", "train", "--out", tmp_path / "out"]
    outcome = command(name, role, f"local-dir:{teacher_folder}", *data, option, value)
    assert outcome.code == 2
    assert not (tmp_path / "out").exists()


def test_batch_larger_than_any_memory_is_the_whole_dataset(
    command: Runner, tiny_images: ImageFactory, teacher_folder: Path, tmp_path, monkeypatch
):
    monkeypatch.setattr("timm_igkd.evaluation.metrics.time_models", lambda models, *args: [{} for _ in models])
    data = ["--dataset", tiny_images(), "--split", "train", "--out", tmp_path / "m.json"]
    outcome = command("evaluate", "--model", f"local-dir:{teacher_folder}", *data, "--batch-size", TWENTY)
    assert outcome.code == 0, outcome.error


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, int(TWENTY)])
def test_seed_of_more_than_64_bits_is_an_input_error(seed):
    for draw in (generator, uniforms):
        with pytest.raises(InputError, match="at most 64 bits"):
            draw(seed, "purpose", 1)


def test_most_steps_is_allowed_and_one_more_is_not():
    assert IGOptions(n_steps=10_000).n_steps == 10_000
    with pytest.raises(InputError, match=r"n_steps must be in \[1, 10000\], got 10001"):
        IGOptions(n_steps=10_001)


# ---- options that would have no effect ----


@pytest.mark.parametrize(
    "options",
    [
        ["--teacher", "test_resnet"],
        ["--teacher-mean", 0, 0, 0],
        ["--teacher-use-ema"],
        ["--recompute", 1, "--teacher-args", "num_classes=2"],
    ],
)
def test_verify_refuses_a_teacher_that_it_would_not_ask(options, command: Runner, tmp_path):
    (tmp_path / "maps").mkdir()
    outcome = command("verify", "--maps", tmp_path / "maps", "--dataset", "digits", "--split", "train", *options)
    assert outcome.code == 2
    assert "has no effect without --" in outcome.error


@pytest.mark.parametrize("classes", [5, 2])
@pytest.mark.parametrize("asked", ["evaluate", "export", "maps"])
def test_classifier_of_random_weights_is_refused(
    asked, classes, command: Runner, teacher_folder, tiny_images, tmp_path
):
    """With the number that the folder's weights have, nothing changes."""
    role = "teacher" if asked == "maps" else "model"
    flags = [f"--{role}", f"local-dir:{teacher_folder}", f"--{role}-args", f"num_classes={classes}"]
    flags += ["--out", tmp_path / ("m.json" if asked == "evaluate" else "out")]
    data = ["--dataset", tiny_images(), "--split", "train"]
    outcome = command(asked, *flags, *([] if asked == "export" else data), *["--n-steps", 2] * (asked == "maps"))
    assert outcome.code == (0 if classes == 2 else 2), outcome.error
    if classes == 5:
        expected = f"which has 2 classes, a classifier of random weights; leave it out of --{role}-args, or give --"
        assert f"num_classes=5 gives 'local-dir:{teacher_folder}', {expected}" in outcome.error


def test_evaluate_refuses_options_of_a_teacher_without_one(command: Runner, tmp_path):
    data = ["--dataset", "digits", "--split", "train", "--out", tmp_path / "m.json"]
    outcome = command("evaluate", "--model", "test_resnet", *data, "--teacher-std", 1, 1, 1)
    assert outcome.code == 2
    assert "--teacher-std has no effect without --teacher" in outcome.error


def test_argument_that_is_not_utf8_is_told_on_any_terminal(capsys):
    def fail() -> None:
        raise InputError("no split '\udcff'")

    assert run_reporting_errors(fail, "it") == 2
    assert capsys.readouterr().err == "it: error: no split '\\udcff'\n"


# ---- a run's test images ----


def test_test_image_outside_of_its_folder_is_found_before_anything_trains(
    recipe: Runner, tiny_images: ImageFactory, tmp_path
):
    images = two_splits(tiny_images)
    names = datasets.ClassLabel(names=["class_0", "class_1"])
    features = datasets.Features({"image": datasets.Image(decode=False), "label": names})
    cells = {"image": [{"bytes": None, "path": "/etc/hostname"}] * 2, "label": [0, 1]}
    datasets.Dataset.from_dict(cells, features=features).to_parquet(str(images / "test-00000-of-00001.parquet"))
    outcome = recipe(*tiny_run(images))
    assert outcome.code == 2
    assert "outside of its dataset's folder" in outcome.error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("revision", ["main", "refs/pr/1", "user/branch"])
def test_maps_of_a_revision_with_slashes_are_a_name_of_the_hub(revision: str) -> None:
    for name in (f"user/maps@{revision}", f"hf-hub:user/maps@{revision}"):
        assert maps_argument(name) == name
    with pytest.raises(MissingFileError, match="does not exist"):
        maps_argument(f"deep/user/maps@{revision}")


def test_verify_asks_for_the_teacher_before_it_reads_all_rows(command: Runner, tiny_images, teacher_folder, tmp_path):
    images = tiny_images()
    assert command(*maps_of(images, teacher_folder, tmp_path / "maps")).code == 0
    teacher_folder.rename(tmp_path / "elsewhere")  # it is this test's own
    given = ["verify", "--maps", tmp_path / "maps", "--dataset", images, "--split", "train", "--recompute", 2]
    outcome = command(*given)
    assert outcome.code == 2
    assert "name the one that made it with --teacher" in outcome.error
    assert "match" not in outcome.output
    assert command(*given, "--teacher", f"local-dir:{tmp_path / 'elsewhere'}").code == 0
