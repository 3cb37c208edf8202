"""What tests that run a study share: its rows, and a study in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from command_lines import RECIPES

from studies.rows import StudyRows


def rows_of(settings: dict[str, Any]) -> list[dict[str, str]]:
    return StudyRows(settings["output_dir"]).read()


def study_process(path: Path, settings: dict[str, Any], *flags: str) -> None:
    """Run the study in a process of its own, to success."""
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    command = [sys.executable, str(RECIPES / "study.py"), "--config", str(path), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr


def without_time(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    timed = ("started", "wall_time_s", "train_images_per_s")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]
