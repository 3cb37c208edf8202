"""The folder of a run: where each of its files lies, and what its stages read, as hashes."""

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import xxhash
from accelerate import Accelerator
from timm.models import get_model_input_config
from torch import nn

from timm_igkd.errors import InputError
from timm_igkd.export.budget import Budget
from timm_igkd.export.record import FILES, RECORD, Format
from timm_igkd.export.students import RECORD as STUDENTS
from timm_igkd.export.students import StudentsRecord, find_students, read_students
from timm_igkd.files import MARKERS, exclusive, hash_files, remove_abandoned
from timm_igkd.maps.scores import SCORE
from timm_igkd.models.checkpoint import start_files
from timm_igkd.records import remove_written_apart
from timm_igkd.runs.checks import CLASS_NAMES
from timm_igkd.runs.data import RunData
from timm_igkd.runs.settings import RunConfig, StageName
from timm_igkd.runs.stages import is_same_setting
from timm_igkd.training.accelerator import on_main


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
    def trackers(self) -> Path:
        """Where tensorboard's files go, in a folder by the run's name."""
        return self.path / "trackers"

    @property
    def page(self) -> Path:
        """The report."""
        return self.path / "report" / "index.html"

    def model(self, name: str) -> Path:
        """Return the timm folder of the teacher or student."""
        return (self.shared or self.path if name == "teacher" else self.path) / name

    def model_files(self, name: str) -> list[Path]:
        """Return what makes a timm folder."""
        return [self.model(name) / file for file in ("config.json", "model.safetensors")]

    def exported(self, formats: Collection[Format]) -> list[Path]:
        """Return the files of an export in some formats, the record first."""
        return [self.export / file for file in (RECORD, *(FILES[format] for format in sorted({"onnx", *formats})))]

    def arm(self, name: str) -> "RunFolder":
        """Return the folder of an arm."""
        return RunFolder(self.path / "arms" / name, shared=self.path)

    def history(self, name: str) -> Path:
        """Return the CSV of a training's epochs."""
        return self.path / f"{name}_history.csv"

    def budget(self) -> Budget | None:
        """Return the budget that the run's student was chosen for, None where it was not chosen for one."""
        return read_students(self.students).budget if self.students.exists() else None

    def checkpoint(self, name: str) -> Path:
        """Return the file that an unfinished training goes on from."""
        return self.path / f"{name}_training" / "last.pt"

    def remove_unfinished(self, pending: Collection[str]) -> None:
        """Drop what killed or lost stages left, so that nothing unfinished looks complete; other files stay.

        A link to maps stays until others take its place: those it leads to may come back.
        """
        for name in {"teacher", "student"}.intersection(pending):
            for path in self.model_files(name):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not there, or not empty
                self.model(name).rmdir()
            remove_written_apart(self.path, name)
        if "export" in pending:
            for folder in (self.path, self.export):
                remove_written_apart(folder, "export")
        remove_abandoned(self.path)

    def refuse_foreign(self) -> None:
        """Raise InputError for a folder that holds something and no run's stages: a run would overwrite it."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{str(self.path)!r} is a file, expected a run's folder; choose another --name")
        names = sorted(path.name for path in self.path.iterdir()) if self.path.exists() else []
        if (others := [name for name in names if name != ".lock"]) and MARKERS not in names:
            raise InputError(
                f"{str(self.path)!r} holds {others[0]!r} but no run; choose another --name or --output-dir"
            )

    def has_begun(self) -> bool:
        """Return whether any stage of a run has begun here."""
        return any((self.path / MARKERS).glob("*.json"))

    def claim(self) -> None:
        """Make the folder a run's, see `refuse_foreign`."""
        (self.path / MARKERS).mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run's lock; raise InputError where another process has it."""
        with exclusive(self.path / ".lock", wait=False) as is_mine:
            if not is_mine:
                raise InputError(f"another process is at work on {self.path}; wait, or give another --name")
            yield

    @contextlib.contextmanager
    def telling_of_others(self) -> Iterator[None]:
        """Where an InputError is raised and another process is at work here, say so: its half is not left over."""
        try:
            yield
        except InputError:
            if (self.path / ".lock").exists():
                with contextlib.suppress(OSError), self.held():  # a folder that may not be written
                    pass
            raise

    def link_maps(self, store: Path) -> None:
        """Let `maps` lead to a store elsewhere, in place of a link; raise InputError for maps of the run's own."""
        if self.maps.is_dir() and not self.maps.is_symlink():
            raise InputError(f"{str(self.maps)!r} holds maps of an earlier run; choose another --name, or delete it")
        link = self.path / f".maps-{secrets.token_hex(4)}.tmp"
        link.symlink_to(store.resolve(), target_is_directory=True)
        os.replace(link, self.maps)


