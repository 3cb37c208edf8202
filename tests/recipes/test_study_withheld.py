"""Runs of a primary study that nobody may see yet are not seen, through another study either."""

import html
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_lines import RECIPES
from study_parts import ALIGNED, PRIMARY_CELLS, add_rows, edit_rows, helpful_study, primary_study, report

from studies import withheld
from studies.config import StudyConfig, load_study
from studies.data import StudyData
from studies.glance import glance
from studies.results import StudyResults
from studies.tables import signed
from studies.withheld import refuse_shared_runs, refuse_withheld_rows, withhold_shared_runs
from timm_igkd.errors import InputError

SAME = SimpleNamespace(data_hash="d1", teacher_hash="t1")  # of the rows that add_rows writes
REAL = RECIPES / "configs" / "study_real.yaml"


@pytest.fixture
def real(tmp_path, monkeypatch):
    """Return `real(*flags)`: the published primary study with rows of one seed, as the checkout's."""

    load = load_study

    def real(*flags: str) -> StudyConfig:
        folder = tmp_path / "recipes" / "results" / "study_real"
        given = load(REAL, f"--output_dir={folder}", "--seeds=1", "--first_seed=6")
        add_rows(given)
        monkeypatch.setattr(
            withheld,
            "load_study",
            lambda path, *more: load(path, *more, *flags) if path.name == REAL.name else load(path, *more),
        )
        monkeypatch.setattr(withheld, "ROOT", tmp_path)
        return load(REAL, f"--output_dir={folder}", *flags)

    return real


def test_rows_of_a_withheld_study_are_merged_into_its_own_alone(real):
    folder = real().output_dir
    with pytest.raises(InputError, match="holds runs of the primary study 'real', which nobody looks at"):
        refuse_withheld_rows(folder, "real_arms")
    refuse_withheld_rows(folder, "real")


def test_rows_of_a_study_that_ended_with_too_few_seeds_are_merged(real):
    config = real("--ended=time was over")
    refuse_withheld_rows(config.output_dir, "real_arms")
    refuse_shared_runs(load_study(RECIPES / "configs" / "study_real_arms.yaml"), SAME)


@pytest.mark.parametrize("name", ["arms", "cost", "often", "explanation"])
def test_a_study_that_would_train_runs_of_a_withheld_one_is_refused(real, name):
    config = load_study(RECIPES / "configs" / f"study_real_{name}.yaml")
    real()
    with pytest.raises(InputError, match=rf"runs of 'real_{name}' are also those of the primary study 'real'"):
        refuse_shared_runs(config, SAME)
    elsewhere = load_study(RECIPES / "configs" / f"study_real_{name}.yaml", "--dataset=/other", "--teacher=local-dir:x")
    with pytest.raises(InputError, match="run it then"):
        refuse_shared_runs(elsewhere, SAME)
    real("--seeds=1", "--first_seed=6", "--report=true")  # complete, and to be looked at
    refuse_shared_runs(config, SAME)


def test_a_study_of_other_seeds_teacher_or_images_is_not_refused(real):
    real()
    arms = RECIPES / "configs" / "study_real_arms.yaml"
    refuse_shared_runs(load_study(arms, "--first_seed=50"), SAME)
    for other in ({"data_hash": "d2"}, {"teacher_hash": "t2"}, {"teacher_hash": None}):
        refuse_shared_runs(load_study(arms), SimpleNamespace(**vars(SAME) | other))
    refuse_shared_runs(load_study(REAL), SAME)


def test_packages_that_are_needed_to_know_are_named(real, monkeypatch):
    real()
    monkeypatch.setattr("studies.find_spec", lambda name: None if name == "scipy" else object())
    refuse_shared_runs(load_study(RECIPES / "configs" / "study_real_labels.yaml"), SAME)  # shares nothing
    with pytest.raises(InputError, match="needs scipy; install it"):
        refuse_shared_runs(load_study(RECIPES / "configs" / "study_real_arms.yaml"), SAME)


def test_a_broken_study_that_is_no_primary_one_hinders_no_other(real, tmp_path, monkeypatch):
    real()
    monkeypatch.setattr(withheld, "CONFIGS", tmp_path)
    (tmp_path / "study_draft.yaml").write_text("name: draft\ncells: {}\n")
    refuse_shared_runs(load_study(RECIPES / "configs" / "study_check.yaml"), SAME)


def test_a_report_shows_no_run_of_a_withheld_study(tmp_path):
    closed = primary_study(tmp_path / "rows", report=False)
    add_rows(closed, {ALIGNED: 1.0})
    shared = primary_study(tmp_path / "rows", name="shared", purpose="exploratory", seeds=3)
    other = primary_study(tmp_path / "other", name="other", purpose="exploratory", seeds=3, first_seed=50)
    add_rows(other)
    studies = withhold_shared_runs([StudyResults.read(config) for config in (closed, shared, other)])
    assert [results.is_withheld for results in studies] == [True, True, False]
    assert [name for name, _ in glance(studies).rows] == ["Primary", *(f"{a} − {b}" for a, b in other.contrasts)]
    for text in report(tmp_path, closed, shared):
        assert "It has runs of the primary study primary, of which nothing is shown yet." in text
        assert "Holm" not in text
    opened = primary_study(tmp_path / "rows")
    assert not any(results.is_withheld for results in withhold_shared_runs([StudyResults.read(opened)] * 2))


def test_the_command_refuses_before_anything_is_trained(real, run_study, settings, tmp_path):
    config = real()
    arms = load_study(RECIPES / "configs" / "study_real_arms.yaml")
    shared = {"train_split": arms.train_split, "n_steps": "auto", "corruption_images": 1000, "ig_images": 64}
    cells = {"KD": {"distill_loss_weight": 0.9, "temperature": 4, "overlay_prob": 0.0}}
    given = settings | shared | {"base": arms.base, "cells": cells, "first_seed": 6, "seeds": 1}
    data = StudyData(StudyConfig(**given), torch.device("cpu"))
    of_tiny = {"data_hash": data.data_hash, "teacher_hash": data.teacher_hash}
    edit_rows(Path(config.output_dir), lambda row: row.update(of_tiny))
    outcome = run_study(given)
    assert outcome.code == 2
    assert "1 runs of 'tiny' are also those of the primary study 'real'" in outcome.error
    assert not (tmp_path / "out" / "results.csv").exists()
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("ended", ["", "the time was over"])
def test_primary_study_shows_no_number_before_it_is_complete(tmp_path, ended):
    skip = [(name, seed) for name in PRIMARY_CELLS for seed in range(5, 12)] if ended else [("KD&IG blank", 11)]
    waiting = helpful_study(tmp_path / "primary", skip=skip, ended=ended)
    found = waiting.contrasts("top1")[0].comparison
    for text in report(tmp_path, waiting.config):
        why = "Ended with fewer than 6 seeds of every cell" if ended else "Interim: 59 of 60 runs are done. No result"
        assert why in text
        assert signed(found.difference) not in html.unescape(text)
    assert not list(tmp_path.glob("figures/*"))


def test_changes_of_rows_that_nobody_may_see_are_not_printed_by_git():
    attributes = RECIPES.parent / ".gitattributes"
    if not attributes.exists():
        pytest.skip("not a checkout: no .gitattributes")
    primaries = [
        study for study in map(load_study, (RECIPES / "configs").glob("study_*.yaml")) if study.purpose == "primary"
    ]
    for study in primaries:
        line = f"{study.output_dir}/results.csv -diff"
        assert (line in attributes.read_text().splitlines()) != study.report
