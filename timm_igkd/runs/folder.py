"""The folder of a run: where each of its files lies, and what its stages read, as hashes."""

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from timm_igkd.errors import InputError
from timm_igkd.export.record import RECORD
from timm_igkd.export.students import RECORD as STUDENTS
from timm_igkd.files import hash_files, remove_abandoned
from timm_igkd.maps.build import source_teacher
from timm_igkd.maps.store import MapStore
from timm_igkd.models.checkpoint import start_files
from timm_igkd.runs.data import RunData
from timm_igkd.runs.settings import RunConfig, StageName


@dataclass(frozen=True)
class RunFolder:
    """runs/<name> and what is in it.

    Attributes:
        path: of the folder.
        shared: where teacher and maps lie; None: in the folder itself. An arm of a comparison has those of its run.
    """

    path: Path
    shared: Path | None = None

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def students(self) -> Path:
        """What the student was chosen from, where that was left to the run."""
        return self.path / STUDENTS

    @property
    def environment(self) -> Path:
        """Versions, hardware and command."""
        return self.path / "environment.json"

    @property
    def maps(self) -> Path:
        """The store of the training split's maps, or a link to the one that was given."""
        return (self.shared or self.path) / "maps"

    @property
    def metrics(self) -> Path:
        """What the test split showed."""
        return self.path / "metrics.json"

    @property
    def predictions(self) -> Path:
        """Logits of the test images."""
        return self.path / "predictions.npz"

    @property
    def export(self) -> Path:
        """The student's exported files, and the record of them."""
        return self.path / "export"

    @property
    def page(self) -> Path:
        """The report."""
        return self.path / "report" / "index.html"

    def model(self, name: str) -> Path:
        """Return the timm folder of the teacher or student."""
        return (self.shared or self.path if name == "teacher" else self.path) / name

    def arm(self, name: str) -> "RunFolder":
        """Return the folder of an arm."""
        return RunFolder(self.path / "arms" / name, shared=self.path)

    def history(self, name: str) -> Path:
        """Return the CSV of a training's epochs."""
        return self.path / f"{name}_history.csv"

    def checkpoint(self, name: str) -> Path:
        """Return the file that an unfinished training goes on from."""
        return self.path / f"{name}_training" / "last.pt"

    def remove_unfinished(self, pending: Collection[str]) -> None:
        """Drop what a killed process left of stages without a marker, so that nothing unfinished looks complete."""
        for name in {"teacher", "student"}.intersection(pending):
            for path in (self.model(name), *self.path.glob(f".{name}-*")):
                shutil.rmtree(path, ignore_errors=True)
        if "maps" in pending and self.maps.is_symlink():
            self.maps.unlink()  # to somebody's store: nothing is ever built into it
        remove_abandoned(self.path)


class RunInputs:
    """Hashes of images, models and maps, computed where a stage asks for them.

    Args:
        config: the run's settings.
        data: its images.
        folder: its files.
    """

    def __init__(self, config: RunConfig, data: RunData, folder: RunFolder):
        self.config, self.data, self.folder = config, data, folder

    def of(self, stage: StageName) -> dict[str, str]:
        """Return what a stage reads, by name as a message calls it; what is not there yet has an empty hash."""
        if stage == "teacher":
            return (self._fitted if self.config.teacher_epochs > 0 else {}) | self._teacher_start
        if stage == "maps":
            return {"training images": self.data.train_hash, "teacher": self._model("teacher")} | self._unlabeled
        if stage == "student":
            made = {"teacher": self._model("teacher"), "maps": self._maps}
            return self._fitted | made | self._unlabeled | self._student_start
        if stage == "evaluate":
            models = {name: self._model(name) for name in ("teacher", "student")}
            return {"test images": self.data.test_hash} | models
        if stage == "export":
            images = {"training images": self.data.train_hash, "test images": self.data.test_hash}
            return images | {"student": self._model("student")}
        exported = {"exported files": hash_files([self.folder.export / RECORD])} if self.config.export else {}
        return {"predictions": hash_files([self.folder.predictions])} | exported  # metrics.json still gets the times

    @property
    def _fitted(self) -> dict[str, str]:
        return {"training images": self.data.train_hash, "validation images": self.data.validation_hash}

    @property
    def _unlabeled(self) -> dict[str, str]:
        return {} if self.config.unlabeled is None else {"unlabelled images": self.data.unlabeled_hash}

    @cached_property
    def _teacher_start(self) -> dict[str, str]:
        return self._start("teacher")

    @cached_property
    def _student_start(self) -> dict[str, str]:
        return self._start("student")

    def _start(self, name: str) -> dict[str, str]:
        """Return the hash of the files that a model starts from, nothing where none is on this machine (any more)."""
        config = self.config
        if getattr(config, f"{name}_init") != "pretrained":
            return {}
        files = start_files(getattr(config, name), getattr(config, f"{name}_checkpoint"))
        found = hash_files(files)
        return {f"{name}'s files": found} if found else {}

    def _model(self, name: str) -> str:
        folder = self.folder.model(name)
        return hash_files([folder / "config.json", folder / "model.safetensors"])

    @property
    def _maps(self) -> str:
        return hash_files(sorted(self.folder.maps.glob("data/*.parquet"))) if self.config.needs_maps else ""


def check_given_maps(config: RunConfig, teacher: nn.Module, data: RunData) -> None:
    """Raise InputError unless the store of --maps is of the teacher, the number of images and the settings of the run.

    That its rows are those of the images, `MapStore.verify` tells, in the stage that would build maps.
    """
    assert config.maps is not None
    store = MapStore(config.maps)
    found = store.provenance
    made, sees = (vars(each) for each in (found.teacher, source_teacher(teacher, data.train, None)))
    for name in ("weights_sha256", "input_size", "mean", "std", "interpolation", "class_indices"):
        if made[name] != sees[name]:
            here = "" if name == "weights_sha256" else f" ({made[name]}, this run's has {sees[name]})"
            raise InputError(
                f"maps {config.maps!r} were made with another teacher: its {name} differs{here}; give the teacher that "
                "they were made with, or drop --maps"
            )
    if found.n != len(data.mapped):
        more = f" and {config.unlabeled!r} give" if config.unlabeled else " gives"
        raise InputError(
            f"maps {config.maps!r} are of {found.n} images, split {config.train_split!r}{more} {len(data.mapped)} to "
            "this run; give the store of these images, or drop --maps"
        )
    wanted: dict[str, Any] = {**vars(config.ig_options()), "engine": config.engine, "map_size": config.map_size}
    flags = {name: f"map_{name}" for name in ("method", "baseline", "target", "output", "reduction")}
    there = {**vars(found.options), "engine": found.engine, "map_size": found.map_size}
    for name, value in wanted.items():
        if there[name] != value:
            flag = flags.get(name, name)
            raise InputError(
                f"maps {config.maps!r} were made with {flag} {there[name]}, this run asks for {value}; set {flag} to "
                f"{'none' if there[name] is None else there[name]}, or drop --maps"
            )
    if config.stored_logits:
        store.require_logits()
