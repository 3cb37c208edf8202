"""The file that a training goes on from: whole, or refused in one line that names it."""

import os
import pickle
from dataclasses import replace

import pytest
import torch

from timm_igkd.errors import InputError
from timm_igkd.training.checkpoint import TrainingState
from timm_igkd.training.history import EpochRecord

STATE = TrainingState([EpochRecord(0, 0.1, 2.0, task_loss=2.0)], {"weight": torch.ones(2)}, {"state": {}})


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.pt"


def test_a_state_comes_back_as_it_was_saved(path):
    STATE.save(path)
    found = TrainingState.load(path)
    assert found.history == STATE.history
    assert torch.equal(found.student["weight"], torch.ones(2))
    assert found.student_ema is found.scaler is None


def truncated(path):
    STATE.save(path)
    path.write_bytes(path.read_bytes()[:-200])


def flipped(path):
    STATE.save(path)
    content = bytearray(path.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    path.write_bytes(bytes(content))


DAMAGES = {
    "truncated": truncated,
    "half of it zeros": flipped,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello\n"),
    "an empty dictionary": lambda path: torch.save({}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "a pickle of code": lambda path: torch.save({"student": Evil()}, path),
    "no epoch": lambda path: replace(STATE, history=[]).save(path),
    "epochs that are missing": lambda path: replace(STATE, history=[EpochRecord(1, 0.1, 2.0)]).save(path),
    "a loss of text": lambda path: replace(STATE, history=[EpochRecord(0, 0.1, "2.0")]).save(path),
    "an optimizer of nothing": lambda path: replace(STATE, optimizer=None).save(path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(damage, path, capsys):
    DAMAGES[damage](path)
    message = r"last\.pt' is no checkpoint of this training \(.+\); delete it to train from the start"
    with pytest.raises(InputError, match=message) as error:
        TrainingState.load(path)
    assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "last.pt")
    with pytest.raises(InputError, match="pipe"):
        TrainingState.load(tmp_path / "last.pt")
