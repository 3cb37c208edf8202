"""`timm-igkd run` in front of training scripts: they learn what they would, or what the library learns."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_lines import subprocess_environment
from run_command_parts import MODEL, TRAIN, WARNINGS, run_alone, summary, train
from timm.data import auto_augment

from timm_igkd.overlay import timm_ops

pytestmark = WARNINGS


def test_probability_0_trains_as_the_script_alone(command, folder, maps, tmp_path):
    alone = train(command, folder, tmp_path / "alone")
    assert train(command, folder, tmp_path / "zero", run=("--maps", maps, "--overlay-prob", 0)) == alone
    assert train(command, folder, tmp_path / "half", run=("--maps", maps, "--overlay-prob", 0.5)) != alone


FIVE_LINES = {  # inserted before the line that begins with the key
    "parser = argparse": "from timm_igkd import *\n",
    "    dataset_eval = ": "    dataset_train = IGOverlayDataset(dataset_train, MapStore({maps!r}), {overlay})\n",
    "    if args.distributed:\n        task.": "{task}",
}


def with_added_lines(path: Path, maps: Path, overlay: str = "IGOverlay(0.5)", task: str = "") -> int:
    """Write train.py with a plugin's lines added; return how many were added."""
    original = TRAIN.read_text()
    source = original
    for place, lines in FIVE_LINES.items():
        assert source.count(place) == 1
        source = source.replace(place, lines.format(maps=str(maps), overlay=overlay, task=task) + place)
    path.write_text(source)
    return len(source.splitlines()) - len(original.splitlines())


def test_run_learns_what_the_library_learns(command, folder, maps, tmp_path):
    with_added_lines(tmp_path / "library.py", maps)
    options = ["--aa", "rand-m9-inc1", "--reprob", "0.3", "--mixup", "0.2"]
    run_alone([tmp_path / "library.py", folder, *MODEL, "--epochs", 2, "--output", tmp_path / "library", *options])
    found = train(command, folder, tmp_path / "run", *options, run=("--maps", maps, "--overlay-prob", 0.5))
    assert found == summary(tmp_path / "library")


@pytest.mark.parametrize("view", ["same", "clean"])
def test_five_lines_make_a_timm_script_distil(folder, maps, teacher_folder, tmp_path, view):
    task = (
        f'    teacher = load_model("local-dir:{teacher_folder}")\n'
        f"    task = IGDistillationTask(model, teacher, teacher_view={view!r}, view_layout='flat')\n"
        "    assert not any(parameter.requires_grad for parameter in teacher.parameters())\n"
    )
    added = with_added_lines(tmp_path / "five.py", maps, f"IGOverlay(), teacher_view={view!r}", task)
    assert added == 5
    run_alone([tmp_path / "five.py", folder, *MODEL, "--output", tmp_path / "out", "--workers", 1])
    assert np.isfinite(float(summary(tmp_path / "out")[0]["train_loss"]))


@pytest.mark.parametrize(
    "options",
    [
        ["--workers", "2", "--mixup", "0.2", "--cutmix", "1.0", "--reprob", "0.5"],
        ["--no-prefetcher", "--mixup", "0.2", "--aa", "augmix-m5-w4-d2"],
        ["--aa", "rand-m9-tigkd", "--workers", "1"],
        ["--aug-splits", "2", "--aa", "rand-m9-inc1"],
    ],
    ids=["workers and mixup", "no prefetcher", "tigkd", "splits"],
)
def test_run_takes_timms_options(command, folder, maps, tmp_path, options):
    if "--aug-splits" in options:  # the splits' targets are repeated by timm's collate
        options = [*options, "--smoothing", "0"]
    assert np.isfinite(
        float(train(command, folder, tmp_path / "out", *options, run=("--maps", maps))[-1]["train_loss"])
    )


def test_augmentation_splits_overlay_by_the_option_and_warn_that_the_name_does_nothing(command, folder, maps, tmp_path):
    """The splits are augmented after one crop of one image, where it is too late for an overlay of its own."""
    options = ["--aug-splits", "2", "--smoothing", "0", "--aa", "rand-m9-n8-p1-tigkd"]
    found = []
    for probability, name in enumerate(("none", "all")):
        timm_ops._warn_once.cache_clear()
        run = ("--maps", maps, "--overlay-prob", probability)
        with pytest.warns(UserWarning, match="IGOverlay changes nothing outside"):
            found.append(train(command, folder, tmp_path / name, *options, run=run))
    assert found[0] != found[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_magnitude_10_posterizes_to_black_instead_of_failing(command, folder, maps, tmp_path, workers):
    options = ["--aa", "rand-m10-n8-p1-inc1", "--workers", workers]
    assert train(command, folder, tmp_path / "out", *options, run=("--maps", maps))
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is auto_augment.posterize


def test_timms_own_distillation_runs(command, folder, maps, teacher_folder, tmp_path):
    options = ["--kd-model-name", f"local-dir:{teacher_folder}", "--kd-loss-weight", "0.5"]
    rows = train(command, folder, tmp_path / "out", *options, run=("--maps", maps, "--overlay-prob", 1))
    assert np.isfinite(float(rows[-1]["train_loss"]))


def test_script_as_a_module(command, folder, maps, tmp_path, monkeypatch):
    (tmp_path / "a_module.py").write_text(
        "import sys\nfrom timm.data import create_dataset\n"
        "if __name__ == '__main__':\n    create_dataset('', root=sys.argv[1], split='train', is_training=True)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert command("run", "--maps", maps, "--", "-m", "a_module", folder).code == 0


@pytest.mark.slow
def test_torchrun_trains_in_two_processes(folder, maps, tmp_path):
    executable = Path(sys.executable).with_name("timm-igkd")
    command = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc_per_node", "2", str(executable)]
    script = ["--", str(TRAIN), str(folder), *MODEL, "--workers", "1", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "run", "--maps", str(maps), "--overlay-prob", "0.5", *script],
        capture_output=True,
        text=True,
        timeout=300,
        env=subprocess_environment(tmp_path / "home"),
    )
    assert done.returncode == 0, done.stderr
    assert len(summary(tmp_path / "out")) == 1