class RunInputs:
    """Hashes of images, models and maps, computed where a stage asks for them.

    Args:
        config: the run's settings.
        data: its images.
        folder: its files.
    """

    def __init__(self, config: RunConfig, data: RunData, folder: RunFolder):
        self.config, self.data, self.folder = config, data, folder
        self._start = cache(self._start_hash)

    def of(self, stage: StageName) -> dict[str, str]:
        """Return what a stage reads, by name as a message calls it; what is not there yet has an empty hash."""
        names = {CLASS_NAMES: xxhash.xxh3_128_hexdigest(json.dumps(self.data.train.class_names).encode())}
        if stage == "teacher":
            return names | (self._fitted if self.config.teacher_epochs > 0 else {}) | self._start("teacher")
        if stage == "maps":
            made = {"training images": self.data.train_hash, "teacher": self._model("teacher")}
            return names | made | self._unlabeled
        if stage == "student":
            made = {"teacher": self._model("teacher"), "maps": self._maps}
            return names | self._fitted | made | self._unlabeled | self._start("student")
        if stage == "evaluate":
            models = {name: self._model(name) for name in ("teacher", "student")}
            return names | {"test images": self.data.test_hash} | models
        if stage == "export":
            images = {"training images": self.data.train_hash, "test images": self.data.test_hash}
            return images | {"student": self._model("student")}
        exported = {"exported files": hash_files([self.folder.export / RECORD])} if self.config.export else {}
        score = hash_files([self.folder.maps / SCORE]) if self.config.needs_maps else ""
        shown = exported | ({"score of the maps": score} if score else {})
        return {"predictions": hash_files([self.folder.predictions])} | shown  # metrics.json still gets the times

    @property
    def _fitted(self) -> dict[str, str]:
        return {"training images": self.data.train_hash, "validation images": self.data.validation_hash}

    @property
    def _unlabeled(self) -> dict[str, str]:
        return {} if self.config.unlabeled is None else {"unlabelled images": self.data.unlabeled_hash}

    def _start_hash(self, name: str) -> dict[str, str]:
        """Return the hash of the files that a model starts from, nothing where none is on this machine (any more)."""
        if getattr(self.config, f"{name}_init") != "pretrained":
            return {}
        files = start_files(getattr(self.config, name), getattr(self.config, f"{name}_checkpoint"))
        return {f"{name}'s files": found} if (found := hash_files(files)) else {}

    def _model(self, name: str) -> str:
        return hash_files(self.folder.model_files(name))

    @property
    def _maps(self) -> str:
        return hash_files(sorted(self.folder.maps.glob("data/*.parquet"))) if self.config.needs_maps else ""


def choose_student(
    config: RunConfig,
    create_teacher: Callable[[], nn.Module],
    num_classes: int,
    folder: RunFolder,
    accelerator: Accelerator,
) -> StudentsRecord:
    """Return students for the run's budget, the best first: those of a choice made before, else measured now.

    Args:
        config: of the run.
        create_teacher: makes its architecture.
        num_classes: of the dataset.
        folder: of the run, with the choice made before or without.
        accelerator: its main process measures for all.

    Raises:
        InputError: no student fits; the choice made before was for other settings.
    """
    return on_main(accelerator, lambda: _choose_student(config, create_teacher(), num_classes, folder.students))


def _choose_student(config: RunConfig, teacher: nn.Module, num_classes: int, chosen: Path) -> StudentsRecord:
    budget, uses_weights = config.budget(), config.student_init != "random"
    assert budget is not None
    if not chosen.exists():
        options: dict[str, Any] = {"num_classes": num_classes, "use_weights": uses_weights}
        record = find_students(teacher, budget, teacher_name=config.teacher, **options)
    else:
        record = read_students(chosen)
        side = get_model_input_config(teacher)["input_size"][-1]
        found = record.img_size, record.num_classes, record.use_weights, record.budget
        wanted = side, num_classes, uses_weights, budget
        if found != wanted or not is_same_setting("teacher", record.teacher, config.teacher):
            raise InputError(
                f"{str(chosen)!r} is a choice for {record.budget} of {record.teacher} at {record.img_size} px, not for "
                "the settings of now; name the student as config.yaml does, or choose another --name"
            )
    record.best()
    return record


def with_student(config: RunConfig, record: StudentsRecord) -> RunConfig:
    """Return the settings with the best student of a record in the place of auto.

    Both models then read images of the size that was measured.
    """
    best = record.best()
    own: dict[str, Any] = {"max_latency_ms": None, "max_size_mb": None}
    if best.drop:
        init = "random" if config.student_init == "random" else "teacher"
        own |= {"student": None, "student_drop": best.drop, "student_init": init}
    else:
        own |= {"student": best.name}
    if not config.teacher_init == config.student_init == "random":  # they would read images at their own size
        own |= {"img_size": record.img_size}
    return replace(config, **own)
