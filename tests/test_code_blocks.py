"""Every code block of README and docs runs as written, in a folder with small stand-ins for what it names."""

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
from fixture_parts import HUB_TOKEN
from hub_parts import code_blocks, make_run, plain_student
from hub_server import HubServer, running_hub
from timm.data import ImageNetInfo
from tiny_parts import ImageList, noise_image, png, tiny_teacher, write_tar

from timm_igkd import IGOptions, compute_maps, export_student, load_labeled_images, load_model, save_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCKS = [
    (page, language, block)
    for page, text in PAGES.items()
    for language, block in re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)
]
NOT_RUN = {  # how a block begins: why it does not run here
    "git clone ": "there is no network, and it changes the environment",
    "make ": "the targets make environments of their own; that they exist is tested below",
    "pip install 'timmx": "it needs another exporter and OpenVINO; what it printed, by hand, is the block below it",
    "sbatch ": "there is no Slurm; tests/test_launchers.py reads the files it names",
    "torchrun --nnodes=2 ": "it waits for a second machine; tests/test_launchers.py starts two launchers on one",
}
TEACHER, STUDENT = "resnet50.a1_in1k", "mobilenetv3_small_100.lamb_in1k"
CLASSES = ("tabby cat", "dog", "zebra")
N = 8  # images of each split, in as many of ImageNet's classes
WORDNET_IDS = list(ImageNetInfo().label_names())[:: -1000 // N]  # and in another order
TRAIN_COMMAND = "timm-igkd distill"
SHRUNK = " --epochs 1 --teacher_epochs 1 --max_steps_per_epoch 1 --batch_size 4"
FINISHED = "timm-igkd distill --dataset path/to/images --teacher resnet10t --teacher-init random"
FINISHED += " --student test_resnet --student-init random"  # of runs/images, for blocks that go on from it
SHRUNK += " --train_limit 24 --test_limit 4 --img_size 64"
CHECKS = {  # of what a python block leaves, by a word in it
    "onnxruntime": "assert about['class_names'][int(logits[0].argmax())] == 'dog'",
    'create_model("local-dir:': "assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, model.num_classes)",
    "IGOverlayDataset": "assert student.conv1.weight.grad.abs().sum() > 0 and teacher.conv1.weight.grad is None\n"
    "names = timm.data.ImageNetInfo().label_names()\n"
    "assert [names[i] for i in task._class_index] == dataset.reader.dataset.features['label'].names\n"
    f"assert student.num_classes == {N}",
}


def title(block: tuple[str, str, str]) -> str:
    page, _, text = block
    return " ".join([page, *text.split()[:3]])


def is_run(block: tuple[str, str, str]) -> bool:
    _, language, text = block
    return language != "text" and not text.startswith(tuple(NOT_RUN))


def stand_in_images() -> ImageList:
    return ImageList([noise_image(seed, 40, 40) for seed in range(N)], list(range(N)), "user/images")


def write_images(folder: Path) -> None:
    """Write N images of some of ImageNet's classes, turned round as validation and test split."""
    images = stand_in_images()
    label = datasets.ClassLabel(names=WORDNET_IDS)
    kinds = datasets.Features({"image": datasets.Image(), "label": label})
    for quarters, split in enumerate(("train", "validation", "test")):
        turned = [image.rotate(90 * quarters) for image in images.images]
        columns: dict[str, Any] = {"image": turned, "label": images.labels}
        rows = datasets.Dataset.from_dict(columns, features=kinds)
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
    teacher, images, folder = tiny_teacher(classes=1000), stand_in_images(), tmp_path_factory.mktemp("maps")
    images.classes = WORDNET_IDS  # type: ignore[attr-defined]
    compute_maps(teacher, images, folder, options=IGOptions(n_steps=2), progress=False)
    return folder


def write_models(folder: Path) -> None:
    """Save teacher and student of the class folders; both answer "dog" to anything, in int8 too."""
    for name in ("teacher", "student"):
        model = tiny_teacher(classes=len(CLASSES))
        model.get_classifier().bias.data[CLASSES.index("dog")] = 1e3
        save_model(model, folder / name, label_names=CLASSES)


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images in class folders, a teacher of theirs and its maps of them."""
    root = tmp_path_factory.mktemp("class_folders")
    for split in ("train", "test"):
        for label, name in enumerate(CLASSES):
            for index in range(20 if split == "train" else 2):
                path = root / "path" / "to" / "images" / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise_image(100 * label + index + (50 if split == "test" else 0), 40, 40).save(path)
    write_models(root)
    export_student(load_model(f"local-dir:{root / 'student'}"), root / "exported", progress=False)
    images = load_labeled_images(str(root / "path" / "to" / "images"), "train")
    teacher = load_model(f"local-dir:{root / 'teacher'}")
    compute_maps(teacher, images, root / "path" / "of" / "maps", options=IGOptions(n_steps=2), progress=False)
    return root


@pytest.fixture
def workspace(tmp_path: Path, maps: Path, class_folders: Path) -> Path:
    """Return a folder as a reader's who has come to any block: a finished demo, maps, a timm script, images."""
    shutil.copytree(class_folders, tmp_path, dirs_exist_ok=True)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    shutil.copy(ROOT / "tests" / "cli" / "timm_scripts" / "train.py", tmp_path)
    shutil.copytree(maps, tmp_path / "maps")
    make_run(tmp_path / "runs" / "demo", plain_student(), maps)
    noise_image(1, 60, 40).save(tmp_path / "photo.jpg")
    images = stand_in_images()
    members = [(png(image), str(label)) for image, label in zip(images.images, images.labels, strict=True)]
    for name, part in (("train-0", members[:4]), ("train-1", members[4:]), ("validation-0", members[:4])):
        write_tar(tmp_path / "path" / "to" / "tars" / f"{name}.tar", part)
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


def test_every_block_is_python_bash_or_what_they_print():
    assert {language for _, language, _ in BLOCKS} == {"python", "bash", "text"}
    assert len(BLOCKS) == sum(text.count("```") for text in PAGES.values()) / 2
    assert not any(
        re.search(r"\n\n    [\w$]", text) for text in PAGES.values()
    )  # an indented block, which is not found


def test_every_reason_not_to_run_a_block_is_needed():
    beginnings = [beginning for beginning in NOT_RUN if any(text.startswith(beginning) for _, _, text in BLOCKS)]
    assert beginnings == list(NOT_RUN)


def test_make_targets_of_the_documents_exist():
    targets = set(re.findall(r"^make ([\w-]+)", "\n".join(text for _, _, text in BLOCKS), flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


@pytest.mark.slow
@pytest.mark.hub
@pytest.mark.parametrize("block", [block for block in BLOCKS if is_run(block)], ids=title)
def test_block_runs_as_written(block: tuple[str, str, str], hub: HubServer, workspace: Path):
    _, language, text = block
    if "local-dir:runs/images" in text:
        write_models(workspace / "runs" / "images")
    if language == "python":
        if "edge/model.onnx" in text:
            (workspace / "exported").rename(workspace / "edge")
        (check,) = [code for word, code in CHECKS.items() if word in text]
        run([sys.executable, "-c", f"{text}\nimport torch\n{check}\n"], hub, workspace)
        return
    if "--out maps" in text:
        shutil.rmtree(workspace / "maps")
    if TRAIN_COMMAND in text:
        shutil.rmtree(workspace / "runs")
        if "--config runs/images" in text:
            run(["bash", "-c", FINISHED + SHRUNK], hub, workspace)
        text = text.rstrip() + SHRUNK
    run(["bash", "-euo", "pipefail", "-c", text], hub, workspace)
    for command, left in LEFT.items():
        if command in text:
            assert (workspace / left).exists() if isinstance(left, str) else left[1] in hub.repo(*left[0]).files


LEFT: dict[str, Any] = {  # what a command leaves: a file, or a file in a repository of the Hub
    f"{TRAIN_COMMAND} --dataset": "runs/images/report/index.html",
    "--compare --export onnx-int8": "runs/images/export/model_int8.onnx",
    "config.yaml --compare": "runs/images/arms",
    "config.yaml --export onnx-int8": "runs/images/export/model_int8.onnx",
    "timm-igkd export": "edge/model_int8.onnx",
    "timm-igkd students": "edge/students.svg",
    "timm-igkd evaluate": "m.json",
    "timm-igkd score": "path/of/maps/score.json",
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
