"""Every case of the list of bad input ends as its group says: exit code, one line, nothing that looks complete."""

import errno
import io
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

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from command_lines import Runner, tiny_run, two_splits
from conftest import ImageFactory, tiny_image
from PIL import Image
from tiny_parts import tiny_teacher

from timm_igkd import IGOverlay, MapStore, load_labeled_images
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.maps.manifest import Halving
from timm_igkd.models.loading import save_model


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


@pytest.fixture
def store(command: Runner, tiny_images: ImageFactory, teacher_folder: Path, tmp_path: Path) -> Path:
    """Return the maps of 8 images, in tmp_path / "maps"; the images are in tmp_path / "images"."""
    outcome = command(*maps_of(tiny_images(), teacher_folder, tmp_path / "maps"))
    assert outcome.code == 0, outcome.error
    return tmp_path / "maps"


# ---- exit code 2: data ----


def corrupt_image(folder: Path) -> Path:
    cells = [encoded(tiny_image(index, index % 2, 16, 0)) for index in range(4)]
    cells[2] = {"bytes": cells[2]["bytes"][:60], "path": "third.png"}
    return write_rows(folder, cells, [0, 1, 0, 1])


def corrupt_parquet(folder: Path) -> Path:
    whole = corrupt_image(folder) / "train-00000-of-00001.parquet"
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return folder


def deep_image(folder: Path) -> Path:
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 250)
    return write_rows(folder, [encoded(tiny_image(0, 0, 16, 0)), encoded(deep)], [0, 1])


def empty_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def good(folder: Path) -> Path:
    return write_rows(folder, [encoded(tiny_image(index, index % 2, 16, 0)) for index in range(4)], [0, 1, 0, 1])


ONE_SPLIT = ["--validation-split", "none", "--validation-fraction", 0, "--test-split", "train"]
TINY_MODELS = ["--teacher", "test_resnet", "--student", "none", "--compare", "none"]
TINY_RUN = ["--protocol", "demo", "--name", "run", *TINY_MODELS, *ONE_SPLIT, "--batch-size", 2, "--teacher-epochs", 1]

BAD_DATA: dict[str, tuple[Callable[[Path], Path], list[str], str]] = {
    "missing folder": (lambda folder: folder, [], "does not exist"),
    "empty folder": (empty_folder, [], "holds no data"),
    "missing split": (good, ["--split", "validation"], "'validation'.*train"),
    "missing image column": (good, ["--image-column", "imag"], "did you mean 'image'"),
    "missing label column": (good, ["--label-column", "labels"], "did you mean 'label'"),
    "column of another kind": (good, ["--image-column", "label"], "expected Image"),
    "corrupt image": (corrupt_image, [], r"image 2 \(third.png\).*cannot be decoded"),
    "corrupt parquet": (corrupt_parquet, [], "corrupt"),
    "16-bit image": (deep_image, [], "image 1 of.*16 bits"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_ends_maps_with_2(case: str, command: Runner, teacher_folder: Path, tmp_path: Path) -> None:
    make, options, message = BAD_DATA[case]
    outcome = command(*maps_of(make(tmp_path / "data"), teacher_folder, tmp_path / "maps", *options))
    assert outcome.code == 2
    assert re.search(message, outcome.error)
    assert not is_store(tmp_path / "maps")


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_ends_the_recipe_with_2(case: str, recipe: Runner, tmp_path: Path) -> None:
    make, options, message = BAD_DATA[case]
    options = ["--train-split" if option == "--split" else option for option in options]
    outcome = recipe(*TINY_RUN, "--n-steps", 2, "--dataset", make(tmp_path / "data"), *options)
    assert outcome.code == 2
    assert re.search(message, outcome.error)
    run = tmp_path / "runs" / "run"
    assert not (run / "teacher").exists()
    assert not list(run.glob(".stages/teacher.json"))


def test_corrupt_image_in_a_worker_ends_the_recipe_with_2(recipe: Runner, tmp_path: Path) -> None:
    images = corrupt_image(tmp_path / "data")
    outcome = recipe(*TINY_RUN, "--workers", 1, "--dataset", images)
    assert outcome.code == 2
    assert "third.png" in outcome.error


# ---- exit code 2: maps and models that do not belong together ----


def test_maps_of_other_data_are_refused(command: Runner, store: Path, tiny_images: ImageFactory) -> None:
    other = tiny_images(seed=1, name="other")
    before = files_of(store)
    outcome = command("verify", "--maps", store, "--dataset", other, "--split", "train")
    assert outcome.code == 2
    assert "row 0" in outcome.error
    teacher = store.parent / "teacher"
    outcome = command(*maps_of(other, teacher, store))
    assert outcome.code == 2
    assert "other settings: dataset.name" in outcome.error
    assert files_of(store) == before


def test_maps_of_changed_images_under_the_same_name_are_refused(
    command: Runner, store: Path, tiny_images: ImageFactory
) -> None:
    tiny_images(seed=1)  # overwrites the folder that the maps were made of
    before = files_of(store)
    outcome = command(*maps_of(store.parent / "images", store.parent / "teacher", store))
    assert outcome.code == 2
    assert "maps of other data" in outcome.error
    assert files_of(store) == before


def test_maps_of_another_teacher_are_refused(command: Runner, store: Path, tmp_path: Path) -> None:
    save_model(tiny_teacher(classes=2, size=16, seed=1), tmp_path / "other")
    before = files_of(store)
    outcome = command(*maps_of(tmp_path / "images", tmp_path / "other", store))
    assert outcome.code == 2
    assert "teacher.name" in outcome.error
    shutil.rmtree(tmp_path / "teacher")
    (tmp_path / "other").rename(tmp_path / "teacher")
    outcome = command(*maps_of(tmp_path / "images", tmp_path / "teacher", store))
    assert outcome.code == 2
    assert "teacher.weights_sha256" in outcome.error
    argv = ["--maps", store, "--dataset", tmp_path / "images", "--split", "train", "--recompute", 2]
    outcome = command("verify", *argv)
    assert outcome.code == 2
    assert "another teacher" in outcome.error
    assert files_of(store) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--n-steps", 3], "options.n_steps is 2 there, 3 here"),
        (["--baseline", "black"], "options.baseline"),
        (["--limit", 4], "n is 8 there, 4 here"),
        (["--map-size", 8], "map_size"),
        (["--logits"], "logits"),
        (["--engine", "captum"], "engine"),
    ],
)
def test_maps_of_other_options_are_refused(
    options: list[object], named: str, command: Runner, store: Path, tmp_path: Path
) -> None:
    before = files_of(store)
    outcome = command(*maps_of(tmp_path / "images", tmp_path / "teacher", store, *options))
    assert outcome.code == 2
    assert named in outcome.error
    assert files_of(store) == before


