"""Markers of stages: written, read back, and refused in one line where they are damaged."""

import json
import os
from dataclasses import replace

import pytest

from timm_igkd.errors import InputError
from timm_igkd.records import write_record
from timm_igkd.runs.stages import Stage, StageMarker, is_same_setting, read_marker

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


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Two folders, and a link to one of them, in the working directory and the home folder."""
    for folder in ("given", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to("given")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["maps", "unlabeled", "teacher", "student", "teacher_checkpoint"])
def test_another_spelling_of_a_place_is_the_same_setting(name, places):
    is_model = name in ("teacher", "student")
    prefix = "local-dir:" if is_model else ""
    for spelling in ("given", "./given/", "link", "~/given", str(places / "given")):
        assert is_same_setting(name, f"{prefix}given", f"{prefix}{spelling}")
        assert not is_same_setting(name, f"{prefix}other", f"{prefix}{spelling}")
        assert is_same_setting(name, "given", spelling) == (not is_model or spelling == "given")  # timm's bare names
    assert not is_same_setting(name, f"{prefix}given", "hf-hub:given")
    assert not is_same_setting(name, f"{prefix}given", None)
    assert is_same_setting(name, f"{prefix}gone", f"{prefix}./gone")
    assert not is_same_setting("train_split", "given", "./given")


def test_given_maps_are_those_that_the_run_links_to(places):
    """Wherever it was started: a relative path means another folder in another working directory."""
    (places / "maps").symlink_to("given")
    for earlier in ("given", "store"):
        for spelling in ("given", "link", str(places / "given")):
            assert is_same_setting("maps", earlier, spelling, places / "maps")
        assert not is_same_setting("maps", earlier, "other", places / "maps")
    assert is_same_setting("maps", "user/store", "user/store", places / "maps")
    assert not is_same_setting("maps", None, "given", places / "maps")
    assert not is_same_setting("maps", "given", None, places / "maps")
    (places / "given").rmdir()
    assert is_same_setting("maps", "given", "given", places / "maps")


def test_what_killed_processes_took_counts_as_far_as_what_they_left(tmp_path):
    """Of three: the second goes on from the shards of the first, and leaves none itself."""
    stage = Stage("maps", lambda: None, [tmp_path / "maps" / "provenance.json"], shards="data/*.parquet")
    begun = replace(MARKER, wall_time_s=None, begun_at=1000.0)
    assert stage.spent(None) == stage.spent(begun) == 0
    shards = [tmp_path / "maps" / "data" / f"{i}.parquet" for i in range(2)]
    shards[0].parent.mkdir(parents=True)
    for shard, left in zip(shards, (1010.0, 1030.0), strict=True):
        shard.touch()
        os.utime(shard, (left, left))
    assert stage.spent(begun) == 30
    second = replace(begun, begun_at=2000.0, spent_s=30.0)
    assert stage.spent(second) == 30
    os.utime(shards[1], (2005.5, 2005.5))
    assert stage.spent(second) == 35.5
    assert stage.spent(replace(second, wall_time_s=1.0)) == 0  # complete: it begins anew
    assert stage.spent(replace(begun, begun_at=0.0)) == 0  # of a version that noted none
    training = Stage("student", lambda: None, [tmp_path / "model"], partial=tmp_path / "last.pt")
    assert training.spent(second) == 0  # nothing is left: all is trained again
    (tmp_path / "last.pt").touch()
    os.utime(tmp_path / "last.pt", (2010.0, 2010.0))
    assert training.spent(second) == 40
