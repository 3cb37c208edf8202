"""Killed at random moments, run by several processes: the same bytes of a store, the same weights of a student."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_lines import RECIPES
from fixture_parts import ImageFactory
from tiny_parts import tiny_teacher

from timm_igkd.models.loading import save_model

pytestmark = pytest.mark.slow

MAP_KILLS, TRAINING_KILLS = 20, 10
LIMIT_S = 180
RECIPE = str(RECIPES / "train_igkd.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", "--num_cpu_threads_per_process", "1"]


def start(argv: list[object], threads: int = 1) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen(
        [str(argument) for argument in argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(argv: list[object], threads: int = 1) -> str:
    process = start(argv, threads)
    output, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors[-2000:]
    return output


def kill_in_work(argv: list[object], progress: Callable[[], int], delay: float) -> bool:
    """Start, wait for the process's first progress, kill -9 `delay` seconds later; return whether it was still at
    work."""
    process, before, end = start(argv), progress(), time.monotonic() + LIMIT_S
    while progress() == before and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0), errors[-2000:]
    return process.returncode != 0


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- maps ----


@pytest.fixture
def maps_job(tiny_images: ImageFactory, tmp_path: Path) -> list[object]:
    """Return the arguments of a build of 100 shards that takes some seconds; a net whose bits follow the thread
    count."""
    save_model(tiny_teacher("mobilenetv2_cifar", size=32), tmp_path / "teacher")
    images = tiny_images(n=800, size=32)
    fixed = ["--split", "train", "--n-steps", 4, "--shard-size", 8, "--logits", "--chunk-size", 16]
    return ["maps", "--teacher", f"local-dir:{tmp_path / 'teacher'}", "--dataset", images, *fixed, "--out"]


def test_store_of_a_killed_build_has_the_bytes_of_an_uninterrupted_one(maps_job: list[object], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "timm_igkd", *maps_job]
    begin = time.monotonic()
    run([*command, tmp_path / "whole"])
    print(f"\nuninterrupted build: {time.monotonic() - begin:.1f} s")
    out = tmp_path / "killed"

    def shards() -> int:
        return len(list(out.glob("data/[!.]*.parquet")))

    random, done = np.random.default_rng(0), []
    for _ in range(MAP_KILLS):
        assert kill_in_work([*command, out], shards, random.uniform(0, 0.4))
        assert not (out / "provenance.json").exists()
        done.append(shards())
    print("shards after each kill:", done)
    run([*command, out])
    assert files_of(out) == files_of(tmp_path / "whole")


def test_store_of_a_build_that_filled_the_disk_has_the_bytes_of_an_uninterrupted_one(
    maps_job: list[object], tmp_path: Path, small_disk: Callable[[str, str], Path]
) -> None:
    disk = small_disk("disk", "300k")
    command = [sys.executable, "-m", "timm_igkd", *maps_job[:-1], "--limit", 160, "--out"]
    process = start([*command, disk / "maps"])
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert re.fullmatch("[^\n]*No space left on device[^\n]*", errors.strip().splitlines()[-1])
    finished = list((disk / "maps").glob("data/[!.]*.parquet"))
    assert 0 < len(finished) < 20
    assert not (disk / "maps" / "provenance.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in finished}
    assert os.system(f"mount -o remount,size=10m {disk}") == 0
    run([*command, disk / "maps"])
    assert {path: path.stat().st_mtime_ns for path in finished} == kept
    run([*command, tmp_path / "whole"])
    assert files_of(disk / "maps") == files_of(tmp_path / "whole")


def test_machines_merged_after_kills_have_the_bytes_of_one(maps_job: list[object], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "timm_igkd", *maps_job[:-1], "--limit", 320, "--map-size", 16, "--out"]
    folders = [tmp_path / f"machine{index}" for index in range(3)]
    for index, folder in enumerate(folders):
        argv = [*command, folder, "--shard", f"{index}/3"]
        assert kill_in_work(argv, lambda folder=folder: len(list(folder.glob("data/[!.]*.parquet"))), 0.1)
        run(argv)
        assert not (folder / "provenance.json").exists()
    for folder in folders[1:]:
        shutil.copytree(folder / "data", folders[0] / "data", dirs_exist_ok=True)
    run([*command, folders[0]])
    run([*command, tmp_path / "whole"])
    assert files_of(folders[0]) == files_of(tmp_path / "whole")


def test_two_processes_build_the_store_of_one(maps_job: list[object], tmp_path: Path) -> None:
    run([sys.executable, "-m", "timm_igkd", *maps_job, tmp_path / "one"])
    run([*TORCHRUN, "-m", "timm_igkd", *maps_job, tmp_path / "two"])
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    run([*ACCELERATE, "-m", "timm_igkd", *maps_job, tmp_path / "launched"])
    assert files_of(tmp_path / "launched") == files_of(tmp_path / "one")


def test_number_of_threads_changes_no_byte(maps_job: list[object], tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "timm_igkd", *maps_job[:-1], "--limit", 80, "--out"]
    run([*argv, tmp_path / "one"], threads=1)
    run([*argv, tmp_path / "two"], threads=2)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


# ---- training ----


@pytest.fixture
def training_job(tiny_images: ImageFactory, tmp_path: Path) -> list[object]:
    """Return the flags of a run whose teacher and student train for 14 epochs of about half a second."""
    tiny_images(n=16, size=32, split="test")
    images = tiny_images(n=320, size=32)
    flags = (
        "--protocol demo --compare none --validation-split none --validation-fraction 0.1 --batch-size 16 --n-steps 2 "
        "--teacher-epochs 14 --epochs 14 "
        "--overlay-prob 0.5 --distill-loss-weight 0.5 --hflip 0.5 --model-ema --model-ema-decay 0.9"
    ).split()
    return ["--output-dir", tmp_path, "--dataset", images, *flags, "--name"]


def epochs_of(folder: Path) -> int:
    histories = [folder / f"{stage}_history.csv" for stage in ("teacher", "student")]
    return sum(len(path.read_text().splitlines()) - 1 for path in histories if path.exists())


def weights(run_folder: Path) -> dict[str, bytes]:
    return {name: (run_folder / name / "model.safetensors").read_bytes() for name in ("teacher", "student")}


def losses(run_folder: Path) -> list[list[str]]:
    lines = (run_folder / "student_history.csv").read_text().splitlines()
    return [line.split(",")[:-1] for line in lines]  # the last column is the time


def test_killed_training_ends_with_the_weights_of_an_uninterrupted_one(
    training_job: list[object], tmp_path: Path
) -> None:
    command = [sys.executable, RECIPE, *training_job]
    begin = time.monotonic()
    run([*command, "whole"])
    print(f"\nuninterrupted run: {time.monotonic() - begin:.1f} s")
    folder, random, done = tmp_path / "killed", np.random.default_rng(1), []
    for _ in range(TRAINING_KILLS):
        assert kill_in_work([*command, "killed", "--resume"], lambda: epochs_of(folder), random.uniform(0, 0.8))
        assert not (folder / "metrics.json").exists()
        done.append(epochs_of(folder))
    print("epochs after each kill:", done)
    run([*command, "killed", "--resume"])
    assert weights(folder) == weights(tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole")
    assert set(files_of(folder)) == set(files_of(tmp_path / "whole"))


@pytest.mark.parametrize("batches", ["workers", "device"])
def test_two_processes_train_one_student(batches: str, training_job: list[object], tmp_path: Path) -> None:
    job, short = training_job, ["--teacher-epochs", 1, "--epochs", 2, "--batches", batches]
    watcher = tmp_path / "watch.py"
    watcher.write_text(WATCHER)
    output = run([*TORCHRUN, watcher, *job, "two", *short])
    assert output.count("use the student:") == 1
    digests = [line.split()[1] for line in output.splitlines() if line.startswith("final-weights")]
    assert len(digests) == 4  # teacher and student of two processes
    assert len(set(digests)) == 2
    assert not list((tmp_path / "two").rglob("*.tmp"))
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["n"] == 16

    for name, program in (("launched", [RECIPE]), ("module", ["-m", "timm_igkd", "distill"])):
        assert run([*ACCELERATE, *program, *job, name, *short]).count("use the student:") == 1
    run([sys.executable, RECIPE, *job, "plain", *short])
    assert weights(tmp_path / "launched") == weights(tmp_path / "module") == weights(tmp_path / "plain")


WATCHER = f"""
import hashlib, sys
sys.path.insert(0, {str(RECIPES)!r})
import train_igkd
from timm_igkd.models.loading import weights_hash
from timm_igkd.training.trainer import Trainer

fit = Trainer.fit

def watched(self):
    history = fit(self)
    sys.stdout.write(f"final-weights {{weights_hash(self.final_model())}}\\n")
    sys.stdout.flush()
    return history

Trainer.fit = watched
raise SystemExit(train_igkd.main())
"""
