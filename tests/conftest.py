"""Shared fixtures, and a Hugging Face home of its own for the session: no test reads or writes the user's."""

import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_HF_HOME = tempfile.mkdtemp(prefix="timm-igkd-tests-")
os.environ.update(  # read by huggingface_hub and datasets when they are imported, so before anything imports them
    HF_HOME=_HF_HOME,
    HF_HUB_CACHE=f"{_HF_HOME}/hub",
    HF_DATASETS_CACHE=f"{_HF_HOME}/datasets",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    HF_UPDATE_DOWNLOAD_COUNTS="0",
    MPLBACKEND="Agg",
)
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
from fixture_parts import HUB_TOKEN, ImageFactory, tiny_image  # noqa: E402
from PIL import Image  # noqa: E402

_SHARED = Path(os.environ.get("TIMM_IGKD_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (_SHARED / "data").is_dir():
        return
    skip = pytest.mark.skip(reason=f"needs shared data, {_SHARED}/data does not exist (set TIMM_IGKD_SHARED)")
    for item in items:
        if "shared" in item.keywords or "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(skip)


def pytest_unconfigure() -> None:
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_progress_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow machines would print them into what a test compares."""
    monkeypatch.setattr("timm_igkd.progress.SECONDS_BETWEEN_LINES", math.inf)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the shared data; a test that asks for it is skipped where it is absent."""
    return _SHARED


@pytest.fixture
def allocator_settings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the process's allocator would be told from now on, (parameter, value) each; nothing reaches it."""
    from timm_igkd.cli import freed_memory

    told: list[tuple[int, int]] = []
    library = types.SimpleNamespace(mallopt=lambda *setting: told.append(setting))
    monkeypatch.setattr(freed_memory, "_kept", False)
    monkeypatch.setattr(freed_memory, "sys", types.SimpleNamespace(platform="linux"))
    monkeypatch.setattr(freed_memory, "ctypes", types.SimpleNamespace(CDLL=lambda name: library))
    return told


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """Return `mount(name, size)`, a file system of that size at tmp_path / name; only where a root user asks for it."""
    if "TIMM_IGKD_TEST_MOUNT" not in os.environ:
        pytest.skip("mounts a small tmpfs; as root, set TIMM_IGKD_TEST_MOUNT=1")
    mounted = []

    def mount(name: str, size: str) -> Path:
        disk = tmp_path / name
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def tiny_images(tmp_path: Path) -> ImageFactory:
    """Return `make(kind="parquet", n=8, size=16, classes=2, split="train", seed=0, name="images") -> folder`.

    Image i has label i % classes. Another split goes into the same folder by another call; the same arguments give the
    same pixels. "parquet" writes `<split>-00000-of-00001.parquet` (columns `image`, `label`), "folder" writes
    `<split>/<class>/<index>.png`.
    """

    def make(
        kind: str = "parquet",
        n: int = 8,
        size: int = 16,
        classes: int = 2,
        split: str = "train",
        seed: int = 0,
        name: str = "images",
    ) -> Path:
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        labels = [index % classes for index in range(n)]
        split_seed = seed * 1000 + sum(split.encode())
        images = [tiny_image(index, label, size, split_seed) for index, label in enumerate(labels)]
        class_names = [f"class_{label}" for label in range(classes)]
        if kind == "parquet":
            _write_parquet(root / f"{split}-00000-of-00001.parquet", images, labels, class_names)
        elif kind == "folder":
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                path = root / split / class_names[label] / f"{index:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
        else:
            raise ValueError(f"kind must be parquet or folder, got {kind!r}")
        return root

    return make


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a stand-in for the Hub that this process takes for it, logged in as "user", with an empty cache."""
    from hub_server import running_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    from timm_igkd.hub import errors as hub_errors

    with running_hub() as server:
        server.tokens[HUB_TOKEN] = "user"
        monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no_token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hub_errors, "RETRY_WAITS_S", (0.05, 0.05, 0.05))
        yield server
        close_session()
    assert server.problems == []


def _write_parquet(path: Path, images: list[Image.Image], labels: list[int], class_names: list[str]) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=class_names)})
    columns: dict[str, Any] = {"image": images, "label": labels}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))


@pytest.fixture
def command(capsys: pytest.CaptureFixture) -> Callable[..., Any]:
    """Return `command("maps", "--out", …) -> Outcome`, which runs timm-igkd in process."""
    from command_lines import run_command

    return lambda *argv: run_command(capsys, *argv)


@pytest.fixture
def recipe(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return `recipe("--epochs", 1, …) -> Outcome`: the recipe in process, its runs under tmp_path/runs."""
    from command_lines import run_recipe

    from timm_igkd.evaluation import metrics as evaluation

    monkeypatch.setattr(evaluation, "time_models", functools.partial(evaluation.time_models, seconds=0.0))
    monkeypatch.setattr("timm_igkd.runs.students.onnx_metrics", lambda model: {})  # seconds per export
    return lambda *argv: run_recipe(capsys, tmp_path / "runs", *argv)


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Path:
    """Return a saved teacher of 2 classes at 16x16."""
    from tiny_parts import tiny_teacher

    from timm_igkd.models.loading import save_model

    save_model(tiny_teacher(classes=2, size=16), tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of gloo with this process alone in it."""
    import torch.distributed

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def no_accelerator_left() -> Iterator[None]:
    """Forget after each test what accelerators share, such as a precision: the next would take it over."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture
def accelerator() -> Any:
    """An accelerator on the CPU, in float32."""
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.fixture
def bf16_accelerator() -> Any:
    """An accelerator on the CPU, in bfloat16."""
    from accelerate import Accelerator

    return Accelerator(cpu=True, mixed_precision="bf16")
