"""The folder of a run: where each of its files lies."""

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from timm_igkd.files import remove_abandoned


@dataclass(frozen=True)
class RunFolder:
    """runs/<name> and what is in it.

    Attributes:
        path: of the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, hardware and command."""
        return self.path / "environment.json"

    @property
    def maps(self) -> Path:
        """The store of the training split's maps, or a link to the one that was given."""
        return self.path / "maps"

    @property
    def metrics(self) -> Path:
        """What the test split showed."""
        return self.path / "metrics.json"

    @property
    def predictions(self) -> Path:
        """Logits of the test images."""
        return self.path / "predictions.npz"

    @property
    def page(self) -> Path:
        """The report."""
        return self.path / "report" / "index.html"

    def model(self, name: str) -> Path:
        """Return the timm folder of the teacher or student."""
        return self.path / name

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
