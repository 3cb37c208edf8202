"""What a stage of a run leaves behind: one small file, written when it begins and again when it is complete."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timm_igkd.errors import InputError, first_line
from timm_igkd.files import write_json


@dataclass(frozen=True)
class StageMarker:
    """The record of one stage.

    Attributes:
        settings: what its output depends on, by name.
        inputs: hashes of what it read, by what messages call it.
        launch: what the launcher decided, by name: a half-done stage cannot go on with another batch size or precision.
        torch_threads: CPU threads it began with.
        wall_time_s: seconds it took; None where it began and is not complete. A stage that was killed and resumed
            counts its last part.
    """

    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    launch: Mapping[str, Any]
    torch_threads: int
    wall_time_s: float | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the stage's output is whole."""
        return self.wall_time_s is not None


def write_marker(path: Path, marker: StageMarker) -> None:
    """Write a marker, in place of an earlier one."""
    write_json(path, asdict(marker))


def read_marker(path: Path) -> StageMarker | None:
    """Read what `write_marker` wrote, or None where there is nothing.

    Raises:
        InputError: the file is damaged.
    """
    if not path.exists():
        return None
    kinds: dict[str, Any] = {
        "settings": dict,
        "inputs": dict,
        "launch": dict,
        "torch_threads": int,
        "wall_time_s": (int, float, type(None)),
    }
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or set(content) != set(kinds):
            raise ValueError(f"expected {', '.join(kinds)}")
        for name, kind in kinds.items():
            if not isinstance(content[name], kind):
                raise ValueError(f"{name} is {content[name]!r}")
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply, or something else
        raise InputError(
            f"{str(path)!r} is no marker of a stage ({first_line(error)}); choose another --name, or delete the folder"
        ) from error
    return StageMarker(**content)
