"""Markers of stages: written, read back, and refused in one line where they are damaged."""

import json
import os

import pytest

from timm_igkd.errors import InputError
from timm_igkd.records import write_record
from timm_igkd.runs.stages import StageMarker, is_same_setting, read_marker

MARKER = StageMarker({"seed": 0, "lr": 0.1}, {"teacher": "ab"}, {"num_processes": 1, "mixed_precision": "no"}, 2, 1.5)


def test_a_marker_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "student.json"
    assert read_marker(path) is None
    write_record(path, MARKER)
    assert read_marker(path) == MARKER
    assert MARKER.is_complete
    assert not StageMarker({}, {}, {}, 1).is_complete


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"[]",
        b"null",
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({"settings": [], "inputs": {}, "launch": {}, "torch_threads": 1, "wall_time_s": None}).encode(),
        json.dumps({"settings": {}, "inputs": {}, "launch": {}, "torch_threads": "1", "wall_time_s": None}).encode(),
        json.dumps({"settings": {}, "inputs": {}, "launch": {}, "torch_threads": 1, "wall_time_s": {}}).encode(),
    ],
)
def test_a_damaged_marker_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "student.json"
    path.write_bytes(content)
    cause = r"^a stage's marker cannot be read: '.*student\.json'[^;]*"
    message = cause + "; restore it, choose another --name, or delete the folder$"
    with pytest.raises(InputError, match=message) as error:
        read_marker(path)
    assert "\n" not in str(error.value)


def test_a_pipe_in_the_place_of_a_marker_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "student.json")
    with pytest.raises(InputError, match="pipe"):
        read_marker(tmp_path / "student.json")


@pytest.mark.parametrize(
    "name", ["maps", "unlabeled", "teacher", "student", "teacher_checkpoint", "student_checkpoint"]
)
def test_another_spelling_of_a_place_is_the_same_setting(name, tmp_path, monkeypatch):
    for folder in ("given", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to("given")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for prefix in ("local-dir:", "") if name in ("teacher", "student") else ("",):
        for spelling in ("given", "./given/", "link", "~/given", str(tmp_path / "given")):
            assert is_same_setting(name, f"{prefix}given", f"{prefix}{spelling}")
            assert not is_same_setting(name, f"{prefix}other", f"{prefix}{spelling}")
    assert not is_same_setting(name, "given", "local-dir:given")
    assert not is_same_setting(name, "given", None)
    assert not is_same_setting(name, "gone", "./gone")
    assert not is_same_setting("train_split", "given", "./given")
