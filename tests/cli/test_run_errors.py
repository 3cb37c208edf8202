"""A run that cannot go on ends with exit code 1; what a machine may lack is handled."""

import errno
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from command_lines import Runner, encoded, files_of, is_store, maps_of, tiny_run, two_splits, write_rows
from fixture_parts import ImageFactory, tiny_image
from PIL import Image
from tiny_parts import tiny_teacher

from timm_igkd import IGOverlay, MapStore, load_labeled_images
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.maps.manifest import Halving
from timm_igkd.models.loading import save_model

# ---- the disk, and numbers that are none ----


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return `fill(n)`: after n more files the disk is full."""

    def fill(files: int) -> None:
        real, left = os.fsync, [files]

        def fsync(descriptor: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    return fill


@pytest.mark.parametrize("files", [0, 1, 2, 3])
def test_full_disk_ends_maps_with_1_and_the_same_command_goes_on(
    files: int,
    full_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    command: Runner,
    tiny_images: ImageFactory,
    teacher_folder: Path,
    tmp_path: Path,
) -> None:
    argv = maps_of(tiny_images(), teacher_folder, tmp_path / "maps", "--shard-size", 4)
    full_disk(files)  # manifest, two shards, card, provenance
    outcome = command(*argv)
    assert outcome.code == 1
    assert "No space left" in outcome.error
    assert not is_store(tmp_path / "maps")
    monkeypatch.undo()
    assert command(*argv).code == 0
    assert not list((tmp_path / "maps").rglob("*.tmp"))


@pytest.mark.parametrize("files", [0, 2, 3, 5])
def test_full_disk_ends_the_recipe_with_1(
    files: int, full_disk: Callable[[int], None], recipe: Runner, tiny_images: ImageFactory, tmp_path: Path
) -> None:
    full_disk(files)
    outcome = recipe(*tiny_run(two_splits(tiny_images)))
    assert outcome.code == 1
    assert "No space left" in outcome.error
    run = tmp_path / "runs" / "run"
    assert not (run / "metrics.json").exists()
    assert not (run / "student").exists()


@pytest.mark.slow
def test_full_file_system_ends_maps_and_recipe_with_1(
    command: Runner,
    recipe: Runner,
    tiny_images: ImageFactory,
    teacher_folder: Path,
    small_disk: Callable[[str, str], Path],
) -> None:
    disk = small_disk("runs", "100k")
    images = two_splits(tiny_images, n=256, size=32)
    outcome = recipe(*tiny_run(images))
    assert outcome.code == 1, outcome
    assert not (disk / "run" / "teacher" / "config.json").exists()
    shutil.rmtree(disk / "run")
    outcome = command(*maps_of(images, teacher_folder, disk / "maps"))
    assert outcome.code == 1, outcome
    assert not is_store(disk / "maps")


def test_infinite_loss_ends_the_recipe_with_1(recipe: Runner, tiny_images: ImageFactory, tmp_path: Path) -> None:
    images = two_splits(tiny_images)
    outcome = recipe(*tiny_run(images, "--opt", "sgd", "--lr", 1e30, "--warmup-epochs", 0, "--epochs", 3))
    assert outcome.code == 1
    assert "NaN or infinite in epoch" in outcome.error
    assert not (tmp_path / "runs" / "run" / "teacher").exists()


def test_teacher_with_nan_weights_ends_maps_with_1(command: Runner, tiny_images: ImageFactory, tmp_path: Path) -> None:
    teacher = tiny_teacher(classes=2, size=16)
    with torch.no_grad():
        next(teacher.parameters())[0] = float("nan")
    save_model(teacher, tmp_path / "nan")
    outcome = command(*maps_of(tiny_images(), tmp_path / "nan", tmp_path / "maps"))
    assert outcome.code == 1
    assert "not finite" in outcome.error
    assert not is_store(tmp_path / "maps")


def test_nan_map_ends_maps_with_1(
    command: Runner,
    tiny_images: ImageFactory,
    teacher_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = FastEngine.attribute

    def attribute(self: FastEngine, *args: Any) -> Any:
        found = real(self, *args)
        found.values[5, 0, 0, 0] = float("nan")
        return found

    monkeypatch.setattr(FastEngine, "attribute", attribute)
    outcome = command(*maps_of(tiny_images(), teacher_folder, tmp_path / "maps"))
    assert outcome.code == 1
    assert "image 5 of" in outcome.error
    assert not is_store(tmp_path / "maps")


# ---- the Hub ----

HUB_ANSWERS = {
    "wrong token": (401, None, "refused the token"),
    "missing": (404, "RepoNotFound", "does not exist, or is private"),
    "private": (401, "RepoNotFound", "does not exist, or is private"),
    "gated": (403, "GatedRepo", "gated"),
}


def point_hub_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Hub's clients, which read their environment once, talk to `url`, and not wait between tries."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("huggingface_hub", "datasets"):
            for constant, value in list(vars(module).items()):
                if isinstance(value, str) and value.startswith("https://huggingface.co"):
                    monkeypatch.setattr(module, constant, value.replace("https://huggingface.co", url))
                if constant in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
                    monkeypatch.setattr(module, constant, False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def refusing_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str | None], None]]:
    """Start a Hub; `refuse(status, error_code)` sets its answer to everything."""
    answer: list[Any] = [404, None]

    class Refuse(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answer[0])
            if answer[1]:
                self.send_header("X-Error-Code", answer[1])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_HEAD

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        point_hub_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        yield lambda status, code: answer.__setitem__(slice(None), [status, code])
        server.shutdown()
        thread.join()


@pytest.mark.hub
@pytest.mark.parametrize("case", HUB_ANSWERS)
def test_refused_repository_ends_with_1(
    case: str,
    refusing_hub: Callable[[int, str | None], None],
    command: Runner,
    recipe: Runner,
    tiny_images: ImageFactory,
    tmp_path: Path,
) -> None:
    status, code, message = HUB_ANSWERS[case]
    refusing_hub(status, code)
    out = tmp_path / "maps"
    remote_model = ["--teacher", "hf-hub:user/none"]
    remote_data = ["--dataset", f"user/{case.replace(' ', '-')}", "--teacher", "test_resnet"]
    images = two_splits(tiny_images)
    outcomes = [
        command("maps", *remote_model, "--dataset", images, "--split", "train", "--out", out),
        command("maps", *remote_data, "--split", "train", "--out", out),
        recipe(*tiny_run(images, *remote_model, "--teacher-epochs", 0)),
        recipe(*tiny_run(images, *remote_data)),
    ]
    for outcome in outcomes:
        assert outcome.code == 1, outcome
        assert re.search(message, outcome.error)
    assert not out.exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.hub
def test_no_network_ends_with_1(
    command: Runner, recipe: Runner, tiny_images: ImageFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # nobody listens there once it is closed
    point_hub_at(f"http://127.0.0.1:{port}", monkeypatch)
    images, split = two_splits(tiny_images), ["--split", "train", "--out", tmp_path / "maps"]
    outcomes = [
        command("maps", "--teacher", "hf-hub:user/none", "--dataset", images, *split),
        command("maps", "--teacher", "test_resnet", "--dataset", images, *split),
        command("maps", "--teacher", "test_resnet", "--dataset", "user/none", *split),
        recipe(*tiny_run("user/none")),
        recipe(*tiny_run("nowhere")),
        recipe(*tiny_run(images, "--teacher-epochs", 0, "--teacher-args", "num_classes=2")),
    ]
    for outcome in outcomes:
        assert outcome.code == 1, outcome
        assert re.search("cannot be reached|connection to the Hub", outcome.error)
    for outcome, name in zip(outcomes[2:5], ("user/none", "user/none", "nowhere"), strict=True):
        assert f"(there is no folder '{name}' here either)" in outcome.error
    assert not (tmp_path / "maps").exists()


# ---- handled ----


def test_every_8_bit_mode_is_converted(command: Runner, teacher_folder: Path, tmp_path: Path) -> None:
    image = tiny_image(0, 0, 16, 0)
    transparent = image.convert("RGBA")
    transparent.putalpha(100)
    cells = [
        encoded(image.convert("L")),
        encoded(image.convert("LA")),
        encoded(transparent),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image.convert("P", palette=Image.Palette.ADAPTIVE)),
        encoded(image.convert("1")),
        encoded(image, "WEBP"),
        encoded(Image.new("RGB", (1, 1), (200, 10, 60))),
    ]
    images = write_rows(tmp_path / "data", cells, [0, 1] * 4)
    outcome = command(*maps_of(images, teacher_folder, tmp_path / "maps"))
    assert outcome.code == 0, outcome.error
    assert command("verify", "--maps", tmp_path / "maps", "--dataset", images, "--split", "train").code == 0
    out = tmp_path / "preview.png"
    assert (
        command("preview", "--maps", tmp_path / "maps", "--dataset", images, "--split", "train", "--out", out).code == 0
    )


def test_constant_map_is_zeros(command: Runner, tiny_images: ImageFactory, tmp_path: Path) -> None:
    teacher = tiny_teacher(classes=2, size=16)
    teacher.get_classifier().weight.data.zero_()
    save_model(teacher, tmp_path / "constant")
    images = tiny_images()
    outcome = command(*maps_of(images, tmp_path / "constant", tmp_path / "maps"))
    assert outcome.code == 0, outcome.error
    store = MapStore(tmp_path / "maps")
    assert store.provenance.statistics.constant_maps == 8
    assert all(store.rows[row]["scale"] == 0 and not store.levels(row).any() for row in range(8))
    image = load_labeled_images(str(images), "train")[0][0]
    blended = np.asarray(IGOverlay().apply(image, store.overlay_map(0), 1.5)).astype(int)
    assert np.abs(blended - np.asarray(image) / 2).max() <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_gpu_everything_runs_on_the_cpu(recipe: Runner, tiny_images: ImageFactory, tmp_path: Path) -> None:
    assert recipe(*tiny_run(two_splits(tiny_images))).code == 0
    assert json.loads((tmp_path / "runs" / "run" / "environment.json").read_text())["gpus"] == []


def out_of_memory_once(monkeypatch: pytest.MonkeyPatch, times: int, engine: type = FastEngine) -> list[int]:
    """Let the first `times` attributions run out of memory; return the chunk sizes seen, filled as they come."""
    real, chunks = engine.attribute, []

    def attribute(self: Any, *args: Any) -> Any:
        chunks.append(self.chunk_size)
        if len(chunks) <= times:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (simulated)")
        return real(self, *args)

    monkeypatch.setattr(engine, "attribute", attribute)
    return chunks


def test_out_of_memory_halves_the_chunk_and_is_recorded(
    command: Runner, tiny_images: ImageFactory, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tiny_images(n=80)
    argv = maps_of(images, teacher_folder, tmp_path / "maps", "--chunk-size", 16)
    chunks = out_of_memory_once(monkeypatch, 2)
    outcome = command(*argv)
    assert outcome.code == 0, outcome.error
    assert chunks == [16, 8, 4, 4]
    manifest = json.loads((tmp_path / "maps" / "manifest.json").read_text())
    assert manifest["chunk_size"] == 4
    assert manifest["out_of_memory_halvings"] == [{"row": 0, "chunk_size": 8}, {"row": 0, "chunk_size": 4}]
    assert MapStore(tmp_path / "maps").provenance.out_of_memory_halvings == (Halving(0, 8), Halving(0, 4))
    assert command("verify", "--maps", tmp_path / "maps", "--dataset", images, "--split", "train").code == 0
    before = files_of(tmp_path / "maps")
    assert command(*argv).code == 0  # the same command finds its store again
    assert files_of(tmp_path / "maps") == before


def test_out_of_memory_with_one_image_at_a_time_ends_with_1(
    command: Runner, tiny_images: ImageFactory, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_once(monkeypatch, 1000)
    outcome = command(*maps_of(tiny_images(), teacher_folder, tmp_path / "maps", "--chunk-size", 4))
    assert outcome.code == 1
    assert "GPU's memory" in outcome.error
    assert not is_store(tmp_path / "maps")
