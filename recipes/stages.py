"""Stages that skip when complete: each leaves a marker with the settings it was run with and its wall time."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from train_config import TrainConfig

from timm_igkd.errors import InputError
from timm_igkd.store_files import write_json


class Stages:
    """The stages of one run folder.

    Args:
        run_dir: the run's folder.
        config: its settings.
        accelerator: stages run on all processes, markers are written by the main one.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, accelerator: Accelerator):
        self.run_dir, self.config, self.accelerator = run_dir, config, accelerator

    def run(self, name: str, fields: tuple[str, ...], function: Callable[[], None], partial: Path | None = None) -> None:
        """Run a stage unless its marker is there.

        Args:
            fields: the settings its output depends on.
            partial: a file that a killed stage leaves, to go on from with --resume.

        Raises:
            InputError: the folder holds this stage's output for other settings, or a part of it without --resume.
        """
        settings = json.loads(json.dumps({key: asdict(self.config)[key] for key in fields}))
        marker = self._marker(name)
        if marker.exists():
            self._check_settings(name, json.loads(marker.read_text())["settings"], settings)
            self.accelerator.print(f"{name}: complete, skipped")
            return
        begun = marker.with_suffix(".begun.json")
        if begun.exists():
            self._check_settings(name, json.loads(begun.read_text())["settings"], settings)
        if partial is not None and partial.exists() and not self.config.resume:
            raise InputError(
                f"stage {name} of {self.run_dir} was stopped half-way; add --resume to go on, or choose another --name"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(begun, {"settings": settings})
        started = time.perf_counter()
        function()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            seconds = round(time.perf_counter() - started, 2)
            write_json(marker, {"settings": settings, "wall_time_s": seconds})
            begun.unlink(missing_ok=True)
            if partial is not None:
                partial.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def _marker(self, name: str) -> Path:
        return self.run_dir / ".stages" / f"{name}.json"

    def _check_settings(self, name: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        for key, value in wanted.items():
            if found.get(key) != value:
                raise InputError(
                    f"stage {name} of {self.run_dir} was run with {key} = {found.get(key)!r}, now it is {value!r}; choose "
                    "another --name, or delete the folder"
                )

    def wall_times(self) -> dict[str, float]:
        """Return the seconds of the finished stages; a stage that was killed and resumed counts its last part."""
        found = {}
        for name in ("teacher", "maps", "student", "evaluate", "report"):
            if self._marker(name).exists():
                found[name] = json.loads(self._marker(name).read_text())["wall_time_s"]
        return found
