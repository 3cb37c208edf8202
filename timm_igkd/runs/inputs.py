"""What the stages of a run read, as hashes: a stage is known by its settings and by these."""

from functools import cached_property
from typing import Any

from torch import nn

from timm_igkd.errors import InputError
from timm_igkd.files import hash_files
from timm_igkd.maps.build import source_teacher
from timm_igkd.maps.store import MapStore
from timm_igkd.models.checkpoint import start_files
from timm_igkd.runs.data import RunData
from timm_igkd.runs.folder import RunFolder
from timm_igkd.runs.settings import RunConfig, StageName


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
            trained = {"training images": self._train, "validation images": self._validation}
            return (trained if self.config.teacher_epochs > 0 else {}) | self._teacher_start
        if stage == "maps":
            return {"training images": self._train, "teacher": self._model("teacher")}
        if stage == "student":
            read = {"training images": self._train, "validation images": self._validation}
            return read | {"teacher": self._model("teacher"), "maps": self._maps} | self._student_start
        if stage == "evaluate":
            return {"test images": self._test, "teacher": self._model("teacher"), "student": self._model("student")}
        return {"predictions": hash_files([self.folder.predictions])}  # metrics.json still gets the stages' times

    @cached_property
    def _train(self) -> str:
        return self.data.train.content_hash()

    @cached_property
    def _validation(self) -> str:
        is_apart = self.config.validation_split is not None and self.data.validation is not None
        return self.data.validation.content_hash() if is_apart and self.data.validation is not None else ""

    @cached_property
    def _test(self) -> str:
        return self.data.test.content_hash()

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
        return hash_files(sorted(self.folder.maps.glob("data/*.parquet")))


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
    if found.n != len(data.train):
        raise InputError(
            f"maps {config.maps!r} are of {found.n} images, split {config.train_split!r} gives {len(data.train)} to "
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
