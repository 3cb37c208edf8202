"""Stages that skip when complete: each leaves a marker with the settings it was run with and its wall time."""

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from timm_igkd.environment import environment
from timm_igkd.errors import InputError
from timm_igkd.files import MARKERS
from timm_igkd.records import read_record, write_record
from timm_igkd.runs.checks import CLASS_NAMES
from timm_igkd.runs.settings import RunConfig, StageName
from timm_igkd.training.accelerator import launch_change, launch_of

_LOCAL_DIR = "local-dir:"
_PLACES = ("teacher", "teacher_checkpoint", "student", "student_checkpoint", "maps", "unlabeled")


@dataclass(frozen=True)
class StageMarker:
    """The record of one stage.

    Attributes:
        settings: what its output depends on, by name.
        inputs: hashes of what it read, by what messages call it.
        launch: what the launcher decided, by name: a half-done stage cannot go on with another batch size or precision.
        torch_threads: CPU threads it began with.
        bfloat16: how autocast on the CPU computed it, as `environment` says it; empty: as torch does.
        wall_time_s: seconds it took; None where it began and is not complete. Of a stage that was killed and resumed
            all parts, each as far as what it left.
        begun_at: seconds since 1970.
        spent_s: of `wall_time_s` those of killed processes before.
    """

    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    launch: Mapping[str, Any]
    torch_threads: int
    wall_time_s: float | None = None
    bfloat16: str = ""
    begun_at: float = 0.0
    spent_s: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether the stage's output is whole."""
        return self.wall_time_s is not None


def read_marker(path: Path) -> StageMarker | None:
    """Read the marker of a stage, or None where there is none.

    Raises:
        InputError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        return read_record(StageMarker, path)
    except InputError as error:
        cause = str(error).partition("; ")[0]
        raise InputError(
            f"a stage's marker cannot be read: {cause}; restore it, choose another --name, or delete the folder"
        ) from error


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: of the stage and its marker.
        function: does the work.
        outputs: files that it leaves. Where one is gone it is done again; a stage with `partial` is refused instead.
        partial: a file that a training leaves when killed, to go on from with --resume.
        shards: pattern of files beside its first output that it leaves when killed and goes on from unasked.
        is_redone: it takes seconds, so it is done again where settings or inputs are others; such stages are refused
            otherwise.
    """

    name: StageName
    function: Callable[[], None]
    outputs: Sequence[Path]
    partial: Path | None = None
    shards: str | None = None
    is_redone: bool = False

    def lost(self) -> Path | None:
        """Return the first of the outputs that is not there."""
        return next((path for path in self.outputs if not path.exists()), None)

    def spent(self, begun: StageMarker | None) -> float:
        """Return the seconds that killed processes took for what they left to go on from."""
        left = [] if self.shards is None else list(self.outputs[0].parent.glob(self.shards))
        left += [self.partial] if self.partial is not None and self.partial.exists() else []
        if begun is None or begun.is_complete or not begun.begun_at or not left:
            return 0.0
        return round(begun.spent_s + max(0.0, max(path.stat().st_mtime for path in left) - begun.begun_at), 2)


