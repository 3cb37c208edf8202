"""The rows of a study: one CSV line per run, predictions beside it; several processes and machines add to them.

<output_dir>/results.csv        one row per run, in the order they were finished
<output_dir>/predictions.npz    `<config_hash>-<seed>`: predicted class of every test image; `labels`: theirs; [n] uint8
<output_dir>/maps.npz           some of the maps the runs read, see map_samples.py
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from studies.arrays import ArrayFile
from studies.map_samples import MapSamples, Sample, are_same_but_for_rounding
from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from timm_igkd.files import exclusive, write_atomic

RunKey = tuple[str, int]

CORRUPTION_COLUMNS = [f"corruption/{kind}/{severity}" for kind in CORRUPTIONS for severity in SEVERITIES]
COLUMNS = [
    *"study cell config_hash seed commit hardware device versions settings started wall_time_s".split(),
    *"train_images_per_s n_train epochs data_hash teacher_hash maps_hash train_loss diverged_epoch n_left_out".split(),
    *"n_test top1 top5 loss ece agreement teacher_kl teacher_top1".split(),
    *"num_parameters macs compression latency_ms_1 latency_ms_64 latency_threads".split(),
    *"teacher_macs teacher_latency_ms_1 teacher_latency_ms_64 teacher_transfer_top1".split(),
    *"corruption_top1 corruption_n".split(),
    *CORRUPTION_COLUMNS,
    *"transfer_top1 transfer_balanced_top1 transfer_n transfer_per_class".split(),
    *"ig_correlation ig_correlation_n".split(),
]

_ADDED = ("diverged_epoch", "n_left_out", "maps_hash")
"""Columns that came after the first rows: files without them are read, the values are empty."""


class StudyRows:
    """The CSV of one study's output folder.

    Args:
        folder: created where it is missing.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / "results.csv"
        self.predictions_path = self.folder / "predictions.npz"
        self._predictions = ArrayFile(self.predictions_path, self.path)
        self._samples = MapSamples(self.folder, self.path)

    def read(self) -> list[dict[str, str]]:
        """Return all rows as text, empty where a metric was not measured.

        Raises:
            InputError: a file with other columns, or a run that is there twice.
        """
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or []) and name not in _ADDED]
        rows = [dict.fromkeys(_ADDED, "") | row for row in rows]
        if missing:
            raise InputError(f"{self.path} lacks column {missing[0]!r}; it is no study's results of this version")
        for key, count in Counter(key_of(row) for row in rows).items():
            if count > 1:
                raise InputError(f"{self.path} has run {key[0]} seed {key[1]} {count} times; remove the others")
        return rows

    def run_keys(self) -> set[RunKey]:
        """Return (config hash, seed) of all runs that are there."""
        return {key_of(row) for row in self.read()}

    def check(self, row: dict[str, Any], sample: Sample | None = None) -> None:
        """Raise InputError where a run that is about to begin could not stand beside those that are there.

        Args:
            row: by column, without metrics.
            sample: of the maps it reads, kept beside the rows.
        """
        new = _as_text(row)
        with exclusive(self.folder / ".lock"):
            samples = {new["maps_hash"]: sample} if sample else {}
            for other in self.read():
                self._check_beside(other, new, samples)
            self._samples.add(samples)

    def add(self, row: dict[str, Any], predictions: np.ndarray | None, labels: np.ndarray) -> bool:
        """Add a run with its predictions, atomically; a run that is there already is left as it is.

        Args:
            row: by column; what was not measured is left out.
            predictions: [n] classes, or None of a run that diverged.
            labels: [n] of the images.

        Returns:
            Whether it was added.

        Raises:
            InputError: the row's data, teacher, device, precision or compilation are not those of the rows there.
        """
        text = _as_text(row)
        arrays = {} if predictions is None else {entry_of(key_of(text)): predictions, "labels": labels}
        return self._add([text], arrays) == 1

    def merge(self, other: str | Path) -> int:
        """Take the runs of another output folder that are not here yet; return how many.

        Raises:
            MissingFileError: no results there. InputError: they are of other data.
        """
        source = StudyRows(other)
        if not source.path.exists():
            raise MissingFileError(f"no results to merge: {str(source.path)!r} does not exist")
        there = self.run_keys()
        new = [row for row in source.read() if key_of(row) not in there]
        arrays = {entry_of(key_of(row)): source.predictions(key_of(row)) for row in new if not row["diverged_epoch"]}
        if arrays:
            arrays["labels"] = source.labels()
        hashes = {row["maps_hash"] for row in new} - {""}
        return self._add(new, arrays, {maps_hash: source._samples.read(maps_hash) for maps_hash in hashes})

    def predictions(self, key: RunKey) -> np.ndarray:
        """Return a run's predicted classes, [n] uint8 (uint16 beyond 256 classes)."""
        return self._predictions.read(entry_of(key))

    def labels(self) -> np.ndarray:
        """Return the labels of the images that all runs predicted, [n] uint8 (uint16)."""
        return self._predictions.read("labels")

    def _add(
        self,
        new: list[dict[str, str]],
        arrays: Mapping[str, np.ndarray],
        samples: Mapping[str, Sample] = MappingProxyType({}),
    ) -> int:
        """Add those rows that are not there yet, after the arrays they need; return how many."""
        with exclusive(self.folder / ".lock"):
            rows = self.read()
            there = {key_of(row) for row in rows}
            added = [row for row in new if key_of(row) not in there]
            for row in added:
                for other in rows:
                    self._check_beside(other, row, samples)
                rows.append(row)
            if added:
                self._samples.add(samples)
                # an entry of a run that was killed before its row was written is replaced
                self._predictions.add({name: _narrow(array) for name, array in arrays.items()})
                self._write(rows)
        return len(added)

    def _check_beside(self, row: dict[str, str], new: dict[str, str], samples: Mapping[str, Sample]) -> None:
        """Check a new run against one that is there; `samples` are those of the new run's maps."""
        for name, what in (("data_hash", "images"), ("teacher_hash", "teacher")):
            if row[name] and new[name] and row[name] != new[name]:
                raise InputError(f"{self.path} holds runs with {_other(what, name, row, new)}")
        here, there = row["maps_hash"], new["maps_hash"]
        if here and there and here != there and _map_method(row) == _map_method(new):
            known, sample = self._samples.read(here), samples.get(there) or self._samples.read(there)
            if not known or not sample:
                raise InputError(
                    f"{self.path} holds runs with {_other('maps', 'maps_hash', row, new)}, or copy those maps here; "
                    "without a sample of both in maps.npz rounding cannot be told from other maps"
                )
            if not are_same_but_for_rounding(known, sample):
                raise InputError(f"{self.path} holds runs with {_other('maps', 'maps_hash', row, new)}")
        if _numerics(row) != _numerics(new):
            raise InputError(
                f"{self.path} holds runs with {_numerics(row)}, this run has {_numerics(new)}; runs that are compared "
                "must be computed alike: start it as the others were, or give another output_dir"
            )

    def _write(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path, text.getvalue().encode())


