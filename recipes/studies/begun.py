"""A run that is under way: its checkpoint, and beside it what it began with, as it goes on with nothing else."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from studies.origins import Origin, decided
from studies.rows import BETWEEN, as_text
from timm_igkd.errors import InputError, first_line
from timm_igkd.records import read_record, write_record
from timm_igkd.training.checkpoint import TrainingState


@dataclass(frozen=True)
class BegunRun:
    """What a run began with, and the sessions that worked on it.

    Attributes:
        origin: what its numbers come from, see `Origin`.
        started: when its first session began, in ISO format and UTC.
        sessions: `commit`, `hardware` and `versions` of each, as they are written in a row; the last is this one.
        trained_s: seconds of the epochs that earlier sessions finished.
    """

    origin: Mapping[str, str]
    started: str
    sessions: tuple[Mapping[str, str], ...]
    trained_s: float = 0.0

    @property
    def columns(self) -> dict[str, str]:
        """What it says of the run's row: what differs between sessions stands there with all its values."""
        versions = [json.loads(session["versions"]) for session in self.sessions]
        names = {name: None for of_session in versions for name in of_session}
        return {
            "started": self.started,
            "commit": _each_once(session["commit"] for session in self.sessions),
            "hardware": _each_once(session["hardware"] for session in self.sessions),
            "versions": json.dumps({name: _common(versions, name) for name in names}),
        }


def _each_once(texts: Any) -> str:
    return BETWEEN.join(dict.fromkeys(texts))


def _common(versions: Collection[Mapping[str, Any]], name: str) -> Any:
    """Return the value of a name that is the same in all sessions, else all values as text."""
    values = [of_session.get(name) for of_session in versions]
    return values[0] if all(value == values[0] for value in values) else _each_once(map(str, values))


def begin(checkpoint: Path, row: Mapping[str, Any], same_maps: Collection[str] = ()) -> BegunRun:
    """Write down what a run begins with, or hold a run that goes on against what it began with.

    A checkpoint of which that is not known, of an older version or damaged, is removed: the run begins again.

    Args:
        checkpoint: of the run; where it is there, the run goes on from it.
        row: identity of the run, by column.
        same_maps: hashes of maps that are taken as the same, see `Origin.check_beside`.

    Raises:
        InputError: the checkpoint's images, teacher, maps, device, precision or compilation are others.
    """
    path, text = checkpoint.with_suffix(".json"), as_text(row)
    origin = Origin.of(text)
    session = {name: text[name] for name in ("commit", "hardware", "versions")}
    begun = BegunRun(origin._asdict(), text["started"], (session,))
    if checkpoint.exists() and (before := _read(path, checkpoint)) is not None:
        other = Origin(**before.origin)
        remedy = "give another work_dir, or delete the file to repeat the run from its start"
        origin.check_beside(other, checkpoint, decided({origin, other}, same_maps), remedy)
        sessions = before.sessions if session == before.sessions[-1] else (*before.sessions, session)
        trained_s = sum(record.seconds for record in TrainingState.load(checkpoint).history)
        begun = BegunRun(before.origin, before.started, sessions, trained_s)
    write_record(path, begun)
    return begun


def finish(checkpoint: Path) -> None:
    """Remove what a run leaves that has its row."""
    checkpoint.unlink(missing_ok=True)
    checkpoint.with_suffix(".json").unlink(missing_ok=True)


def _read(path: Path, checkpoint: Path) -> BegunRun | None:
    try:
        begun = read_record(BegunRun, path)
        if not begun.sessions:
            raise ValueError("it has no session")
        Origin(**begun.origin)
        _ = begun.columns
    except (InputError, FileNotFoundError, AttributeError, KeyError, TypeError, ValueError) as error:
        tqdm.write(f"what {checkpoint} was begun with is not known ({first_line(error)}); its run begins again")
        checkpoint.unlink()
        return None
    return begun