@pytest.fixture
def teacher_of_5(tmp_path: Path) -> Path:
    save_model(tiny_teacher(classes=5, size=16), tmp_path / "five")
    return tmp_path / "five"


def test_teacher_of_other_classes_is_refused(
    command: Runner, recipe: Runner, tiny_images: ImageFactory, teacher_of_5: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    images = two_splits(tiny_images)
    outcomes = [
        command(*maps_of(images, teacher_of_5, tmp_path / "maps")),
        recipe(*tiny_run(images, "--teacher-epochs", 0, "--teacher", f"local-dir:{teacher_of_5}")),
    ]
    split = ["--dataset", images, "--split", "test", "--out", tmp_path / "m.json"]
    models = ["--model", f"local-dir:{teacher_folder}", "--teacher", f"local-dir:{teacher_of_5}"]
    outcomes.append(command("evaluate", *models, *split))
    for outcome in outcomes:
        assert outcome.code == 2
        assert "5 classes" in outcome.error
    assert not any((tmp_path / name).exists() for name in ("maps", "runs", "m.json"))


def test_student_of_other_class_names_is_refused(
    command: Runner, tiny_images: ImageFactory, teacher_folder: Path, tmp_path: Path
) -> None:
    save_model(tiny_teacher(classes=2, size=16), tmp_path / "pets", label_names=["cat", "dog"])
    split = ["--dataset", tiny_images(), "--split", "train", "--out", tmp_path / "m.json"]
    outcome = command("evaluate", "--model", f"local-dir:{tmp_path / 'pets'}", *split)
    assert outcome.code == 2
    assert "'class_0' is not among them" in outcome.error
    assert not (tmp_path / "m.json").exists()


# ---- exit code 2: names and numbers ----


def test_unknown_names_offer_the_nearest(command: Runner, recipe: Runner, tmp_path: Path) -> None:
    yaml_file = tmp_path / "typo.yaml"
    yaml_file.write_text("overlay_probb: 0.2\n")
    dataset = ["--dataset", "digits", "--split", "train", "--out", tmp_path / "maps"]
    cases = [
        (command("maps", "--teacher", "resnet19", *dataset), "did you mean 'resnet18'"),
        (command("maps", "--teacher", "resnet18", *dataset, "--n-step", 3), "did you mean '--n-steps'"),
        (command("maps", "--teacher", "resnet18", *dataset, "--engine", "fats"), "fast"),
        (command("mapz"), "maps"),
        (recipe("--teacher", "test_resnett"), "did you mean 'test_resnet'"),
        (recipe("--student", "resnet19"), "did you mean 'resnet18'"),
        (recipe("--config", yaml_file), "did you mean 'overlay_prob'"),
        (recipe("--overlay-probb", 0.2), "did you mean '--overlay-prob'"),
        (recipe("--opt", "adamv"), "did you mean 'adam"),
        (recipe("--sched", "cosin"), "did you mean 'cosine'"),
        (recipe("--loss-type", "dk"), "did you mean 'dkd'"),
        (recipe("--aa", "rnd-m9"), "rand-m9-mstd0.5"),
        (recipe("--config", tmp_path / "none.yaml"), "does not exist"),
    ]
    for outcome, message in cases:
        assert outcome.code == 2, outcome
        assert message in outcome.error
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(
    "options",
    [
        "--student-drop 0",
        "--student-drop -1",
        "--student-drop 50",
        "--overlay-prob 1.5",
        "--overlay-prob -0.1",
        "--overlay-prob nan",
        "--overlay-weight 2",
        "--overlay-max-power 0.5",
        "--temperature 0",
        "--temperature -1",
        "--temperature inf",
        "--distill-loss-weight -0.1",
        "--distill-loss-weight 1.5",
        "--distill-loss-weight nan",
        "--task-loss-weight -1",
        "--attention-loss-weight -1",
        "--n-steps 0",
        "--n-steps many",
        "--tolerance 1",
        "--epochs 0",
        "--batch-size 0",
        "--batch-size 5000",
        "--train-limit 0",
        "--map-size 0",
        "--lr -1",
        "--lr nan",
        "--seed -1",
        "--clip-grad 0",
        "--mixup 0.2 --batch-size 3",
        "--mixup -1",
        "--smoothing 1.5",
        "--validation-split none --validation-fraction 1",
        "--name a/b",
        "--protocol demo --dataset torch/cifar10",
    ],
)
def test_numbers_out_of_range_end_the_recipe_before_it_writes(options: str, recipe: Runner, tmp_path: Path) -> None:
    outcome = recipe(*options.split())
    assert outcome.code == 2
    assert not (tmp_path / "runs").exists()


# ---- exit code 2: verify ----


def test_altered_map_fails_verify(command: Runner, store: Path, tmp_path: Path) -> None:
    shard = next((store / "data").glob("*.parquet"))
    rows = datasets.load_dataset("parquet", data_files=str(shard), split="train")
    rows = rows.cast_column("map", datasets.Image(decode=False))
    levels = np.array(Image.open(io.BytesIO(rows[3]["map"]["bytes"])))
    levels[0, 0] ^= 1
    cells = [encoded(Image.fromarray(levels)) if index == 3 else row["map"] for index, row in enumerate(rows)]
    features = rows.features
    altered = datasets.Dataset.from_dict(rows.to_dict() | {"map": cells}, features=features)
    altered.to_parquet(str(shard))
    outcome = command("verify", "--maps", store, "--dataset", tmp_path / "images", "--split", "train")
    assert outcome.code == 2
    assert "image 3 of" in outcome.error
    assert "is damaged: its hash differs" in outcome.error


def test_other_split_and_missing_store_fail_verify(
    command: Runner, store: Path, tiny_images: ImageFactory, tmp_path: Path
) -> None:
    images = tiny_images(split="test")
    outcome = command("verify", "--maps", store, "--dataset", images, "--split", "test")
    assert outcome.code == 2
    assert "image 0 of" in outcome.error
    outcome = command("verify", "--maps", tmp_path / "nothing", "--dataset", images, "--split", "test")
    assert outcome.code == 2
    assert "does not exist" in outcome.error


def test_store_without_provenance_is_not_complete(command: Runner, store: Path, tmp_path: Path) -> None:
    (store / "provenance.json").unlink()
    outcome = command(
        "preview", "--maps", store, "--dataset", tmp_path / "images", "--split", "train", "--out", "p.png"
    )
    assert outcome.code == 2
    assert "not complete" in outcome.error


# ---- exit code 1 ----


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


# ---- exit code 1: the Hub ----

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
        recipe(*tiny_run(images, "--teacher-epochs", 0, "--teacher-args", "num_classes=2")),
    ]
    for outcome in outcomes:
        assert outcome.code == 1, outcome
        assert re.search("cannot be reached|connection to the Hub", outcome.error)
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
