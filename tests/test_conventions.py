"""Accelerate's and Hugging Face's conventions: the launcher decides, the environment is respected and never set."""

import ast
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.default import write_basic_config
from command_lines import RECIPES, Runner, subprocess_environment, tiny_run, two_splits
from tiny_parts import ImageList, noise_image, ramp, write_store

from timm_igkd import rounded_bfloat16
from timm_igkd.runs.settings import RunConfig
from timm_igkd.training.trainer import Trainer

ROOT = RECIPES.parent
SOURCES = sorted([*(ROOT / "timm_igkd").rglob("*.py"), *RECIPES.rglob("*.py"), *(ROOT / "hub").glob("*.py")])
LAUNCHER = {"mixed_precision", "num_processes", "num_machines", "fp16", "bf16", "amp", "dynamo_backend", "world_size"}


def calls(*names: str) -> Iterator[tuple[Path, ast.Call]]:
    """Yield (file, call) of every call of one of `names` in the package, the recipes and the Hub scripts."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in names:
                    yield path, node


def test_no_setting_competes_with_the_launcher():
    assert not LAUNCHER & {field.name for field in dataclasses.fields(RunConfig)}
    found = list(calls("Accelerator", "PartialState", "AcceleratorState"))
    assert any(getattr(call.func, "id", "") == "Accelerator" for _, call in found)
    given = {keyword.arg for _, call in found for keyword in call.keywords}
    assert not LAUNCHER & given
    assert None not in given  # ** could hide one


def test_no_source_sets_precision_for_all():
    names = ("set_default_dtype", "set_float32_matmul_precision", "init_process_group", "init_distributed_device")
    assert [str(path) for path, _ in calls(*names)] == []


def test_no_source_sets_the_environment():
    setters = {"environ.setdefault", "environ.update", "environ.pop", "os.putenv", "os.unsetenv"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
                targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
                assert not any("environ[" in ast.unparse(target) for target in targets), path
            if isinstance(node, ast.Call):
                assert not any(ast.unparse(node.func).endswith(setter) for setter in setters), path


def test_precision_comes_from_the_launcher(recipe: Runner, tiny_images, monkeypatch):
    """Nothing is trained: torch 2.14's bfloat16 weight gradients are garbage now and then on CPUs without it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found: list[tuple[str, torch.dtype]] = []

    def record(self: Trainer) -> None:
        with self.accelerator.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        found.append((self.accelerator.mixed_precision, product.dtype))

    monkeypatch.setattr(Trainer, "fit", record)
    monkeypatch.setattr(rounded_bfloat16, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr("timm_igkd.runs.job.write_report", lambda *args, **kwargs: None)  # nothing was trained
    outcome = recipe(*tiny_run(two_splits(tiny_images)))
    assert outcome.code == 0, outcome.error
    assert found == [("bf16", torch.bfloat16)] * 2  # teacher and student


CACHES = """
import sys
from timm_igkd import MapStore
from timm_igkd.data.loading import load_labeled_images
print(MapStore(sys.argv[1]).row(2).label)
try:
    load_labeled_images("user/images", "train")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_caches_go_to_hf_home_and_offline_is_at_once(tmp_path):
    images = ImageList([noise_image(seed) for seed in range(3)], [0, 1, 0])
    maps = write_store(tmp_path / "maps", images, [ramp(index, 16, 16) for index in range(3)]).path
    home = tmp_path / "home"
    home.mkdir()
    environment = subprocess_environment(tmp_path / "hf", HOME=str(home), XDG_CACHE_HOME=str(home), HF_HUB_OFFLINE="1")
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        environment.pop(name)
    done = subprocess.run(
        [sys.executable, "-c", CACHES, str(maps)], capture_output=True, text=True, timeout=180, env=environment
    )
    assert done.returncode == 0, done.stderr
    label, error = done.stdout.splitlines()
    assert label == "0"
    assert error.startswith("RunError dataset 'user/images'")
    assert list((tmp_path / "hf" / "datasets").iterdir())
    assert [path for path in home.rglob("*") if "huggingface" in str(path)] == []


@pytest.mark.parametrize("name", ["HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT"])
def test_no_source_reads_hugging_faces_variables_itself(name):
    """huggingface_hub reads them; a second reader would disagree with it one day."""
    reads = ("getenv", "get", "__getitem__")
    for path, call in calls(*reads):
        assert not any(isinstance(argument, ast.Constant) and argument.value == name for argument in call.args), path


@pytest.mark.slow
def test_file_of_accelerate_config_decides_the_precision(recipe: Runner, tiny_images, tmp_path):
    """As `accelerate config` leaves it under Hugging Face's home; only the page is left to do, see above."""
    images = two_splits(tiny_images)
    assert recipe(*tiny_run(images)).code == 0
    for name in (".stages/report.json", "environment.json"):
        (tmp_path / "runs" / "run" / name).unlink()
    file = tmp_path / "hf" / "accelerate" / "default_config.yaml"
    assert write_basic_config(mixed_precision="bf16", save_location=str(file))
    script = [str(RECIPES / "train_igkd.py"), "--output-dir", str(tmp_path / "runs")]
    options = [str(option) for option in tiny_run(images, "--trackers", "tensorboard")]
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", *script, *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=subprocess_environment(tmp_path / "hf")
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "runs" / "run" / "environment.json").read_text())
    assert (found["mixed_precision"], found["num_processes"]) == ("bf16", 1)
    assert list((tmp_path / "runs" / "run").rglob("events.out.tfevents.*"))


def test_every_launcher_setting_is_recorded_with_the_run(recipe: Runner, tiny_images, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(Trainer, "fit", lambda self: None)  # see test_precision_comes_from_the_launcher
    monkeypatch.setattr(rounded_bfloat16, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr("timm_igkd.runs.job.write_report", lambda *args, **kwargs: None)
    monkeypatch.setattr("sys.argv", ["train_igkd.py", "--dataset", "my images"])
    assert recipe(*tiny_run(two_splits(tiny_images))).code == 0
    found = json.loads((tmp_path / "runs" / "run" / "environment.json").read_text())
    assert (found["mixed_precision"], found["num_processes"]) == ("bf16", 1)
    launcher = "accelerate launch --num_processes 1 --mixed_precision bf16"
    assert found["command"] == f"{launcher} train_igkd.py --dataset 'my images'"


TOKEN_OF_A_FILE = """
import huggingface_hub
from timm_igkd.hub.transport import require_login
require_login("user/name")
print(huggingface_hub.get_token())
"""


@pytest.mark.parametrize("place", ["HF_TOKEN", "HF_HOME"])
def test_login_is_the_variables_or_that_of_the_home(tmp_path, place):
    token = "hf_" + "abc" * 10
    environment = subprocess_environment(tmp_path / "hf")
    if place == "HF_TOKEN":
        environment["HF_TOKEN"] = token
    else:
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf" / "token").write_text(token)
    done = subprocess.run(
        [sys.executable, "-c", TOKEN_OF_A_FILE], capture_output=True, text=True, timeout=180, env=environment
    )
    assert done.stdout.strip() == token, done.stderr
