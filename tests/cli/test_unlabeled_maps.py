"""Maps of the predicted class need no labels: a folder of images goes through maps, verify, preview and the overlay."""

import shutil
from pathlib import Path

import pytest
from command_lines import Runner
from tiny_parts import noise_image
from torch.utils.data import Subset

from timm_igkd import IGOverlay, IGOverlayDataset, MapStore
from timm_igkd.data.labels import UNLABELED
from timm_igkd.data.unlabeled import load_unlabeled_images


def save_images(folder: Path, *parts: str) -> Path:
    for seed in range(4):
        path = folder / parts[seed % len(parts)] / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(seed).save(path)
    return folder


@pytest.fixture
def maps(command: Runner, teacher_folder: Path, tmp_path: Path):
    """Return `maps(images, *options)`, which builds tmp_path/maps."""
    fixed = ["--teacher", f"local-dir:{teacher_folder}", "--split", "train", "--out", tmp_path / "maps"]
    return lambda images, *options: command("maps", *fixed, "--dataset", images, "--n-steps", 2, *options)


LAYOUTS = {
    "flat": ((".",), []),
    "flat split beside class folders": (("train",), []),
    "nested": (("b", "a"), ["--label-column", "none"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder_without_labels_gets_maps_that_verify(layout, maps, command: Runner, tiny_images, tmp_path):
    parts, options = LAYOUTS[layout]
    images = tiny_images("folder", split="test", n=4) if "beside" in layout else tmp_path / "images"
    save_images(images, *parts)
    outcome = maps(images, "--target", "predicted", *options)
    assert outcome.code == 0, outcome.error
    assert MapStore(tmp_path / "maps").rows["label"][:] == [UNLABELED] * 4
    data = ["--maps", tmp_path / "maps", "--dataset", images, "--split", "train", *options]
    assert command("verify", *data).code == 0
    assert command("preview", *data, "--out", tmp_path / "grid.png").code == 0
    among = images / "train" if "beside" in layout else images
    assert "lies among the images of" in command("preview", *data, "--out", among / "grid.png").error
    assert not (among / "grid.png").exists()


def test_data_dir_beside_images_without_labels_is_refused(maps, tmp_path):
    images = save_images(tmp_path / "images", "b", "a")
    outcome = maps(images, "--target", "predicted", "--label-column", "none", "--data-dir", tmp_path)
    assert outcome.code == 2
    assert f"--data-dir {tmp_path} has no effect beside --label-column none" in outcome.error


def test_data_set_that_lost_images_is_previewed_and_fails_to_verify(maps, command: Runner, tmp_path):
    images = save_images(tmp_path / "images", ".")
    assert maps(images, "--target", "predicted").code == 0
    (images / "3.png").unlink()
    data = ["--maps", tmp_path / "maps", "--dataset", images, "--split", "train"]
    assert command("preview", *data, "--out", tmp_path / "grid.png").code == 0
    assert "the dataset has 3 images" in command("verify", *data).error


def test_maps_of_images_without_labels_are_scored(maps, command: Runner, teacher_folder, tmp_path):
    images = save_images(tmp_path / "images", "b", "a")
    options = ["--dataset", images, "--label-column", "none"]
    assert maps(images, "--target", "predicted", *options).code == 0
    teacher = [
        "--teacher",
        f"local-dir:{teacher_folder}",
        "--split",
        "train",
        "--steps",
        2,
        "--out",
        tmp_path / "score.json",
    ]
    outcome = command("score", "--maps", tmp_path / "maps", *teacher, *options)
    assert outcome.code == 0, outcome.error
    assert "4 images" in outcome.output


def test_altered_image_without_label_fails_to_verify(maps, command: Runner, tmp_path):
    images = save_images(tmp_path / "images", ".")
    maps(images, "--target", "predicted")
    noise_image(9).save(images / "2.png")
    outcome = command("verify", "--maps", tmp_path / "maps", "--dataset", images, "--split", "train")
    assert outcome.code == 2
    assert "row 2 does not belong" in outcome.error


def test_overlay_finds_the_maps_of_images_without_labels_by_their_pixels(maps, tmp_path):
    maps(save_images(tmp_path / "images", "."), "--target", "predicted")
    images, store = load_unlabeled_images(str(tmp_path / "images")), MapStore(tmp_path / "maps")
    overlay = IGOverlay(1.0, max_power=1.0)
    backwards = IGOverlayDataset(Subset(images, [3, 2, 1, 0]), store, overlay, seed=0)
    for index in range(4):
        image, label = backwards[index]
        wanted = overlay.apply(images.read(3 - index)[0], store.overlay_map(3 - index), 1.0)
        assert (image.tobytes(), label) == (wanted.tobytes(), UNLABELED)


def test_same_image_twice_is_fine(maps, command: Runner, tmp_path):
    images = save_images(tmp_path / "images", ".")
    shutil.copy(images / "1.png", images / "7.png")
    assert maps(images, "--target", "predicted").code == 0
    assert command("verify", "--maps", tmp_path / "maps", "--dataset", images, "--split", "train").code == 0


def test_maps_of_the_label_need_labels(maps, tmp_path):
    outcome = maps(save_images(tmp_path / "images", "."))
    assert outcome.code == 2
    assert "have no labels, expected a folder for each of two classes or more" in outcome.error
