"""Files of a run as the report reads them: other versions are read, damage is one line."""

import json

import numpy as np
import pytest
from tiny_parts import NUMBERS

from timm_igkd.errors import InputError
from timm_igkd.report.run_facts import read_run
from timm_igkd.report.run_files import read_metrics, read_predictions, update_metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metrics: metrics.clear() or metrics.update(top1=50), "must hold the number top5, found None"),
        (lambda metrics: metrics.update(top1="92"), "must hold the number top1, found '92'"),
        (lambda metrics: metrics.update(n=True), "must hold the number n, found True"),
        (lambda metrics: metrics.update(teacher={"top1": 50}), "teacher must hold the number top5"),
        (lambda metrics: metrics.update(teacher=[1]), "teacher must hold the number top1"),
        (lambda metrics: metrics.update(latency_ms=[3]), "latency_ms must be names with values, found a list of 1"),
        (
            lambda metrics: metrics.update(robustness={"top1": 5.0, "n": 1, "kinds": {"jpeg": []}}),
            "robustness: kinds.jpeg must be a list of 5",
        ),
        (
            lambda metrics: metrics.update(wall_time_s={"teacher": "long"}),
            "wall_time_s.teacher must be a finite number",
        ),
    ],
)
def test_metrics_that_are_none_are_one_line(change, message, tmp_path):
    metrics = dict(NUMBERS)
    change(metrics)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=message):
        read_metrics(tmp_path / "metrics.json")


def test_metrics_of_another_version_are_read_and_keep_what_this_one_does_not_know(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(
        json.dumps(NUMBERS | {"split": None, "later": {"a": 1}, "arms": None, "teacher": NUMBERS | {"x": 1}})
    )
    found = read_metrics(path)
    assert (found.top1, found.split, found.arms, found.exports, found.teacher.n) == (90.0, None, None, (), 10)
    update_metrics(path, {"wall_time_s": {"report": 1.5}})
    written = json.loads(path.read_text())
    assert written == NUMBERS | {"later": {"a": 1}, "teacher": NUMBERS | {"x": 1}, "wall_time_s": {"report": 1.5}}


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04" + b"x" * 50, b"\x93NUMPY", b"\x80\x04."])
def test_damaged_predictions_are_one_line(content, tmp_path):
    (tmp_path / "predictions.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"predictions\.npz' cannot be read as arrays .*; delete it and run again"):
        read_predictions(tmp_path / "predictions.npz")


@pytest.mark.parametrize(("offset", "value"), [(8, 1), (10, 99)], ids=["encrypted", "an unknown compression"])
def test_predictions_whose_entries_zip_cannot_open_are_one_line(offset, value, tmp_path):
    path = tmp_path / "predictions.npz"
    np.savez(path, labels=np.zeros(3), student_logits=np.zeros((3, 2)), class_names=np.array(["a", "b"]))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] = value  # flags and method of the first entry, in the directory
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"predictions\.npz' cannot be read as arrays .*; delete it and run again"):
        read_predictions(path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"a: \xff", b"[" * 50_000])
def test_damaged_settings_of_a_run_are_not_taken_for_none(content, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.yaml' (is not YAML|must hold)"):
        read_run(tmp_path)
