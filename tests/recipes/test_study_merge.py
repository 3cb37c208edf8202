"""Rows that are there: skipped, repeated where lost, merged once, refused where computed otherwise."""

import csv
import json
from pathlib import Path

import pytest
from command_lines import two_splits
from study_parts import ARMS
from study_runs import rows_of, without_time

from studies import data
from studies.rows import StudyRows, key_of
from timm_igkd import MapStore
from timm_igkd.errors import InputError


@pytest.mark.slow
def test_predictions_beside_the_rows_give_their_accuracy(run_study, settings):
    assert run_study(settings).code == 0
    rows = StudyRows(settings["output_dir"])
    labels = rows.labels()
    assert labels.tolist() == [0, 1] * 4
    for row in rows.read():
        hits = rows.predictions(key_of(row)) == labels
        assert 100 * hits.mean() == pytest.approx(float(row["top1"]))


def test_rows_that_are_there_are_skipped_and_lost_ones_repeated(run_study, settings):
    assert run_study(settings).code == 0
    path = Path(settings["output_dir"]) / "results.csv"
    lines, before = path.read_text().splitlines(keepends=True), rows_of(settings)
    path.write_text("".join(lines[:3] + lines[4:]))
    assert run_study(settings).code == 0
    after = rows_of(settings)
    assert after[:2] + after[2:5] == before[:2] + before[3:]
    assert without_time(after[5:]) == without_time(before[2:3])


def test_a_study_with_all_its_rows_says_that_nothing_is_trained(run_study, settings):
    one = settings | {"cells": {"KD": ARMS["KD"]}}
    assert "nothing to train" not in run_study(one).output
    for flags in ([], ["--parallel", "2"]):
        outcome = run_study(one, *flags)
        assert outcome.code == 0
        assert "all 2 runs of study 'tiny' have a row; nothing to train" in outcome.output


def test_of_another_study_the_planned_runs_alone_are_taken_over(run_study, settings, tmp_path):
    one = settings | {"cells": {"KD": ARMS["KD"]}}
    assert run_study(one).code == 0
    other = one | {"output_dir": str(tmp_path / "other"), "first_seed": 1, "seeds": 1, "rows_of": [one["output_dir"]]}
    outcome = run_study(other)
    assert outcome.code == 0, outcome.error
    assert "taken over 1 runs of" in outcome.output
    assert "all 1 runs of study 'tiny' have a row; nothing to train" in outcome.output
    assert rows_of(other) == rows_of(one)[1:]


@pytest.mark.slow
def test_rows_of_another_machine_are_merged_once(run_study, settings, tmp_path):
    assert run_study(settings | {"seeds": 1}).code == 0
    elsewhere = settings | {"output_dir": str(tmp_path / "elsewhere"), "first_seed": 1, "seeds": 1}
    assert run_study(elsewhere).code == 0
    outcome = run_study(settings, "--merge", elsewhere["output_dir"])
    assert outcome.code == 0
    assert "merged 3 runs" in outcome.output
    assert len(rows_of(settings)) == 6
    assert "merged 0 runs" in run_study(settings, "--merge", elsewhere["output_dir"]).output


def test_rows_of_other_images_are_refused(run_study, settings, tiny_images, tmp_path):
    assert run_study(settings | {"seeds": 1}).code == 0
    other = two_splits(tiny_images, seed=5, name="other")
    given = settings | {"dataset": str(other), "work_dir": str(tmp_path / "work2")}
    outcome = run_study(given)
    assert outcome.code == 2
    assert "holds runs with other images" in outcome.error
    assert not list((tmp_path / "work2" / "runs").rglob("*.pt")), "a run was trained before it was refused"


def test_a_study_goes_on_with_maps_that_another_processor_rounded_and_not_with_others(
    run_study, settings, monkeypatch, tmp_path
):
    assert run_study(settings | {"seeds": 1}).code == 0
    elsewhere = settings | {"work_dir": str(tmp_path / "work2"), "seeds": 2}
    monkeypatch.setattr(data, "hash_files", lambda paths: "f" * 64)
    with monkeypatch.context() as other:
        levels = MapStore.levels
        other.setattr(MapStore, "levels", lambda store, row: levels(store, row) // 2)
        outcome = run_study(elsewhere)
        assert outcome.code == 2
        assert "holds runs with other maps" in outcome.error
        assert not list((tmp_path / "work2" / "runs").rglob("*.pt")), "a run was trained before it was refused"
    assert run_study(elsewhere).code == 0
    assert len({row["maps_hash"] for row in rows_of(settings)} - {""}) == 2


@pytest.mark.slow
def test_rows_that_were_computed_otherwise_are_refused(run_study, settings):
    """bfloat16 or compiled runs are not paired with others: a study finished by another command would mix them."""
    assert run_study(settings).code == 0
    rows = StudyRows(settings["output_dir"])
    row = dict(rows.read()[0])
    versions = json.loads(row["versions"])
    assert (versions["precision"], versions["compile"]) == ("no", "none")
    for change in (
        {"device": "cuda"},
        *({"versions": json.dumps(versions | {key: "x"})} for key in ("precision", "compile")),
    ):
        with pytest.raises(InputError, match="must be computed alike"):
            rows.check(row | {"seed": "99"} | change)
        with pytest.raises(InputError, match="must be computed alike"):
            rows.add(row | {"seed": "99"} | change, rows.predictions(key_of(row)), rows.labels())
    old = {key: value for key, value in versions.items() if key != "compile"}  # rows from before it was written
    assert rows.add(row | {"seed": "99", "versions": json.dumps(old)}, rows.predictions(key_of(row)), rows.labels())


def test_a_run_that_is_there_twice_is_refused(run_study, settings):
    assert run_study(settings | {"seeds": 1}).code == 0
    path = Path(settings["output_dir"]) / "results.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[-1]]))
    with pytest.raises(InputError, match="2 times; remove the others"):
        rows_of(settings)


def test_rows_are_plain_csv(run_study, settings):
    assert run_study(settings | {"seeds": 1}).code == 0
    with open(Path(settings["output_dir"]) / "results.csv", newline="") as file:
        assert [row["cell"] for row in csv.DictReader(file)] == list(ARMS)
