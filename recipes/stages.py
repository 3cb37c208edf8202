"""Stages that skip when complete: each leaves a marker with the settings it was run with and its wall time."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from timm_igkd.errors import InputError
from timm_igkd.files import read_json, write_json
from train_config import TrainConfig


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: of the stage and its marker.
        fields: the settings its output depends on.
        function: does the work.
        partial: a file that it leaves when killed, to go on from with --resume.
    """

    name: str
    fields: tuple[str, ...]
    function: Callable[[], None]
    partial: Path | None = None


class Stages:
    """The stages of one run folder, in order.

    Args:
        run_dir: the run's folder.
        config: its settings.
        accelerator: stages run on all processes, markers are written by the main one.
        stages: what there is to do.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, accelerator: Accelerator, stages: list[Stage]):
        self.run_dir, self.config, self.accelerator, self.stages = run_dir, config, accelerator, stages

    def pending(self) -> list[Stage]:
        """Check the folder against the settings, writing nothing, and return the stages that are left to do.

        Raises:
            InputError: the folder holds a stage's output for other settings, or a part of it without --resume.
        """
        pending = []
        for stage in self.stages:
            marker, begun = self._marker(stage), self._begun(stage)
            if marker.exists():
                self._check_settings(stage, read_json(marker), self._settings(stage))
                continue
            pending.append(stage)
            if begun.exists():
                self._check_settings(stage, read_json(begun), self._settings(stage) | self.launch())
            if stage.partial is not None and stage.partial.exists() and not self.config.resume:
                raise InputError(
                    f"stage {stage.name} of {self.run_dir} was stopped half-way; add --resume to go on, or choose "
                    "another --name"
                )
        return pending

    def run(self) -> None:
        """Run what is pending; the folder was checked before."""
        for stage in self.stages:
            if self._marker(stage).exists():
                self.accelerator.print(f"{stage.name}: complete, skipped")
            else:
                self._run(stage)
            if self.accelerator.is_main_process:
                self._begun(stage).unlink(missing_ok=True)
                if stage.partial is not None and stage.partial.parent.is_dir():
                    stage.partial.unlink(missing_ok=True)
                    stage.partial.parent.rmdir()
            self.accelerator.wait_for_everyone()

    def _run(self, stage: Stage) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._note_threads(stage)
            settings = self._settings(stage) | self.launch()
            write_json(self._begun(stage), {"settings": settings, "torch_threads": torch.get_num_threads()})
        started = time.perf_counter()
        stage.function()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            seconds = round(time.perf_counter() - started, 2)
            write_json(self._marker(stage), {"settings": self._settings(stage), "wall_time_s": seconds})
            self.accelerator.print(f"{stage.name}: done in {seconds:.1f} s")

    def _note_threads(self, stage: Stage) -> None:
        """Say it where a stage goes on with other threads than it began with: no reason to refuse a smaller machine."""
        begun = read_json(self._begun(stage)).get("torch_threads") if self._begun(stage).exists() else None
        threads = torch.get_num_threads()
        if begun not in (None, threads):
            self.accelerator.print(
                f"{stage.name}: begun with {begun} CPU threads, goes on with {threads}; the last bits of its result "
                "can differ from those of a run that was never interrupted"
            )

    def _marker(self, stage: Stage) -> Path:
        return self.run_dir / ".stages" / f"{stage.name}.json"

    def _begun(self, stage: Stage) -> Path:
        return self.run_dir / ".stages" / f"{stage.name}.begun.json"

    def _settings(self, stage: Stage) -> dict[str, Any]:
        values = asdict(self.config)
        return json.loads(json.dumps({name: values[name] for name in stage.fields}))

    def launch(self) -> dict[str, Any]:
        """Return what `accelerate launch` decides: a stage cannot go on with another batch size or precision."""
        return {"num_processes": self.accelerator.num_processes, "mixed_precision": self.accelerator.mixed_precision}

    def _check_settings(self, stage: Stage, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        for key, value in wanted.items():
            if found["settings"].get(key) != value:
                raise InputError(
                    f"stage {stage.name} of {self.run_dir} was run with {key} = {found['settings'].get(key)!r}, now "
                    f"it is {value!r}; choose another --name, or delete the folder"
                )

    def wall_times(self) -> dict[str, float]:
        """Return the seconds of the finished stages; a stage that was killed and resumed counts its last part."""
        finished = [stage for stage in self.stages if self._marker(stage).exists()]
        return {stage.name: read_json(self._marker(stage))["wall_time_s"] for stage in finished}
