"""A run that is under way: its checkpoint, and beside it what it began with, as it goes on with nothing else."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studies.origins import Origin, decided
from studies.rows import as_text
from timm_igkd.errors import InputError
from timm_igkd.files import read_mapping, write_json
from timm_igkd.training.checkpoint import TrainingState


@dataclass(frozen=True)
class BegunRun:
    """What a run began with.

    Attributes:
        origin: what its numbers come from, see `Origin`.
        started: when its first session began, in ISO format and UTC.
        commits: of all sessions.
        trained_s: seconds of the epochs that earlier sessions finished.
    """

    origin: Mapping[str, str]
    started: str
    commits: tuple[str, ...]
    trained_s: float = 0.0

    @property
    def columns(self) -> dict[str, str]:
        """What it says of the run's row."""
        return {"started": self.started, "commit": ", ".join(self.commits)}


def begin(checkpoint: Path, row: Mapping[str, Any], same_maps: Collection[str] = ()) -> BegunRun:
    """Write down what a run begins with, or hold a run that goes on against what it began with.

    Args:
        checkpoint: of the run; where it is there, the run goes on from it.
        row: identity of the run, by column.
        same_maps: hashes of maps that are taken as the same, see `Origin.check_beside`.

    Raises:
        InputError: the checkpoint's images, teacher, maps, device, precision or compilation are others, or it is
            damaged.
    """
    path = checkpoint.with_suffix(".json")
    origin = Origin.of(as_text(row))
    begun = BegunRun(origin._asdict(), row["started"], (row["commit"],))
    if checkpoint.exists():
        before = _read(path, checkpoint)
        other = Origin(**before.origin)
        origin.check_beside(other, checkpoint, decided({origin, other}, same_maps))
        trained_s = sum(record.seconds for record in TrainingState.load(checkpoint).history)
        commits = tuple(dict.fromkeys([*before.commits, *begun.commits]))
        begun = BegunRun(before.origin, before.started, commits, trained_s)
    write_json(path, json.loads(json.dumps(asdict(begun))))
    return begun


def finish(checkpoint: Path) -> None:
    """Remove what a run leaves that has its row."""
    checkpoint.unlink(missing_ok=True)
    checkpoint.with_suffix(".json").unlink(missing_ok=True)


def _read(path: Path, checkpoint: Path) -> BegunRun:
    unknown = InputError(
        f"what {str(checkpoint)!r} was begun with is not known ({path.name} is missing or damaged beside it); "
        "delete it to repeat the run from its start"
    )
    try:
        content = read_mapping(path)
        begun = BegunRun(**content | {"commits": tuple(content["commits"])})
        Origin(**begun.origin)
    except (InputError, KeyError, TypeError, FileNotFoundError) as error:
        raise unknown from error
    return begun
