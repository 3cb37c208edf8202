"""The rows of a study: one CSV line per run, predictions beside it; several processes and machines add to them.

<output_dir>/results.csv        one row per run, in the order they were finished
<output_dir>/predictions.npz    `<config_hash>-<seed>`: predicted class of every test image; `labels`: theirs; [n] uint8
"""

import csv
import io
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from studies.origins import Origin, decided
from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from timm_igkd.files import exclusive, open_arrays, write_atomic

RunKey = tuple[str, int]

CORRUPTION_COLUMNS = [f"corruption/{kind}/{severity}" for kind in CORRUPTIONS for severity in SEVERITIES]
COLUMNS = [
    *"study cell config_hash seed commit hardware device versions settings started wall_time_s".split(),
    *"train_images_per_s n_train epochs data_hash transfer_hash teacher_hash maps_hash maps_means".split(),
    *"train_loss diverged_epoch n_left_out".split(),
    *"n_test top1 top5 loss ece agreement teacher_kl teacher_top1".split(),
    *"num_parameters macs compression latency_ms_1 latency_ms_64 latency_threads".split(),
    *"teacher_macs teacher_latency_ms_1 teacher_latency_ms_64 teacher_transfer_top1".split(),
    *"corruption_top1 corruption_n".split(),
    *CORRUPTION_COLUMNS,
    *"transfer_top1 transfer_balanced_top1 transfer_n transfer_per_class".split(),
    *"ig_correlation ig_correlation_n".split(),
]

BETWEEN = "; "
"""Stands between commits or machines of a run of several sessions."""

_ADDED = ("diverged_epoch", "n_left_out", "maps_hash", "maps_means", "transfer_hash")
"""Columns that came after the first rows: files without them are read, the values are empty."""