class Stages:
    """The stages of one run folder, in order.

    Args:
        run_dir: the run's folder.
        config: its settings.
        accelerator: stages run on all processes, markers are written by the main one.
        stages: what there is to do.
        inputs: tells the hashes of what a stage reads, see `RunInputs`.
        maps: folder of the run's maps, or its link to those that were given.
        label: what lines begin with.
    """

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        accelerator: Accelerator,
        stages: list[Stage],
        inputs: Callable[[StageName], Mapping[str, str]],
        maps: Path,
        label: str = "",
    ):
        self.run_dir, self.config, self.accelerator, self.stages = run_dir, config, accelerator, stages
        self.inputs, self.maps, self.label = inputs, maps, label

    @staticmethod
    def finished(run_dir: Path, name: StageName) -> StageMarker | None:
        """Return the marker of a stage that is complete, whatever its settings, or None."""
        marker = read_marker(_path(run_dir, name))
        return marker if marker is not None and marker.is_complete else None

    @staticmethod
    def forget(run_dir: Path, name: StageName) -> None:
        """Have a stage that is complete done again."""
        _path(run_dir, name).unlink(missing_ok=True)

    def pending(self) -> list[Stage]:
        """Check the folder against the settings, writing nothing, and return the stages that are left to do.

        A stage that only began holds nothing that other settings could not replace.

        Raises:
            InputError: the folder holds a stage's output for other settings, or a part of it without --resume, or a
                damaged marker, or has lost what took long to train.
        """
        pending, launch = [], launch_of(self.accelerator, self.config.compile)
        for stage in self.stages:
            marker = self._marker(stage)
            if stage.is_redone:
                pending += [] if self._is_done(stage) else [stage]
                continue
            is_half_done = stage.partial is not None and stage.partial.exists()
            if marker is not None and (marker.is_complete or is_half_done):
                self._check(stage, marker.settings, self.config.settings_of(stage.name))
                self._check_inputs(stage, marker.inputs)
            if marker is not None and marker.is_complete:
                if (lost := stage.lost()) is None:
                    continue
                if stage.partial is not None:
                    raise InputError(
                        f"stage {stage.name} of {self.run_dir} is complete, but {str(lost)!r} of it is gone; restore "
                        "it, choose another --name, or delete the folder"
                    )
            pending.append(stage)
            if marker is not None and is_half_done and (change := launch_change(marker.launch, launch)):
                raise InputError(
                    f"stage {stage.name} of {self.run_dir} was begun with {change}; launch it as before, choose "
                    "another --name, or delete the folder"
                )
            if is_half_done and not self.config.resume:
                raise InputError(
                    f"stage {stage.name} of {self.run_dir} was stopped half-way; "
                    "add --resume to go on, or choose another --name"
                )
        return pending

    def run(self) -> None:
        """Run what is pending; the folder was checked before."""
        for stage in self.stages:
            if self._is_done(stage):
                self.accelerator.print(f"{self.label}{stage.name}: complete, skipped")
            else:
                self._run(stage)
            if self.accelerator.is_main_process and stage.partial is not None and stage.partial.parent.is_dir():
                stage.partial.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # somebody put something there
                    stage.partial.parent.rmdir()
            self.accelerator.wait_for_everyone()

    def _run(self, stage: Stage) -> None:
        self.accelerator.wait_for_everyone()
        earlier, inputs = self.finished(self.run_dir, stage.name), self.inputs(stage.name)
        arithmetic = str(environment().get("bfloat16", ""))
        settings, threads = self.config.settings_of(stage.name), torch.get_num_threads()
        launch = launch_of(self.accelerator, self.config.compile)
        spent = stage.spent(self._marker(stage))
        begun = StageMarker(settings, inputs, launch, threads, None, arithmetic, time.time(), spent)
        # some outputs were lost: the marker keeps saying what the remaining ones were made with
        keeps = earlier is not None and not stage.is_redone
        if self.accelerator.is_main_process:
            self._note_other_rounding(stage, begun)
            if not keeps:
                write_record(_path(self.run_dir, stage.name), begun)
        started = time.perf_counter()
        stage.function()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            seconds = round(spent + time.perf_counter() - started, 2)
            if earlier is not None and keeps:
                seconds = max(seconds, earlier.wall_time_s or 0.0)
            write_record(_path(self.run_dir, stage.name), replace(begun, wall_time_s=seconds))
            self.accelerator.print(f"{self.label}{stage.name}: done in {time.perf_counter() - started:.1f} s")

    def _note_other_rounding(self, stage: Stage, now: StageMarker) -> None:
        """Say it where a stage goes on with other threads or arithmetic: no reason to refuse another machine."""
        begun = self._marker(stage)
        if begun is None:
            return
        said = []
        if begun.torch_threads != now.torch_threads:
            said.append(f"begun with {begun.torch_threads} CPU threads, goes on with {now.torch_threads}")
        if begun.bfloat16 != now.bfloat16:
            ways = [marker.bfloat16 or "torch's own products" for marker in (begun, now)]
            said.append("begun with {} in bfloat16, goes on with {}".format(*ways))
        for what in said:
            self.accelerator.print(
                f"{self.label}{stage.name}: {what}; its result can differ in last bits from that of a run that was "
                "never interrupted"
            )

    def _is_done(self, stage: Stage) -> bool:
        """Return whether a stage is complete, as far as it would be done again with what is asked for now."""
        marker = self.finished(self.run_dir, stage.name)
        if marker is None or stage.lost() is not None:
            return False
        if not stage.is_redone:
            return True
        wanted = self.config.settings_of(stage.name)
        is_same = marker.settings.keys() == wanted.keys() and all(
            is_same_setting(key, marker.settings[key], value, self.maps) for key, value in wanted.items()
        )
        return is_same and marker.inputs == self.inputs(stage.name)

    def _marker(self, stage: Stage) -> StageMarker | None:
        return read_marker(_path(self.run_dir, stage.name))

    def _check(self, stage: Stage, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for key, value in wanted.items():
            if not is_same_setting(key, found.get(key), value, self.maps):
                raise InputError(
                    f"stage {stage.name} of {self.run_dir} was run with {key} = {found.get(key)!r}, now it is "
                    f"{value!r}; choose another --name, or delete the folder"
                )

    def _check_inputs(self, stage: Stage, found: Mapping[str, str]) -> None:
        for what, read in self.inputs(stage.name).items():
            if found.get(what, read if what == CLASS_NAMES else None) != read:
                raise InputError(
                    f"stage {stage.name} of {self.run_dir} was made with other {what} than are there now; restore "
                    "them, choose another --name, or delete the folder"
                )

    def wall_times(self) -> dict[str, float]:
        """Return the seconds of the complete stages."""
        found = {stage.name: self.finished(self.run_dir, stage.name) for stage in self.stages}
        return {name: marker.wall_time_s for name, marker in found.items() if marker and marker.wall_time_s is not None}


def is_same_setting(name: str, earlier: Any, now: Any, maps: Path | None = None) -> bool:
    """Return whether two values of a setting mean the same; a file or folder may be spelled in several ways.

    Args:
        name: of the setting.
        earlier: its value in a marker, relative to a working directory that may have been another.
        now: its value in this call.
        maps: link of the run to the store that `maps` meant.
    """
    if earlier == now or name not in _PLACES or not (isinstance(earlier, str) and isinstance(now, str)):
        return bool(earlier == now)
    if name == "maps" and maps is not None and maps.exists() and os.path.isdir(found := os.path.expanduser(now)):
        return os.path.samefile(found, maps)  # no hash of a given store is in the marker of its stage
    is_model = name in ("teacher", "student")  # a bare name is timm's, whatever lies here
    if is_model and not (earlier.startswith(_LOCAL_DIR) and now.startswith(_LOCAL_DIR)):
        return False
    paths = [os.path.expanduser(value.removeprefix(_LOCAL_DIR) if is_model else value) for value in (earlier, now)]
    both_exist = all(map(os.path.exists, paths))
    return os.path.samefile(*paths) if both_exist else os.path.abspath(paths[0]) == os.path.abspath(paths[1])


def _path(run_dir: Path, name: StageName) -> Path:
    return run_dir / MARKERS / f"{name}.json"
