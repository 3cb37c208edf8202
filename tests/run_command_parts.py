"""What tests of `timm-igkd run` share: scripts, and folders of images with maps that are known."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
from tiny_parts import ramp, write_store

from timm_igkd.data.items import read_item

WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),  # of Python from 3.12 on
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than this machine has cores
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # timm leaves the images it read open
    pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning"),
]


SCRIPTS = Path(__file__).parent / "cli" / "timm_scripts"
TRAIN = SCRIPTS / "train.py"
N = 40
SIZE = 16
MODEL = ["--model", "test_resnet", "--num-classes", "2", "--img-size", "32"]


def image_folder(tiny_images: Callable[..., Path], n: int = N, **options: Any) -> Path:
    tiny_images(kind="folder", n=8, size=SIZE, split="validation", **options)
    return tiny_images(kind="folder", n=n, size=SIZE, split="train", **options)


class Images:
    """Items of timm's training dataset as the store is built from them."""

    def __init__(self, name: str, root: str | None, count: int | None = None):
        self.dataset = timm.data.create_dataset(name, root=root, split="train")
        self.count = count or len(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return read_item(self.dataset, index)


def ramp_store(folder: Path, name: str, root: object, count: int | None = None) -> Path:
    images = Images(name, None if root is None else str(root), count)
    maps = [ramp(index, *images[index][0].size) for index in range(images.count)]
    return write_store(folder, images, maps).path


def summary(output: Path) -> list[dict[str, str]]:
    with open(output / "summary.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "images_per_s"} for row in csv.DictReader(file)]


def train(command, folder: Path, out: Path, *options: object, run: tuple[object, ...] | None = None) -> list[dict]:
    script = [TRAIN, folder, *MODEL, "--epochs", 2, "--output", out, *options]
    outcome = command("run", *run, "--", *script) if run is not None else run_alone(script)
    assert outcome is None or outcome.code == 0
    return summary(out)


def run_alone(script: list[object]) -> None:
    from timm_igkd.with_plugin import run_script

    run_script([str(part) for part in script])