class StudyRows:
    """The CSV of one study's output folder.

    Args:
        folder: created where it is missing.
        same_maps: hashes of maps that are taken as the same, see `Origin.check_beside`.
    """

    def __init__(self, folder: str | Path, same_maps: Collection[str] = ()):
        self.folder = Path(folder)
        self.same_maps = same_maps
        self.path = self.folder / "results.csv"
        self.predictions_path = self.folder / "predictions.npz"

    def read(self) -> list[dict[str, str]]:
        """Return all rows as text, empty where a metric was not measured.

        Raises:
            InputError: a file with other columns, a line that is not whole, or a run that is there twice.
        """
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        named = reader.fieldnames or []
        if missing := [name for name in COLUMNS if name not in named and name not in _ADDED]:
            raise InputError(f"{self.path} lacks column {missing[0]!r}; it is no study's results of this version")
        if unknown := [name for name in named if name not in COLUMNS]:
            raise InputError(
                f"{self.path} has a column {unknown[0]!r} that this version does not know; it is of a newer one: use "
                "that, or another output_dir"
            )
        for number, row in enumerate(rows, 1):
            if None in row or None in row.values() or not row["seed"].isdecimal():
                raise InputError(
                    f"run {number} of {self.path} is not whole: as many values as columns, its seed a number; restore "
                    "the file, or delete the line and repeat the run"
                )
        rows = [dict.fromkeys(_ADDED, "") | row for row in rows]
        for key, count in Counter(key_of(row) for row in rows).items():
            if count > 1:
                raise InputError(f"{self.path} has run {key[0]} seed {key[1]} {count} times; remove the others")
        return rows

    def run_keys(self) -> set[RunKey]:
        """Return (config hash, seed) of all runs that are there."""
        return {key_of(row) for row in self.read()}

    def check(self, row: dict[str, Any]) -> None:
        """Raise InputError where a run that is about to begin could not stand beside those that are there."""
        origin = Origin.of(as_text(row))
        others = {Origin.of(there) for there in self.read()}
        same_maps = decided({origin, *others}, self.same_maps)
        for other in others:
            origin.check_beside(other, self.path, same_maps)

    def add(self, row: dict[str, Any], predictions: np.ndarray | None, labels: np.ndarray) -> bool:
        """Add a run with its predictions, atomically; a run that is there already is left as it is.

        Args:
            row: by column; what was not measured is left out.
            predictions: [n] classes, or None of a run that diverged.
            labels: [n] of the images.

        Returns:
            Whether it was added.

        Raises:
            InputError: the row's images, teacher, maps, device, precision or compilation are not those that are there.
        """
        text = as_text(row)
        arrays = {} if predictions is None else {entry_of(key_of(text)): predictions, "labels": labels}
        return self._add([text], arrays) == 1

    def merge(self, other: str | Path, wanted: Collection[RunKey] | None = None) -> int:
        """Take the runs of another output folder that are not here yet; return how many.

        Args:
            other: the folder.
            wanted: take these alone; None: all.

        Raises:
            MissingFileError: no results there. InputError: they are of other origin, or of two that do not go together.
        """
        source = StudyRows(other)
        if not source.path.exists():
            raise MissingFileError(f"no results to merge: {str(source.path)!r} does not exist")
        there = self.run_keys()
        new = [row for row in source.read() if key_of(row) not in there and (wanted is None or key_of(row) in wanted)]
        arrays = {entry_of(key_of(row)): source.predictions(key_of(row)) for row in new if not row["diverged_epoch"]}
        if arrays:
            arrays["labels"] = source.labels()
        return self._add(new, arrays)

    def predictions(self, key: RunKey) -> np.ndarray:
        """Return a run's predicted classes, [n] uint8 (uint16 beyond 256 classes)."""
        return self._load(entry_of(key))

    def labels(self) -> np.ndarray:
        """Return the labels of the images that all runs predicted, [n] uint8 (uint16)."""
        return self._load("labels")

    def _add(self, new: list[dict[str, str]], arrays: Mapping[str, np.ndarray]) -> int:
        """Add those rows that are not there yet, after the arrays they need; return how many."""
        with exclusive(self.folder / ".lock"):
            rows = self.read()
            there = {key_of(row) for row in rows}
            added = [row for row in new if key_of(row) not in there]
            origins = {Origin.of(row) for row in rows}
            same_maps = decided({*origins, *map(Origin.of, added)}, self.same_maps)
            for row in added:
                origin = Origin.of(row)
                for other in origins:
                    origin.check_beside(other, self.path, same_maps)
                origins.add(origin)
            rows += added
            if added:
                of_added = {"labels", *(entry_of(key_of(row)) for row in added)}  # the others belong to rows that stay
                self._write_arrays({name: array for name, array in arrays.items() if name in of_added})
                self._write(rows)
        return len(added)

    def _load(self, name: str) -> np.ndarray:
        with self._archive() as archive:
            if name not in archive.files:
                raise MissingFileError(
                    f"{str(self.predictions_path)!r} lacks the entry {name!r}, which {self.path.name} needs; restore "
                    "the file, or delete the run's row and repeat it"
                )
            return archive[name]

    def _write_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Put arrays into the archive; an entry of a run that was killed before its row was written is replaced."""
        if not arrays:
            return
        kept: dict[str, np.ndarray] = {}
        if self.predictions_path.exists():
            with self._archive() as archive:
                kept = dict(archive)
        buffer = io.BytesIO()
        entries: dict[str, Any] = kept | {name: _narrow(it) for name, it in arrays.items()}
        np.savez_compressed(buffer, **entries)
        write_atomic(self.predictions_path, buffer.getvalue())

    def _archive(self) -> AbstractContextManager[Any]:
        """Open the file of predictions; what is wrong with it is one line."""
        path = self.predictions_path
        if not path.exists():
            raise MissingFileError(f"{str(path)!r} does not exist; {self.path} needs it: restore it")
        return open_arrays(path, f"restore it, or delete it and {self.path.name} and repeat the runs")

    def _write(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path, text.getvalue().encode())


def as_text(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row as it is written: all columns, empty where nothing was measured."""
    unknown = row.keys() - set(COLUMNS)
    assert not unknown, unknown
    return {name: "" if row.get(name) is None else str(row[name]) for name in COLUMNS}


def key_of(row: Mapping[str, Any]) -> RunKey:
    """Return (config hash, seed) of a row."""
    return str(row["config_hash"]), int(row["seed"])


def entry_of(key: RunKey) -> str:
    """Return the name of a run's predictions in the file of all."""
    return f"{key[0]}-{key[1]}"


def _narrow(classes: np.ndarray) -> np.ndarray:
    return np.asarray(classes).astype(np.uint8 if np.max(classes) < 256 else np.uint16)