def _as_text(row: dict[str, Any]) -> dict[str, str]:
    unknown = row.keys() - set(COLUMNS)
    assert not unknown, unknown
    return {name: "" if row.get(name) is None else str(row[name]) for name in COLUMNS}


def key_of(row: dict[str, Any]) -> RunKey:
    """Return (config hash, seed) of a row."""
    return str(row["config_hash"]), int(row["seed"])


def entry_of(key: RunKey) -> str:
    """Return the name of a run's predictions in the file of all."""
    return f"{key[0]}-{key[1]}"


def _narrow(classes: np.ndarray) -> np.ndarray:
    return np.asarray(classes).astype(np.uint8 if np.max(classes) < 256 else np.uint16)


def _other(what: str, name: str, row: dict[str, str], new: dict[str, str]) -> str:
    return f"other {what} ({name} {row[name]}, this run's is {new[name]}); give another output_dir"


def _map_method(row: dict[str, str]) -> str:
    """Return the method of the maps whose hash a row holds; ig where its cell reads none, or logits alone."""
    cell = json.loads(row["settings"] or "{}").get("cell", {})
    uses = cell.get("overlay_prob", 0) > 0 or cell.get("explanation_loss_weight", 0) > 0
    return cell.get("map_method", "ig") if uses else "ig"


def _numerics(row: dict[str, str]) -> str:
    """Return in words how a run was computed: what moves numbers and is no setting of its cell."""
    versions = json.loads(row["versions"] or "{}")
    return f"device {row['device']}, precision {versions.get('precision')}, compile {versions.get('compile', 'none')}"
