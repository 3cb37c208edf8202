"""The state of a training after an epoch: one file, whole or not there, from which the training goes on.

Every random draw is derived from (seed, purpose, epoch, sample), so a checkpoint needs no random state, and a training
that was killed and resumed ends with the weights of one that was not.
"""

import io
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from timm_igkd.errors import InputError, first_line
from timm_igkd.files import refuse_special, write_atomic
from timm_igkd.training.history import EpochRecord

_NOT_THIS_TRAINING = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
_NOT_COMPARED = {"params", "step", "lr", "initial_lr", "max_lr_snapshot"}  # of groups: steps, rates


@dataclass(frozen=True)
class TrainingState:
    """Everything a training goes on from.

    Attributes:
        history: of the finished epochs.
        student: its state.
        student_ema: state of its moving average, or None.
        optimizer: its state.
        scaler: state of the scaler of fp16 gradients, or None.
    """

    history: Sequence[EpochRecord]
    student: dict[str, Any]
    optimizer: dict[str, Any]
    student_ema: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None

    def save(self, path: Path) -> None:
        """Write the state, in place of an earlier one."""
        buffer = io.BytesIO()
        torch.save(vars(self) | {"history": [asdict(record) for record in self.history]}, buffer)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "TrainingState":
        """Read what `save` wrote; tensors come on the CPU.

        Raises:
            InputError: the file is damaged, or is something else.
        """
        refuse_special(path)
        with refusing_damage(path), warnings.catch_warnings(action="ignore"):  # torch's, of other kinds of files
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content, dict) or set(content) != set(cls.__dataclass_fields__):
                raise ValueError(f"it holds {sorted(content) if isinstance(content, dict) else type(content).__name__}")
            for name in ("student", "optimizer", "student_ema", "scaler"):
                is_optional = name in ("student_ema", "scaler")
                if not isinstance(content[name], dict) and not (is_optional and content[name] is None):
                    raise ValueError(f"its {name} is {type(content[name]).__name__}")
            history = [EpochRecord.from_dict(record) for record in content.pop("history")]
            if not history or [record.epoch for record in history] != list(range(len(history))):
                raise ValueError(f"its epochs are {[record.epoch for record in history]}")
            return cls(history, **content)


@contextmanager
def refusing_damage(path: Path) -> Iterator[None]:
    """Turn what goes wrong with the content of a checkpoint into one line that names it."""
    try:
        yield
    except (EOFError, pickle.UnpicklingError, *_NOT_THIS_TRAINING) as error:
        raise InputError(
            f"{str(path)!r} is no checkpoint of this training ({first_line(error)}); delete it to train from the start"
        ) from error


def check_optimizer(saved: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError where a saved state is of another optimiser, or of one with other settings.

    `load_state_dict` takes them over with the state, or fails at the first step. The rate is set for every update.

    Args:
        saved: the optimiser's state of a checkpoint.
        groups: parameter groups of the optimiser that is to go on.
    """
    for found, wanted in zip(saved["param_groups"], groups, strict=True):
        names = (wanted.keys() | found.keys()) - _NOT_COMPARED
        for name in sorted(names):
            if name not in found or name not in wanted:
                raise ValueError(
                    f"it is of another optimiser, {name} is {'missing' if name in wanted else 'new'} there"
                )
            if repr(found[name]) != repr(wanted[name]):
                raise ValueError(f"the optimiser's {name} is {found[name]!r} there, {wanted[name]!r} here")
