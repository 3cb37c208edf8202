"""Hundreds of bad inputs, made by rule from small valid ones: one line, the right exit code, nothing that looks done.

Every option gets numbers and texts that it cannot take, every file that a command reads is damaged in every way, and
its leaves are replaced; the draws have fixed seeds. A command that takes what it should refuse fails its test as well.
"""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import run_in_process, subprocess_environment
from fuzz_cases import CASES, COMMON, NAMED, PICTURES, Case, write_split
from PIL import ImageOps
from tiny_parts import tiny_teacher

import study
from timm_igkd.cli import main as cli
from timm_igkd.errors import RunError
from timm_igkd.models.loading import save_model

pytestmark = pytest.mark.slow
ACCEPTED = "nothing is wrong with this input"  # said, with code 1, where a command's work would begin
LOOKS_DONE = set("provenance.json export.json s.json m.json metrics.json p.png index.html model.safetensors".split())


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with everything that the commands of COMMON need."""
    folder = tmp_path_factory.mktemp("valid")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        quick(patch)
        Path("images").mkdir()
        for split, pictures in (("train", PICTURES), ("test", [ImageOps.mirror(picture) for picture in PICTURES])):
            Path(f"images/{split}-00000-of-00001.parquet").touch()
            write_split(split, {"image": pictures, "label": [0, 1] * 4}, NAMED)
        for index, picture in enumerate(PICTURES):
            path = Path(f"classes/train/class_{index % 2}/{index:04d}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        teacher = tiny_teacher(classes=2, size=16)
        save_model(teacher, "teacher", label_names=["class_0", "class_1"])
        shutil.copy("teacher/model.safetensors", "teacher.safetensors")
        torch.save({"state_dict": teacher.state_dict()}, "teacher.pth.tar")
        Path("script.py").write_text("from timm.data import create_dataset\ncreate_dataset('', 'images', 'train')\n")
        settings = "name: run\ndataset: images\nteacher: local-dir:teacher\nteacher_epochs: 0\nvalidation_split: none\n"
        settings += "validation_fraction: 0.25\nepochs: 1\nbatch_size: 2\nn_steps: 1\nstudent_drop: 1\n"
        settings += "overlay_prob: 0.5\n"
        Path("config.yaml").write_text(settings)
        cell = "{student: test_resnet, epochs: 1, batch_size: 2, protocol: light, distill_loss_weight: 0.1}"
        Path("study.yaml").write_text(
            "name: tiny\ndataset: images\nteacher: local-dir:teacher\nn_steps: 1\nseeds: 1\nreport: false\n"
            f"output_dir: rows\nwork_dir: work\nlatency: false\ncells:\n  KD: {cell}\n"
        )
        assert cli.main(COMMON["maps again"].split()) == 0
        for seed, name in enumerate(("run", "other")):
            assert cli.main([*COMMON["distill again"].split(), "--name", name, "--seed", str(seed)]) == 0
    return folder


def quick(patch: pytest.MonkeyPatch) -> None:
    """Leave out what takes seconds and reads nothing of the user's."""
    patch.setattr("timm_igkd.evaluation.metrics.time_models", lambda models, *args: [{} for _ in models])
    patch.setattr("timm_igkd.runs.students.onnx_metrics", lambda model: {})


def accept(*args: Any, **options: Any) -> None:
    raise RunError(ACCEPTED)


@pytest.fixture
def here(valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Go into a copy of `valid`, where nothing is published, exported or measured, and no study trains."""
    shutil.copytree(valid, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "TokenOfNobody0" * 2)
    quick(monkeypatch)
    published = ("maps.push.publish", "report.push.publish")
    for name in (*published, "export.student.write_onnx", "export.students._Bench"):
        monkeypatch.setattr(f"timm_igkd.{name}", accept)
    monkeypatch.setattr(study.Study, "_run", accept)
    yield tmp_path / "here"
    shutil.rmtree(tmp_path, ignore_errors=True)  # thousands of copies would fill a disk


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """Fail a command that waits for ever, on a pipe for example."""

    def fail(*_: object) -> None:
        raise AssertionError("the command still runs after ten minutes")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, int]:
    """Return a checksum of every regular file."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in paths}


def check_nothing_looks_done(before: dict[str, int], after: dict[str, int], said: str) -> None:
    changed = {name for name, content in after.items() if before.get(name) != content}
    assert not {name for name in changed if Path(name).name in LOOKS_DONE or name.endswith(".tmp")}, said


@pytest.mark.parametrize("bad", CASES, ids=[ascii(bad.name) for bad in CASES])
def test_bad_input_is_one_line_and_the_right_code(bad: Case, here: Path, capsys, monkeypatch):
    if bad.argv[0] == "distill" and bad.prepare is Case.prepare:
        monkeypatch.setattr("timm_igkd.runs.job.Stages.run", accept)  # settings are refused before the first stage
    bad.prepare(random.Random(bad.name))
    before = contents(here)
    main, argv = (study.main, bad.argv[1:]) if bad.argv[0] == "study" else (cli.main, bad.argv)
    outcome = run_in_process(main, argv, capsys)
    code = 0 if ACCEPTED in outcome.error else outcome.code
    assert code in bad.codes, outcome
    if code:
        assert len(outcome.error) > len("timm-igkd: error: ")
        check_nothing_looks_done(before, contents(here), outcome.error)


@pytest.mark.parametrize("command", ["maps", "preview", "evaluate", "distill"])
def test_full_disk_is_one_line_and_code_1(command: str, here: Path, capsys, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = contents(here)
    outcome = run_in_process(cli.main, COMMON[command].split(), capsys)
    assert outcome.code == 1
    check_nothing_looks_done(before, contents(here), outcome.error)


POSSIBLE = [bad for bad in CASES if not any("\0" in word for word in bad.argv)]  # no process can be given a NUL
OWN_PROCESS = random.Random(12).sample([bad for bad in POSSIBLE if bad.codes == (2,) and bad.argv[0] != "study"], 20)


@pytest.mark.parametrize("bad", OWN_PROCESS, ids=[ascii(bad.name) for bad in OWN_PROCESS])
def test_bad_input_of_a_process_is_one_line_and_2(bad: Case, here: Path):
    bad.prepare(random.Random(bad.name))
    before = contents(here)
    command = [sys.executable, "-m", "timm_igkd", *bad.argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=subprocess_environment(here.parent))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    check_nothing_looks_done(before, contents(here), done.stderr)
