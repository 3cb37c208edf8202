"""Webdataset tars and streams on the command line: `run`, `maps`, `verify`, `evaluate`."""

import csv
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_lines import maps_of, subprocess_environment, tiny_run
from tiny_parts import ramp, tiny_teacher, write_store, write_tar

from timm_igkd import IGOptions, IGOverlay, IGOverlayDataset, MapStore, compute_maps, load_labeled_images
from timm_igkd.cli import main as cli

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),  # of Python from 3.12 on
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # webdataset leaves the tars it read open
    pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning"),
]
TRAIN = Path(__file__).parent / "timm_scripts" / "train.py"
N = 16

# What a script gets of a stream: pixels and label of each image, as the overlay left them.
PROBE = """
import pickle, sys
import numpy as np
from timm.data import create_dataset
from torch.utils.data import DataLoader

name, root, split, count, workers, out = sys.argv[1:]
dataset = create_dataset(name, root=root, split=split, num_samples=int(count), is_training=True)
dataset.set_loader_cfg(int(workers))
loader = DataLoader(dataset, batch_size=1, num_workers=int(workers), collate_fn=lambda items: items[0])
with open(out, "wb") as file:
    pickle.dump({np.asarray(image).tobytes(): label for image, label in loader}, file)
"""


def shards_of(images: Path, root: Path, split: str, count: int = 2) -> Path:
    """Write the images of a class folder's split into tars, with their bytes as they are."""
    labels = {name: label for label, name in enumerate(sorted(os.listdir(images / split)))}
    files = sorted((images / split).rglob("*.*"), key=lambda file: file.name)
    members = [(file.read_bytes(), str(labels[file.parent.name])) for file in files]
    size = -(-len(members) // count)
    for shard in range(count):
        part = members[shard * size : (shard + 1) * size]
        write_tar(root / f"{split}-{shard}.tar", part, shard * size, files[0].suffix[1:])
    return root


@pytest.fixture
def folder(tiny_images) -> Path:
    tiny_images(kind="folder", n=8, split="validation")
    return tiny_images(kind="folder", n=N)


@pytest.fixture
def tars(folder, tmp_path) -> Path:
    shards_of(folder, tmp_path / "tars", "validation", 1)
    return shards_of(folder, tmp_path / "tars", "train")


@pytest.fixture
def maps(folder, tmp_path) -> Path:
    images = load_labeled_images(str(folder), "train")
    return write_store(tmp_path / "maps", images, [ramp(index, 16, 16) for index in range(N)]).path


@pytest.fixture
def probe(tmp_path) -> Path:
    path = tmp_path / "probe.py"
    path.write_text(PROBE)
    return path


# ---- run


def overlaid(command, maps: Path, probe: Path, *arguments: object) -> dict[bytes, int]:
    outcome = command(
        "run",
        "--maps",
        maps,
        "--overlay-prob",
        1,
        "--overlay-max-power",
        1,
        "--",
        probe,
        *arguments,
        probe.parent / "out",
    )
    assert outcome.code == 0, outcome.error
    return pickle.loads((probe.parent / "out").read_bytes())


def blended(images: Any, maps: Path) -> dict[bytes, int]:
    """Return what the folder route gives at p = 1 and exponent 1."""
    dataset = IGOverlayDataset(images, MapStore(maps), IGOverlay(1, max_power=1), seed=0)
    return {np.asarray(image).tobytes(): label for image, label in (dataset[index] for index in range(len(dataset)))}


@pytest.mark.parametrize("workers", [0, 2])
def test_run_overlays_tars_as_it_overlays_their_folder(command, folder, tars, maps, probe, workers):
    found = overlaid(command, maps, probe, "wds/tars", tars, "train-{0..1}.tar", N, workers)
    assert found == blended(load_labeled_images(str(folder), "train"), maps)


def test_run_overlays_a_streaming_hub_dataset(command, tiny_images, probe, tmp_path):
    rows = tiny_images(n=N, name="rows")
    images = load_labeled_images(str(rows), "train")
    store = write_store(tmp_path / "of_rows", images, [ramp(index, 16, 16) for index in range(N)]).path
    assert overlaid(command, store, probe, f"hfids/{rows}", "", "train", N, 0) == blended(images, store)


@pytest.mark.shared
def test_a_tar_of_imagenette_gives_the_blended_pixels_of_the_folder_route(command, shared, probe, tmp_path):
    images = load_labeled_images(str(shared / "data" / "imagenette_small"), "train").subset(range(24))
    store = tmp_path / "of_imagenette"
    compute_maps(tiny_teacher(classes=10), images, store, options=IGOptions(n_steps=2), progress=False)
    cells = [(cell["bytes"], str(label)) for cell, label in zip(images.rows[:]["image"], images.labels, strict=True)]
    for shard in range(2):
        write_tar(tmp_path / f"train-{shard}.tar", cells[12 * shard : 12 * (shard + 1)], 12 * shard, "jpg")
    found = overlaid(command, store, probe, "wds/imagenette", tmp_path, "train-{0..1}.tar", 24, 2)
    assert len(found) == 24
    assert found == blended(images, store)


def train(command, tars: Path, out: Path, maps: Path, *options: object) -> list[dict[str, str]]:
    splits = ["--dataset", "wds/tars", "--train-split", f"train-{{0..1}}.tar|{N}"]
    splits += ["--val-split", "validation-0.tar|8"]
    model = ["--model", "test_resnet", "--num-classes", 2, "--img-size", 32, "--batch-size", 4]
    outcome = command(
        "run", "--maps", maps, "--", TRAIN, tars, *splits, *model, "--epochs", 2, "--output", out, *options
    )
    assert outcome.code == 0, outcome.error
    with open(out / "summary.csv", newline="") as file:
        return [{name: text for name, text in row.items() if name != "images_per_s"} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "options",
    [["--workers", 2, "--mixup", 0.2], ["--no-prefetcher", "--aa", "rand-m9-tigkd", "--workers", 0]],
    ids=["workers and mixup", "tigkd"],
)
def test_a_timm_script_learns_from_a_stream_and_repeats_itself(command, tars, maps, tmp_path, options):
    runs = [train(command, tars, tmp_path / f"out{run}", maps, *options) for run in range(2)]
    assert runs[0] == runs[1]
    assert all(np.isfinite(float(row["train_loss"])) for row in runs[0])


@pytest.mark.parametrize(("argument", "seed"), [("seed=7, ", 7), ("", 42)])
def test_a_streams_draws_have_the_scripts_seed_or_timms(command, tars, maps, tmp_path, argument, seed):
    script = tmp_path / "script.py"
    script.write_text(
        "from timm.data import create_dataset\n"
        f"dataset = create_dataset('wds/tars', {str(tars)!r}, 'train-0.tar|8', {argument}is_training=True)\n"
        f"assert dataset.seed == {seed}\n"
    )
    assert command("run", "--maps", maps, "--", script).code == 0


def test_run_tells_how_many_members_timm_left_out(folder, tars, maps, probe, tmp_path, capsys):
    write_tar(tars / "train-2.tar", [(b"none", "0"), (b"neither", "1")], N)
    arguments = ["wds/tars", tars, "train-{0..2}.tar", N, 0, tmp_path / "out"]
    assert cli.main([str(part) for part in ("run", "--maps", maps, "--", probe, *arguments)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("timm-igkd")]
    assert "timm left out 2 unreadable members of 'wds/tars'; repair or remove what the lines above name" in lines[-1]
    assert {line.split(" of ")[0] for line in lines[1:-1]} == {
        "timm-igkd: 0016 in train-2.tar",
        "timm-igkd: 0017 in train-2.tar",
    }


def test_maps_of_other_data_end_a_stream_before_training(command, tars, tiny_images, tmp_path):
    others = load_labeled_images(str(tiny_images(n=N, seed=7, name="others")), "train")
    other = write_store(tmp_path / "other", others, [ramp(index, 16, 16) for index in range(N)]).path
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom timm.data import create_dataset\n"
        "create_dataset('wds/tars', sys.argv[1], split='train-0.tar|8', is_training=True)\n"
        "raise SystemExit('trained')\n"
    )
    outcome = command("run", "--maps", other, "--", script, tars)
    assert outcome.code == 2
    assert "the first image of stream 'wds/tars' has no map: its pixels are in none of the 16 rows" in outcome.error


@pytest.mark.parametrize("name", ["tfds/cifar10", "TFDS/cifar10"])
def test_tfds_is_refused_by_name(command, tars, maps, probe, name):
    outcome = command("run", "--maps", maps, "--", probe, name, tars, "train", N, 0, "out")
    assert outcome.code == 2
    assert f"dataset {name!r} is decoded by TensorFlow" in outcome.error
    assert "use wds/, hfids/, hfds/, torch/ or an image folder" in outcome.error


@pytest.mark.parametrize("comes_first", [False, True])
def test_run_has_no_explanation_loss(command, tars, maps, probe, comes_first):
    stream = ["wds/tars", tars, "train-{0..1}.tar", N, 0, probe.parent / "out"]
    options = [["--maps", maps], ["--explanation-loss-weight", 1]]
    first, second = reversed(options) if comes_first else options
    outcome = command("run", *first, *second, "--", probe, *stream)
    assert outcome.code == 2
    assert "unknown argument '--explanation-loss-weight'" in outcome.error
    assert not (probe.parent / "out").exists()


@pytest.mark.parametrize("name", ["wds/tars", "hfids/user/images"])
def test_a_run_on_a_stream_is_refused_by_name(recipe, teacher_folder, tmp_path, name):
    teacher = ["--teacher-epochs", 0, "--teacher", f"local-dir:{teacher_folder}"]
    outcome = recipe(*tiny_run(name, *teacher, "--explanation-loss-weight", 1))
    assert outcome.code == 2
    assert f"dataset {name!r} is timm's name of a stream, whose images have no index" in outcome.error
    assert not (tmp_path / "runs").exists()


def test_tars_without_webdataset_name_the_extra(command, tars, maps, probe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = command("run", "--maps", maps, "--", probe, "wds/tars", tars, "train-{0..1}.tar", N, 0, "out")
    assert outcome.code == 2
    assert "needs the package webdataset; install it: pip install 'timm-igkd[streams]'" in outcome.error


@pytest.mark.slow
def test_torchrun_streams_in_two_processes(tars, maps, tmp_path):
    executable = Path(sys.executable).with_name("timm-igkd")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc_per_node", "2", executable]
    script = [TRAIN, tars, "--dataset", "wds/tars", "--train-split", f"train-{{0..1}}.tar|{N}", "--batch-size", 4]
    script += ["--val-split", "train-{0..1}.tar|16", "--model", "test_resnet", "--num-classes", 2, "--img-size", 32]
    done = subprocess.run(
        [str(part) for part in (*torchrun, "run", "--maps", maps, "--", *script, "--workers", 1, "--output", tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=subprocess_environment(tmp_path / "home"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "summary.csv").read_text().count("\n") == 2


# ---- tars by index


def test_maps_of_tars_are_those_of_their_folder(command, folder, tars, teacher_folder, tmp_path):
    for images, out in ((folder, "of_folder"), (tars, "of_tars")):
        assert command(*maps_of(images, teacher_folder, tmp_path / out)).code == 0
    rows = [MapStore(tmp_path / out).rows for out in ("of_folder", "of_tars")]
    hashes = [sorted(store["row_hash"]) for store in rows]
    assert hashes[0] == hashes[1]


def test_verify_reads_tars(command, tars, teacher_folder, tmp_path):
    command(*maps_of(tars, teacher_folder, tmp_path / "of_tars"))
    options = ["verify", "--maps", tmp_path / "of_tars", "--dataset", tars, "--split"]
    assert command(*options, "train").code == 0
    outcome = command(*options, "validation")
    assert outcome.code == 2
    assert "row 0 does not belong to image 0 (0000.png) of" in outcome.error


def test_evaluate_reads_tars_as_their_folder(command, folder, tars, teacher_folder, tmp_path):
    metrics = []
    for images in (folder, tars):
        out = tmp_path / "metrics.json"
        arguments = ["--model", f"local-dir:{teacher_folder}", "--dataset", images, "--split", "validation"]
        assert command("evaluate", *arguments, "--out", out).code == 0
        metrics.append(json.loads(out.read_text()))
    assert [metrics[1][name] for name in ("top1", "n")] == [metrics[0][name] for name in ("top1", "n")]
    assert metrics[1]["loss"] == pytest.approx(metrics[0]["loss"])
