"""Commands and the recipe run in process, and what the user is told when they fail."""

import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
from accelerate.state import AcceleratorState, GradientState
from fixture_parts import ImageFactory
from PIL import Image

from timm_igkd.cli import main as cli

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
    lines = [line for line in captured.err.splitlines() if not line.startswith("timm-igkd run: overlays")]
    assert len(lines) == (1 if code else 0), captured.err
    return Outcome(code, lines[0] if lines else "", captured.out)


def run_command(capsys: pytest.CaptureFixture, *argv: object) -> Outcome:
    """Run timm-igkd."""
    return run_in_process(cli.main, argv, capsys)


def run_recipe(capsys: pytest.CaptureFixture, runs: Path, *argv: object) -> Outcome:
    """Run recipes/train_igkd.py with its runs under `runs`."""
    return run_in_process(train_igkd.main, ["--output-dir", runs, *argv], capsys)


def tiny_run(images: Path, *options: object) -> list[object]:
    """Return the recipe's flags for a run of seconds on `images`, which needs a train and a test split."""
    sizes = "--validation-fraction 0.25 --teacher-epochs 1 --epochs 1 --batch-size 4 --n-steps 2"
    models = "--teacher test_resnet --student none --compare none"
    fixed = f"--protocol demo --name run --validation-split none {models} {sizes}"
    return [*fixed.split(), "--dataset", images, *options]


def two_splits(tiny_images: ImageFactory, n: int = 16, **options: object) -> Path:
    """Return a folder with a train split of `n` images and a test split of 8."""
    tiny_images(n=8, split="test", **options)
    return tiny_images(n=n, split="train", **options)


def subprocess_environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process of its own: its own Hugging Face home, few threads."""
    names = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_DATASETS_CACHE": str(home / "datasets")}
    return os.environ | names | {"OMP_NUM_THREADS": "1"} | more


def maps_of(images: object, teacher: Path, out: Path, *options: object) -> list[object]:
    fixed = ["--teacher", f"local-dir:{teacher}", "--dataset", images, "--out", out, "--n-steps", 2]
    return ["maps", *fixed, *([] if "--split" in options else ["--split", "train"]), *options]


def write_rows(folder: Path, cells: list[dict[str, Any]], labels: list[int], classes: int = 2) -> Path:
    """Write encoded images, whatever their bytes, as a parquet split."""
    folder.mkdir()
    names = datasets.ClassLabel(names=[f"class_{label}" for label in range(classes)])
    features = datasets.Features({"image": datasets.Image(decode=False), "label": names})
    rows = datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)
    rows.to_parquet(str(folder / "train-00000-of-00001.parquet"))
    return folder


def encoded(image: Image.Image, kind: str = "PNG") -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return {"bytes": buffer.getvalue(), "path": None}


def is_store(folder: Path) -> bool:
    return (folder / "provenance.json").exists()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def leave_empty_page(folder: Path, **_: Any) -> None:
    """Stand in for `write_report`, which draws for seconds."""
    (folder / "report").mkdir(exist_ok=True)
    (folder / "report" / "index.html").touch()
