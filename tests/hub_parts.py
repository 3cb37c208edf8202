"""A small run folder and a map store, as the tests of the Hub push them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fixture_parts import HUB_TOKEN
from tiny_parts import ImageList, noise_image, tiny_teacher
from torch import nn

from timm_igkd import IGOptions, compute_maps, save_model, truncate

IMAGES = ImageList([noise_image(seed, 24, 24) for seed in range(10)], [seed % 2 for seed in range(10)], "noise")
IMAGES.split = "train"
NAMES = ["cat", "dog"]
HUB_MARKS = [  # huggingface_hub hands files to its HTTP client in a form that the client would like to see go
    pytest.mark.hub,
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
]


def build_maps(folder: Path, seed: int = 0, **options):
    """Build a store of 10 maps in three shards."""
    teacher = tiny_teacher(seed=seed)
    return compute_maps(teacher, IMAGES, folder, options=IGOptions(n_steps=2, **options), shard_size=4, progress=False)


def plain_student(seed: int = 1) -> nn.Module:
    """Return a student that plain timm can build."""
    return tiny_teacher("test_resnet", seed=seed)


def plugin_student() -> nn.Module:
    """Return a student that timm builds after `import timm_igkd` only."""
    return truncate(tiny_teacher(seed=2), 2, num_classes=2).eval()


def make_run(folder: Path, student: nn.Module, store: Path | None = None, *, seed: int = 0, top1: float = 80.0) -> Path:
    """Write what recipes/train_igkd.py leaves."""
    save_model(student, folder / "student", label_names=NAMES)
    side = {"top1": top1, "top5": 100.0, "loss": 0.5, "ece": 0.04, "n": 50, "dataset": "noise", "split": "test"}
    side |= {"num_parameters": 2_000_000, "macs": 8e7, "size_mb": 8.0}
    side |= {"device": "cpu", "threads": 2, "hardware": "Some CPU @ 2 GHz"}
    side["latency_ms"] = {f"batch_{b}": {"median": 2.0 * b, "p90": 3.0 * b, "n": 9} for b in (1, 64)}
    metrics = side | {"num_parameters": 400_000, "teacher": side | {"top1": 90.0}, "compression": 5.0}
    (folder / "metrics.json").write_text(json.dumps(metrics | {"agreement": 88.0, "teacher_kl": 0.1}))
    config = {"name": folder.name, "dataset": "noise", "teacher": "test_resnet", "teacher_epochs": 3, "student": None}
    config |= {"student_drop": 2, "overlay_prob": 0.1, "overlay_weight": 0.5, "temperature": 2.5, "epochs": 2}
    config |= {"distill_loss_weight": 0.01, "task_loss_weight": None}
    config |= {"train_split": "train", "test_split": "test", "mixup": 0.0, "cutmix": 0.0, "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"timm_igkd": "0.1.0", "timm": "1.0.31", "torch": "2.15.0"}))
    if store is not None:
        (folder / "maps").mkdir()
        (folder / "maps" / "provenance.json").write_bytes((store / "provenance.json").read_bytes())
    return folder


def code_blocks(card: str, language: str = "python") -> list[str]:
    """Return a card's code of one language, as a reader would copy it."""
    return re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)


def run_python(code: str, env: dict[str, str], cwd: Path) -> str:
    """Run code in a fresh process and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def one_error_line(capfd):
    """Return the one line that a command printed, its token in none of it."""
    out, err = capfd.readouterr()
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("timm-igkd: error: ")
    assert HUB_TOKEN not in out + err
    return lines[0]
