"""Commands and the recipe run in process, and what the user is told when they fail."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from conftest import ImageFactory
from tiny_parts import tiny_teacher

from timm_igkd import cli
from timm_igkd.model_loading import save_model

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

import train_igkd  # noqa: E402


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code, and its one line on stderr (empty where it succeeded)."""

    code: int
    error: str
    output: str


Runner = Callable[..., Outcome]


def run_in_process(main: Callable[[list[str]], int], argv: Sequence[object], capsys: pytest.CaptureFixture) -> Outcome:
    """Run `main`; a failure must leave exactly one line on stderr, a success none. No exception passes."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in argv])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == (1 if code else 0), captured.err
    return Outcome(code, lines[0] if lines else "", captured.out)


@pytest.fixture
def command(capsys: pytest.CaptureFixture) -> Runner:
    """Return `command("maps", "--out", …)`, which runs timm-igkd in process."""
    return lambda *argv: run_in_process(cli.main, argv, capsys)


@pytest.fixture
def recipe(capsys: pytest.CaptureFixture, tmp_path: Path) -> Runner:
    """Return `recipe("--epochs", 1, …)`, which runs recipes/train_igkd.py in process, runs under tmp_path/runs."""
    return lambda *argv: run_in_process(train_igkd.main, ["--output-dir", tmp_path / "runs", *argv], capsys)


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Path:
    """Return a saved teacher of 2 classes at 16x16."""
    save_model(tiny_teacher(classes=2, size=16), tmp_path / "teacher")
    return tmp_path / "teacher"


def tiny_run(images: Path, *options: object) -> list[object]:
    """Return the recipe's flags for a run of seconds on `images`, which needs a train and a test split."""
    fixed = "--name run --validation-split none --validation-fraction 0.25 --teacher-epochs 1 --epochs 1 --batch-size 4"
    return [*fixed.split(), "--n-steps", 2, "--dataset", images, *options]


def two_splits(tiny_images: ImageFactory, n: int = 16, **options: object) -> Path:
    """Return a folder with a train split of `n` images and a test split of 8."""
    tiny_images(n=8, split="test", **options)
    return tiny_images(n=n, split="train", **options)


def subprocess_environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process of its own: its own Hugging Face home, few threads."""
    names = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_DATASETS_CACHE": str(home / "datasets")}
    return os.environ | names | {"OMP_NUM_THREADS": "1"} | more
