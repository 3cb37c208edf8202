"""Runs that differ in their seed alone: their mean and spread on the card; others are refused."""

import json

import numpy as np
import pytest
import yaml
from hub_parts import make_run, plain_student
from scipy import stats

from timm_igkd.errors import InputError
from timm_igkd.report.card import model_card
from timm_igkd.report.run_facts import read_run, seed_summary


def test_runs_of_other_seeds_give_mean_spread_and_interval(plugin_run, tmp_path):
    others = [make_run(tmp_path / f"seed{s}", plain_student(), seed=s, top1=80.0 + s) for s in (1, 2)]
    card = model_card(plain_student(), "user/x", read_run(plugin_run, others))
    assert "Over 3 runs" in card
    assert "81.00 % ± 1.00" in card
    assert "78.52 to 83.48 %" in card
    assert seed_summary([80.0, 81.0, 82.0])["interval"][0] == pytest.approx(81 - 4.303 / np.sqrt(3), abs=1e-3)


def test_runs_that_all_end_alike_have_no_interval(plugin_run, tmp_path):
    top1 = read_run(plugin_run).metrics.top1
    others = [make_run(tmp_path / f"seed{s}", plain_student(), seed=s, top1=top1) for s in (1, 2)]
    card = model_card(plain_student(), "user/x", read_run(plugin_run, others))
    assert "Over 3 runs" in card
    assert "(standard deviation, n = 3). The weights here" in " ".join(card.split())


@pytest.mark.parametrize("n", [*range(2, 42), 60, 100, 199, 200])
def test_interval_of_a_mean_is_scipys_whatever_the_number_of_runs(n):
    top1 = np.random.default_rng(n).normal(80, 1.6, n)
    found = seed_summary(top1.tolist())
    expected = stats.t.interval(0.95, n - 1, loc=top1.mean(), scale=stats.sem(top1))
    assert found["interval"] == pytest.approx(expected, rel=1e-10)


def test_run_that_differs_in_more_than_its_seed_is_refused(plugin_run, tmp_path):
    other = make_run(tmp_path / "other", plain_student(), seed=1)
    config = yaml.safe_load((other / "config.yaml").read_text()) | {"temperature": 4.0}
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="temperature differs"):
        read_run(plugin_run, [other])


@pytest.mark.parametrize(
    ("stage", "part", "name"),
    [
        ("teacher", "inputs", "class names"),
        ("student", "inputs", "training images"),
        ("student", "inputs", "unlabelled images"),
        ("student", "inputs", "student's files"),
        ("student", "launch", "num_processes"),
        ("evaluate", "inputs", "test images"),
    ],
)
def test_run_that_read_other_things_or_was_launched_otherwise_is_refused(stage, part, name, tmp_path):
    first = make_run(tmp_path / "first", plain_student())
    other = make_run(tmp_path / "other", plain_student(), seed=1)
    own = {"inputs": {"teacher": "1", "maps": "1", "student": "1"}}  # a seed's own
    for folder, value in ((first, "a"), (other, "b")):
        (folder / ".stages").mkdir()
        for each in ("teacher", "student", "evaluate"):
            (folder / ".stages" / f"{each}.json").write_text(json.dumps(own | {part: {name: "a"}}))
        (folder / ".stages" / f"{stage}.json").write_text(json.dumps(own | {part: {name: value, "maps": value}}))
    with pytest.raises(InputError, match=f"{name} differs"):
        read_run(first, [other])
    (other / ".stages" / f"{stage}.json").write_text(json.dumps(own | {part: {name: "a", "maps": "b"}}))
    assert len(read_run(first, [other]).seed_metrics) == 2


@pytest.mark.parametrize("limit", ["train_limit", "test_limit"])
def test_images_that_a_limit_draws_by_the_seed_may_differ(limit, tmp_path):
    first = make_run(tmp_path / "first", plain_student())
    other = make_run(tmp_path / "other", plain_student(), seed=1)
    stage, name = ("student", "training images") if limit == "train_limit" else ("evaluate", "test images")
    for folder in (first, other):
        config = yaml.safe_load((folder / "config.yaml").read_text()) | {limit: 40}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / ".stages").mkdir()
        (folder / ".stages" / f"{stage}.json").write_text(json.dumps({"inputs": {name: folder.name}}))
    assert len(read_run(first, [other]).seed_metrics) == 2


def test_run_that_was_tested_on_another_number_of_images_is_refused(plugin_run, tmp_path):
    other = make_run(tmp_path / "other", plain_student(), seed=1)
    metrics = json.loads((other / "metrics.json").read_text()) | {"n": 20}
    (other / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match="number of test images differs"):
        read_run(plugin_run, [other])


def test_runs_of_several_seeds_each_have_another(plugin_run, tmp_path):
    other = make_run(tmp_path / "other", plain_student(), seed=1)
    with pytest.raises(InputError, match="seed 0 is there already"):
        read_run(plugin_run, [plugin_run])
    with pytest.raises(InputError, match="seed 1 is there already"):
        read_run(plugin_run, [other, other])
