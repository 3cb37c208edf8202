"""A study that is killed, stopped, shared by processes, or of whose runs one diverges."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from command_lines import RECIPES, two_splits
from study_parts import ARMS
from study_runs import rows_of, study_process, without_time

import study
from studies.config import StudyConfig
from studies.facts import facts
from studies.report import write_report
from studies.results import StudyResults
from studies.rows import StudyRows, key_of
from timm_igkd.errors import InputError
from timm_igkd.training.trainer import Trainer


@pytest.mark.slow
def test_a_run_another_process_has_begun_is_left_to_it(run_study, settings):
    config = StudyConfig(**settings)
    name = f"{config.run_hash(config.cells['KD'])}-0.lock"
    with study.exclusive(Path(settings["work_dir"]) / "runs" / "tiny" / name):
        assert run_study(settings).code == 0
        assert ("KD", "0") not in [(row["cell"], row["seed"]) for row in rows_of(settings)]
    assert run_study(settings).code == 0
    assert len(rows_of(settings)) == 6


@pytest.mark.slow
def test_parallel_processes_give_the_rows_of_one(run_study, settings, tmp_path):
    assert run_study(settings).code == 0
    expected = {key_of(row): row for row in without_time(rows_of(settings))}
    parallel = settings | {"output_dir": str(tmp_path / "parallel")}
    study_process(tmp_path / "parallel.yaml", parallel, "--parallel", "2")
    found = {key_of(row): row for row in without_time(rows_of(parallel))}
    assert found.keys() == expected.keys()
    for key, row in found.items():
        assert row["top1"] == expected[key]["top1"]
    assert (tmp_path / "parallel" / "index.html").exists()


@pytest.mark.slow
def test_killed_study_goes_on_to_the_same_rows(run_study, settings, tmp_path):
    settings = settings | {"seeds": 4}
    killed = settings | {"output_dir": str(tmp_path / "killed"), "work_dir": str(tmp_path / "killed_work")}
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump(killed, sort_keys=False))
    command = [sys.executable, str(RECIPES / "study.py"), "--config", str(path), "--report=false"]
    rows = StudyRows(killed["output_dir"])
    for _ in range(3):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        before = len(rows.read())
        while process.poll() is None and len(rows.read()) < before + 2:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert 2 <= len(rows.read()) < 12
    assert run_study(killed).code == 0
    assert run_study(settings).code == 0
    assert without_time(rows_of(killed)) == without_time(rows_of(settings))


def stop_after(monkeypatch, epochs_done: int) -> None:
    """Let every run end by Ctrl-C once so many epochs are in its checkpoint."""
    save = Trainer.save_checkpoint

    def save_and_stop(self):
        save(self)
        if len(self.history) == epochs_done:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save_checkpoint", save_and_stop)


def test_a_run_that_was_stopped_goes_on_from_its_last_epoch(run_study, settings, tmp_path, monkeypatch):
    cell = ARMS["KD&IG"] | {"protocol": "fast", "epochs": 4, "batch_size": 4, "student_args": {"drop_rate": 0.5}}
    settings |= {"seeds": 1, "cells": {"KD&IG": cell}}
    whole = settings | {"output_dir": str(tmp_path / "whole"), "work_dir": str(tmp_path / "whole_work")}
    assert run_study(whole).code == 0
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert run_study(settings).code == 130
    assert rows_of(settings) == []
    (checkpoint,) = (Path(settings["work_dir"]) / "runs").rglob("*.pt")
    epochs = []
    train = Trainer.train_epoch
    monkeypatch.setattr(
        Trainer, "train_epoch", lambda self, epoch, bar: epochs.append(epoch) or train(self, epoch, bar)
    )
    assert run_study(settings).code == 0
    assert epochs == [2, 3]
    assert without_time(rows_of(settings)) == without_time(rows_of(whole))
    assert not checkpoint.exists()


@pytest.fixture
def stopped(run_study, settings, monkeypatch):
    """Return the settings of a study whose one run, of three epochs, was stopped after the second."""
    settings |= {"seeds": 1, "cells": {"Student": {"epochs": 3}}}
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert run_study(settings).code == 130
    return settings


def test_a_run_goes_on_with_what_it_was_begun_with_alone(run_study, stopped, tiny_images):
    (checkpoint,) = (Path(stopped["work_dir"]) / "runs").rglob("*.pt")
    other = two_splits(tiny_images, seed=5, name="other")
    outcome = run_study(stopped | {"dataset": str(other), "output_dir": f"{stopped['output_dir']}2"})
    assert outcome.code == 2
    assert f"{checkpoint} holds runs with other images" in outcome.error
    assert "give another work_dir, or delete the file to repeat the run from its start" in outcome.error
    begun = checkpoint.with_suffix(".json")
    content = json.loads(begun.read_text())
    changes = {"data_hash": "other images", "teacher_hash": "other teacher", "numerics": "computed alike"}
    for name, told in changes.items():
        begun.write_text(json.dumps(content | {"origin": content["origin"] | {name: "another"}}))
        outcome = run_study(stopped)
        assert outcome.code == 2
        assert told in outcome.error
        assert str(checkpoint) in outcome.error


@pytest.mark.parametrize(
    "damage", [None, "{", "[]", '{"origin": {}}', '{"origin": 1}', "unhashable", "another version", "no session"]
)
def test_a_run_begun_with_what_is_not_known_begins_again(run_study, stopped, damage, monkeypatch):
    (checkpoint,) = (Path(stopped["work_dir"]) / "runs").rglob("*.pt")
    begun = checkpoint.with_suffix(".json")
    content = json.loads(begun.read_text())
    given = {
        "unhashable": json.dumps(content | {"origin": content["origin"] | {"data_hash": ["x"]}}),
        "another version": json.dumps(content | {"more": 1}),
        "no session": json.dumps(content | {"sessions": []}),
    }
    begun.unlink()  # an older version wrote none
    if damage is not None:
        begun.write_text(given.get(damage, damage))
    epochs = []
    train = Trainer.train_epoch
    monkeypatch.setattr(
        Trainer, "train_epoch", lambda self, epoch, bar: epochs.append(epoch) or train(self, epoch, bar)
    )
    outcome = run_study(stopped)
    assert outcome.code == 0
    assert "its run begins again" in outcome.output
    assert epochs == [0, 1, 2]
    assert not list(checkpoint.parent.glob("*[!k]"))  # but for locks


def test_a_run_of_several_sessions_says_when_it_began_of_which_commits_and_how_long_it_took(
    run_study, stopped, monkeypatch
):
    (path,) = (Path(stopped["work_dir"]) / "runs").rglob("*.pt")
    content = torch.load(path, weights_only=True)
    for record in content["history"]:
        record["seconds"] = 1000.0
    torch.save(content, path)
    begun = json.loads(path.with_suffix(".json").read_text())
    monkeypatch.setenv("TIMM_IGKD_COMMIT", "later")
    monkeypatch.setattr(study, "_now", lambda: "2100-01-01T00:00:00+00:00")
    monkeypatch.setattr(study, "describe_hardware", lambda device: "another machine")
    assert run_study(stopped).code == 0
    (row,) = rows_of(stopped)
    assert row["started"] == begun["started"] < "2100"
    assert row["commit"] == f"{begun['sessions'][0]['commit']}; later"
    assert row["hardware"] == f"{begun['sessions'][0]['hardware']}; another machine"
    assert json.loads(row["versions"]) == json.loads(begun["sessions"][0]["versions"])
    told = dict(facts(StudyResults.read(StudyConfig(**stopped))))
    assert told["Commits"].startswith(", ".join(sorted([begun["sessions"][0]["commit"], "later"])))
    assert 2000 < float(row["wall_time_s"]) < 2600


def test_a_study_that_ended_begins_no_run_and_takes_rows(run_study, settings, tmp_path):
    assert run_study(settings | {"seeds": 1, "cells": {"KD": ARMS["KD"]}}).code == 0
    elsewhere = settings | {"output_dir": str(tmp_path / "elsewhere"), "cells": {"Student": {}}, "seeds": 1}
    assert run_study(elsewhere).code == 0
    for flags, there in (([], 1), (["--parallel", "2"], 1), (["--merge", elsewhere["output_dir"]], 2)):
        outcome = run_study(settings | {"ended": "time was over"}, *flags)
        assert outcome.code == 0
        assert "study 'tiny' ended (time was over): no run is begun any more" in outcome.output
        assert "have a row" not in outcome.output
        assert len(rows_of(settings)) == there


def test_a_run_that_diverges_is_a_row_and_stops_nothing(run_study, settings, tmp_path):
    wild = ARMS["KD"] | {"opt": "sgd", "lr": 1e30, "epochs": 3}
    settings |= {"seeds": 2, "cells": {"wild": wild, "KD": ARMS["KD"]}, "contrasts": [["wild", "KD"]]}
    outcome = run_study(settings)
    assert outcome.code == 0
    rows = rows_of(settings)
    assert [row["cell"] for row in rows] == ["wild", "KD"] * 2
    assert all(row["diverged_epoch"] in "012" and row["top1"] == "" for row in rows[::2])
    assert all(row["diverged_epoch"] == "" and row["top1"] for row in rows[1::2])
    assert run_study(settings).code == 0
    assert len(rows_of(settings)) == 4, "not repeated"
    results = StudyResults.read(StudyConfig(**settings))
    assert results.contrasts("top1")[0].comparison.n == 0
    assert dict(facts(results))["Failed"].startswith(
        "2 of the runs, in no mean and no contrast: wild, seed 0 (diverged in "
    )
    assert not results.missing
    merged = StudyRows(tmp_path / "merged")
    assert merged.merge(settings["output_dir"]) == 4


def test_a_run_whose_last_step_spoils_the_student_is_failed(run_study, settings, monkeypatch):
    def spoil(trainer):
        model = final_model(trainer)
        next(iter(model.parameters())).data.fill_(float("nan"))
        return model

    final_model = Trainer.final_model
    monkeypatch.setattr(Trainer, "final_model", spoil)
    settings |= {"cells": {"KD": ARMS["KD"]}, "contrasts": [], "seeds": 1}
    assert run_study(settings).code == 0
    (row,) = rows_of(settings)
    assert (row["diverged_epoch"], row["top1"]) == ("1", "")


def test_page_is_written_with_a_diverged_run(run_study, settings, tmp_path):
    wild = ARMS["KD"] | {"opt": "sgd", "lr": 1e30}
    settings |= {"cells": {"wild": wild, "KD": ARMS["KD"], "Student": {}}}
    settings |= {"contrasts": [["KD", "Student"], ["wild", "KD"]]}
    assert run_study(settings).code == 0
    write_report([StudyConfig(**settings)], tmp_path / "RESULTS.md", tmp_path / "index.html")
    assert "(diverged in epoch " in (tmp_path / "RESULTS.md").read_text()


def test_no_run_is_begun_after_a_studys_last_day(run_study, settings, monkeypatch):
    monkeypatch.setattr(study, "_now", lambda: "2026-12-31T23:59:59+00:00")
    assert run_study(settings | {"seeds": 1, "ends": "2026-12-31"}).code == 0
    monkeypatch.setattr(study, "_now", lambda: "2027-01-01T00:00:00+00:00")
    outcome = run_study(settings | {"ends": "2026-12-31"})
    assert outcome.code == 2
    assert "study 'tiny' ended with 2026-12-31 (it is 2027-01-01, UTC), no run is begun any more" in outcome.error
    assert len(rows_of(settings)) == 3
    assert run_study(settings).code == 0  # without a last day
    assert len(StudyResults.read(StudyConfig(**settings)).rows) == 6
    results = StudyResults.read(StudyConfig(**settings | {"ends": "2026-12-31"}))
    assert {row["seed"] for row in results.rows} == {"0"}, "a run that was begun too late counts"
    assert dict(facts(results))["Rows left out"].startswith("3, of other settings")


@pytest.mark.parametrize("day", ["31.12.2026", "20261231", "2026-12-32", "soon"])
def test_a_last_day_is_a_day(settings, day):
    with pytest.raises(InputError, match=r'ends must be a day in quotes, such as "2026-12-31"'):
        StudyConfig(**settings | {"ends": day})
