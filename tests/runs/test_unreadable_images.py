"""An image that cannot be used ends a run before anything is trained, whichever stage would have come upon it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from command_lines import Runner, leave_empty_page, subprocess_environment, tiny_run, two_splits
from PIL import Image

from timm_igkd.data.loading import load_labeled_images
from timm_igkd.errors import InputError
from timm_igkd.runs import data
from timm_igkd.training.accelerator import on_main
from timm_igkd.training.trainer import Trainer


def deepen(path: Path) -> str:
    """Put 16-bit pixels in the place of an image's, and return what is said of them."""
    Image.fromarray(np.full((16, 16), 1000, dtype=np.uint16)).save(path)
    return "16-bit pixels"


def cut(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-40])
    return "cannot be decoded as an image"


def empty(path: Path) -> str:
    path.write_bytes(b"")
    return "cannot be decoded as an image"


@pytest.fixture
def images(tiny_images) -> Path:
    """Class folders with the splits train, val and test."""
    tiny_images("folder", n=8, split="val")
    return two_splits(tiny_images, kind="folder")


@pytest.fixture(autouse=True)
def norms_are_not_tried(monkeypatch):
    """It reads some of the training images."""
    monkeypatch.setattr("timm_igkd.runs.job.check_trainable", lambda *args: None)


@pytest.fixture
def refused(recipe: Runner, images, tmp_path, monkeypatch) -> Callable[..., str]:
    """Return `refused(*options)`, the error of a run that ended before anything was trained or written."""
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("was trained"))

    def refuse(*options: object) -> str:
        outcome = recipe(*tiny_run(images, "--overlay-prob", 0, *options))
        assert outcome.code == 2, outcome.output
        assert not (tmp_path / "runs").exists()
        return outcome.error

    return refuse


@pytest.mark.parametrize("damage", [deepen, cut, empty])
@pytest.mark.parametrize("split", ["test", "val"])
def test_image_of_another_split_is_found_before_training(split, damage, refused, images):
    said = damage(images / split / "class_1" / "0003.png")
    error = refused("--validation-split", "val")
    assert "image 5 (0003.png) of" in error
    assert f"split {split!r}" in error
    assert said in error


@pytest.mark.parametrize("options", [[], ["--validation-fraction", 0], ["--compare"], ["--teacher-epochs", 1]])
def test_image_of_the_training_split_is_found_before_training(options, refused, images):
    for path in (images / "train").glob("*/0015.png"):
        said = deepen(path)
    assert said in (error := refused("--batches", "workers", *options))
    assert "(0015.png) of" in error


def test_image_without_a_label_is_found_before_training(refused, images, tmp_path):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "more" / "a.png")
    said = deepen(tmp_path / "more" / "b.png")
    assert said in (error := refused("--unlabeled", tmp_path / "more", "--batches", "workers"))
    assert "(b.png) of" in error


def test_maps_that_come_first_read_the_training_images(recipe: Runner, images, teacher_folder, tmp_path, monkeypatch):
    """They are not decoded a second time; the other splits are."""

    def stop(trainer: Trainer) -> None:
        raise InputError("a teacher was to be trained")

    monkeypatch.setattr(Trainer, "fit", stop)
    checked = []
    monkeypatch.setattr(data.LabeledImages, "check_images", lambda self, n: checked.append((self.split, len(self))))
    cut(images / "train" / "class_1" / "0015.png")
    given = ["--teacher", f"local-dir:{teacher_folder}", "--teacher-epochs", 0, "--batches", "workers"]
    for options, found in (([], ["test"]), (["--validation-split", "val"], ["val", "test"])):
        checked.clear()
        outcome = recipe(*tiny_run(images, *given, "--overlay-prob", 0.5, "--name", f"run{len(options)}", *options))
        assert outcome.code == 2
        assert "(0015.png) of" in outcome.error
        assert [split for split, _ in checked] == found
    checked.clear()
    outcome = recipe(*tiny_run(images, "--overlay-prob", 0.5, "--name", "other", "--batches", "workers"))
    assert outcome.error.endswith("a teacher was to be trained")
    assert checked == [("train", 12), ("train", 4), ("test", 8)]


def test_nothing_is_read_again_for_a_finished_run(recipe: Runner, images, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda self: self.history_path.write_text("epoch\n"))
    monkeypatch.setattr("timm_igkd.runs.job.write_report", leave_empty_page)
    command = tiny_run(images, "--overlay-prob", 0)
    assert recipe(*command).code == 0
    monkeypatch.setattr(data.LabeledImages, "check_images", lambda *args: pytest.fail("was read"))
    assert recipe(*command).code == 0


def test_beyond_a_number_of_images_headers_are_looked_at(images):
    found = load_labeled_images(str(images), "test")
    assert len(found) == 8
    cut(images / "test" / "class_1" / "0007.png")  # the last one
    found.check_images(7)
    with pytest.raises(InputError, match=r"image 7 \(0007.png\) of .* cannot be decoded"):
        found.check_images(8)
    deepen(images / "test" / "class_1" / "0007.png")
    with pytest.raises(InputError, match=r"image 7 \(0007.png\) of .* 16-bit pixels"):
        found.check_images(0)
    (images / "test" / "class_0" / "0000.png").unlink()
    with pytest.raises(InputError, match=r"image 0 \(0000.png\) of .* cannot be read"):
        found.check_images(0)


@pytest.mark.parametrize("mode", ["F", "I", "I;16"])
def test_a_header_tells_deep_pixels_of_every_kind(mode, images):
    Image.new(mode, (16, 16)).save(images / "test" / "class_0" / "0000.tiff")
    with pytest.raises(InputError, match="16 bits or more"):
        load_labeled_images(str(images), "test").check_images(0)


def test_an_error_of_the_main_process_is_raised():
    accelerator = Accelerator(cpu=True)
    assert on_main(accelerator, lambda: 3) == 3

    def refuse() -> None:
        raise InputError("one line")

    with pytest.raises(InputError, match="one line"):
        on_main(accelerator, refuse)


@pytest.mark.slow
def test_all_processes_end_with_the_error(images, tmp_path):
    deepen(images / "test" / "class_1" / "0003.png")
    options = tiny_run(images, "--overlay-prob", 0, "--output-dir", tmp_path / "runs")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "timm_igkd", "distill", *map(str, options)],
        env=subprocess_environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "(0003.png) of" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "runs").exists()
