"""Every code block of the README runs as written, in a folder with small stand-ins for what it names."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import safetensors.torch
import timm
import torch
from conftest import HUB_TOKEN
from hub_parts import code_blocks, make_run, plain_student
from hub_server import HubServer, running_hub
from timm.data import ImageNetInfo
from tiny_parts import ImageList, noise_image, png, tiny_teacher, write_tar

from timm_igkd import IGOptions, compute_maps

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
TEACHER, STUDENT = "resnet50.a1_in1k", "mobilenetv3_small_100.lamb_in1k"
N = 8  # images of each split, in as many of ImageNet's classes
TRAIN_COMMAND = "timm-igkd distill"
SHRUNK = " --epochs 1 --batch_size 4 --max_steps_per_epoch 1 --test_limit 4 --img_size 64"
CHECKS = {  # of what a python block leaves, by a word in it
    "local-dir:": "assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 2)",
    "IGOverlayDataset": "assert student.conv1.weight.grad.abs().sum() > 0 and teacher.conv1.weight.grad is None",
}


def title(block: tuple[str, str]) -> str:
    return " ".join(block[1].split()[:3])


def stand_in_images() -> ImageList:
    return ImageList([noise_image(seed, 40, 40) for seed in range(N)], list(range(N)), "user/images")


def write_images(folder: Path) -> None:
    """Write N images with ImageNet's classes, the same as every split."""
    images = stand_in_images()
    label = datasets.ClassLabel(names=list(ImageNetInfo().label_names()))
    columns: dict[str, Any] = {"image": images.images, "label": images.labels}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(), "label": label}))
    for split in ("train", "validation", "test"):
        rows.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """Yield a Hub that holds the images and a teacher of random weights under the README's names."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    torch.manual_seed(0)
    with running_hub() as server:
        server.tokens[HUB_TOKEN] = "user"
        server.add("user/images", "datasets").commit({f"data/{p.name}": p.read_bytes() for p in folder.iterdir()})
        for name in (TEACHER, STUDENT):
            weights = safetensors.torch.save(timm.create_model(name.partition(".")[0]).state_dict())
            server.add(f"timm/{name}").commit({"model.safetensors": weights})
        yield server
    assert server.problems == []


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher, folder = tiny_teacher(classes=N), tmp_path_factory.mktemp("maps")
    compute_maps(teacher, stand_in_images(), folder, options=IGOptions(n_steps=2), progress=False)
    return folder


@pytest.fixture
def workspace(tmp_path: Path, maps: Path) -> Path:
    """Return a folder as a reader's who has come to any block: a finished demo, maps, a timm script, images."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    shutil.copy(ROOT / "tests" / "cli" / "timm_scripts" / "train.py", tmp_path)
    shutil.copytree(maps, tmp_path / "maps")
    make_run(tmp_path / "runs" / "demo", plain_student(), maps)
    images = stand_in_images()
    members = [(png(image), str(label)) for image, label in zip(images.images, images.labels, strict=True)]
    for name, part in (("train-0", members[:4]), ("train-1", members[4:]), ("validation-0", members[:4])):
        write_tar(tmp_path / "path" / "to" / "tars" / f"{name}.tar", part)
    for split in ("train", "test"):
        for label, name in enumerate(("tabby cat", "dog", "zebra")):
            for index in range(20 if split == "train" else 2):
                path = tmp_path / "path" / "to" / "images" / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise_image(100 * label + index, 40, 40).save(path)
    return tmp_path


def run(command: list[str], hub: HubServer, folder: Path) -> str:
    """Run a command in `folder` with an empty Hugging Face home; it must succeed without a traceback."""
    env = hub.environment(folder / "home", HUB_TOKEN) | {"HOME": str(folder / "home"), "MPLBACKEND": "Agg"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert HUB_TOKEN not in done.stdout + done.stderr
    return done.stdout


def test_every_block_is_python_or_bash():
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    assert len(BLOCKS) == README.count("```") / 2


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^make ([\w-]+)", "\n".join(text for _, text in BLOCKS), flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


@pytest.mark.slow
@pytest.mark.hub
@pytest.mark.parametrize("block", [b for b in BLOCKS if not b[1].startswith(("make ", "pip install "))], ids=title)
def test_block_runs_as_written(block: tuple[str, str], hub: HubServer, workspace: Path):
    language, text = block
    if language == "python":
        (check,) = [code for word, code in CHECKS.items() if word in text]
        run([sys.executable, "-c", f"{text}\nimport torch\n{check}\n"], hub, workspace)
        return
    if "--out maps" in text:
        shutil.rmtree(workspace / "maps")
    if TRAIN_COMMAND in text:
        text = text.rstrip() + SHRUNK
    run(["bash", "-euo", "pipefail", "-c", text], hub, workspace)
    for command, left in LEFT.items():
        if command in text:
            assert (workspace / left).exists() if isinstance(left, str) else left[1] in hub.repo(*left[0]).files


LEFT: dict[str, Any] = {  # what a command leaves: a file, or a file in a repository of the Hub
    TRAIN_COMMAND: "runs/images/report/index.html",
    "timm-igkd maps": "maps/provenance.json",
    "timm-igkd preview": "grid.png",
    "push-maps": (("user/maps", "datasets"), "provenance.json"),
    "push-student": (("user/student", "models"), "model.safetensors"),
}


@pytest.mark.slow
def test_card_of_a_local_store_runs_as_written(hub: HubServer, workspace: Path):
    """The cards on the Hub: test_hub_student.py and test_hub_maps.py run what they say in fresh processes."""
    folder = workspace / "path" / "of" / "this" / "folder"
    shutil.copytree(workspace / "maps", folder)
    (code,) = code_blocks((folder / "README.md").read_text(encoding="utf-8"))
    assert run([sys.executable, "-c", code], hub, workspace) == f"{N} (32, 32)\n"
