"""What the stages of a run read, as hashes: a stage is known by its settings and by these."""

from functools import cached_property
from pathlib import Path

from timm_igkd.files import hash_files
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
            return trained if self.config.teacher_epochs > 0 else {"teacher's files": self._source}
        if stage == "maps":
            return {"training images": self._train, "teacher": self._model("teacher")}
        if stage == "student":
            read = {"training images": self._train, "validation images": self._validation}
            return read | {"teacher": self._model("teacher"), "maps": self._maps}
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
    def _source(self) -> str:
        """Hash of the local files that a given teacher comes from; a name of timm or the Hub is a setting."""
        files = []
        source, _, rest = self.config.teacher.partition(":")
        if source == "local-dir" and Path(rest).is_dir():
            files += sorted(path for path in Path(rest).iterdir() if path.is_file() and path.suffix != ".md")
        if self.config.teacher_checkpoint is not None:
            files.append(Path(self.config.teacher_checkpoint))
        return hash_files(files)

    def _model(self, name: str) -> str:
        folder = self.folder.model(name)
        return hash_files([folder / "config.json", folder / "model.safetensors"])

    @property
    def _maps(self) -> str:
        return hash_files(sorted(self.folder.maps.glob("data/*.parquet")))
