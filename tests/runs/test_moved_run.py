"""The config.yaml of a run that lies elsewhere than it says, and --resume without anything to resume."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from command_lines import Outcome, Runner, run_in_process, tiny_run, two_splits

from timm_igkd.cli.distill_command import distill_command
from timm_igkd.runs.parsing import save_config
from timm_igkd.runs.settings import RunConfig
from timm_igkd.training.trainer import Trainer


@pytest.fixture
def distil(capsys, monkeypatch) -> Runner:
    """Return `distil(*flags)`, whose output is the folder that would be worked on."""
    monkeypatch.setattr("timm_igkd.runs.job.distill", lambda config: print(config.run_dir))
    return lambda *flags: run_in_process(distill_command, flags, capsys)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """Return the folder of a run that was begun in tmp_path / here, as its settings have it: runs/run."""
    folder = tmp_path / "here" / "runs" / "run"
    (folder / ".stages").mkdir(parents=True)
    save_config(RunConfig(name="run"), folder / "config.yaml")
    monkeypatch.chdir(tmp_path / "here")
    return folder


def refusal(outcome: Outcome, run: Path) -> str:
    """Return the flags that the error offers to go on with."""
    assert outcome.code == 2
    assert f"is of the run in {str(run)!r}, but its settings name 'runs/run'" in outcome.error
    found = re.search(r"to go on with that run add (.*), to repeat it from the start another --name$", outcome.error)
    assert found is not None
    return found[1]


def place(outcome: Outcome) -> Path:
    assert outcome.code == 0, outcome.error
    return Path(outcome.output.strip()).resolve()


def test_a_run_where_its_settings_say_is_gone_on_with(distil, run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "settings.yaml").symlink_to(run / "config.yaml")
    for file in (
        "runs/run/config.yaml",
        run / "config.yaml",
        tmp_path / "link/config.yaml",
        tmp_path / "settings.yaml",
    ):
        assert place(distil("--config", file)) == run
        assert place(distil(f"--config={file}", "--resume", "--workers", 1)) == run


def test_a_run_from_another_directory_is_not_trained_anew(distil, run, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    flags = refusal(distil("--config", run / "config.yaml"), run)
    assert flags == f"--output-dir {run.parent}"
    assert refusal(distil("--resume", "--config=../here/runs/run/config.yaml", "--compare"), run) == flags
    assert refusal(distil("--teacher-args", "name=x", "--config", run / "config.yaml"), run) == flags
    assert place(distil("--config", run / "config.yaml", *shlex.split(flags))) == run


@pytest.mark.parametrize("name", ["run", "a b"])
def test_a_moved_run_is_not_trained_anew(name, distil, run, tmp_path):
    moved = tmp_path / "old runs" / name
    moved.parent.mkdir()
    shutil.move(run, moved)
    flags = refusal(distil("--config", moved / "config.yaml"), moved)
    assert shlex.split(flags) == ["--output-dir", str(moved.parent), *(["--name", name] if name != "run" else [])]
    assert place(distil("--config", moved / "config.yaml", *shlex.split(flags))) == moved


def test_a_copy_is_not_taken_for_the_run_that_it_was_made_of(distil, run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    file = tmp_path / "copy" / "config.yaml"
    assert refusal(distil("--config", file), tmp_path / "copy") == f"--output-dir {tmp_path} --name copy"
    assert place(distil("--config", file, "--output-dir", "runs")) == run


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--name", "again"], "runs/again"),
        (["--name=again", "--output-dir=others"], "others/again"),
        (["--output-dir", "others"], "others/run"),
        (["--output_dir=runs"], "runs/run"),
    ],
)
def test_a_run_is_repeated_where_the_command_says(flags, expected, distil, run, tmp_path):
    shutil.move(run, tmp_path / "moved")
    assert place(distil("--config", tmp_path / "moved" / "config.yaml", *flags)) == tmp_path / "here" / expected


def test_settings_that_are_no_runs_are_for_any_folder(distil, run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    for file in (tmp_path / "config.yaml", tmp_path / "other" / "mine.yaml"):
        shutil.copy(run / "config.yaml", file)
        assert place(distil("--config", file)) == run


def test_a_moved_run_goes_on_and_resume_of_nothing_is_told(recipe: Runner, tiny_images, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda self: self.history_path.write_text("epoch\n"))
    monkeypatch.setattr("timm_igkd.runs.job.write_report", lambda *args, **kwargs: None)
    begun = recipe(*tiny_run(two_splits(tiny_images), "--overlay-prob", 0, "--resume"))
    assert begun.code == 0, begun.error
    nothing = "has begun, so there is nothing to go on from"
    assert f"resume: no stage of {tmp_path / 'runs' / 'run'} {nothing}\n" in begun.output
    shutil.move(tmp_path / "runs" / "run", tmp_path / "elsewhere" / "moved")
    options = ["--config", tmp_path / "elsewhere" / "moved" / "config.yaml", "--name", "moved"]
    outcome = recipe(*options, "--output-dir", tmp_path / "elsewhere", "--resume")
    assert outcome.code == 0, outcome.error
    assert all(f"{stage}: complete, skipped" in outcome.output for stage in ("teacher", "student", "evaluate"))
    assert nothing not in outcome.output


@pytest.mark.parametrize("flags", [["--name", "again"], []])
@pytest.mark.parametrize(("processes", "precision"), [(4, "bf16"), (1, "no"), (1, "bf16")])
def test_a_repetition_by_another_launch_is_told(processes, precision, flags, distil, run, monkeypatch):
    """The run's own stages look after one that goes on."""
    launch = {"num_processes": processes, "mixed_precision": precision}
    (run / "environment.json").write_text(json.dumps(launch))
    outcome = distil("--config", run / "config.yaml", *flags)
    assert outcome.code == 0
    differs = (processes, precision) != (1, "no")
    told = f"for these: accelerate launch --num_processes {processes} --mixed_precision {precision} …"
    assert (told in outcome.output) is (differs and bool(flags))
    assert ("num_processes = 4, now it is 1: its settings are" in outcome.output) is (processes == 4 and bool(flags))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    assert "launched with" not in distil("--config", run / "config.yaml", *flags).output
    (run / "environment.json").write_text("{")
    assert distil("--config", run / "config.yaml", *flags).code == 0
