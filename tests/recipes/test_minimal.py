"""recipes/minimal.py: the method in one screen."""

import shlex
import subprocess
import sys

import pytest
import timm
from command_lines import RECIPES, subprocess_environment

import minimal
from timm_igkd import MapStore, evaluate, load_labeled_images

SOURCE = (RECIPES / "minimal.py").read_text(encoding="utf-8")
TRIED = "--teacher-epochs 1 --epochs 1 --n-steps 2 --limit 128 --out runs/try"


def test_it_is_one_screen_and_opens_with_its_command():
    assert len(SOURCE.splitlines()) <= 120
    first, second = (line.split("#")[0].split() for line in SOURCE.splitlines()[2:4])
    assert first == ["accelerate", "launch", "recipes/minimal.py"]
    assert second == [*first, *shlex.split(TRIED)]


def test_tiny_run_leaves_maps_and_a_student_that_timm_loads(tmp_path, capsys):
    metrics = minimal.main([*TRIED.split(), "--out", str(tmp_path)])
    assert metrics["n"] == 360
    assert f"student {metrics['top1']:.1f} % of 360 images" in capsys.readouterr().out
    MapStore(tmp_path / "maps").verify(load_labeled_images("digits", "train").subset(range(128)))
    student = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    again = evaluate(student, load_labeled_images("digits", "test"), measure_latency=False).metrics
    assert {name: again[name] for name in ("top1", "loss", "ece")}.items() <= metrics.items()


def test_fewer_images_than_a_batch_are_one(tmp_path, capsys):
    minimal.main([*TRIED.replace("128", "20").split(), "--out", str(tmp_path)])
    assert "epoch 1 of 1: loss" in capsys.readouterr().out
    assert len(MapStore(tmp_path / "maps")) == 20


@pytest.mark.slow
def test_whole_run_makes_a_student_that_reads_digits(tmp_path):
    metrics = minimal.main(["--out", str(tmp_path)])
    assert metrics["teacher"]["top1"] > 95
    assert metrics["top1"] > 95
    assert metrics["compression"] > 4


def test_other_settings_than_those_of_the_maps_that_are_there_are_one_line(tmp_path):
    command = [sys.executable, str(RECIPES / "minimal.py"), *TRIED.split(), "--out", str(tmp_path)]
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "mine.txt").write_text("not a store")
    done = subprocess.run(command, capture_output=True, text=True, env=subprocess_environment(tmp_path / "hf"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("minimal: ")
    assert "Traceback" not in done.stderr
