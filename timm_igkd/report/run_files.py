"""The files of a finished run that the report page is made from; a missing or damaged one is named."""

import csv
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from timm_igkd.data.labels import readable_names
from timm_igkd.errors import InputError, MissingFileError, first_line
from timm_igkd.evaluation.metrics import Evaluation
from timm_igkd.files import read_mapping, refuse_special, write_atomic
from timm_igkd.maps.manifest import Provenance, read_provenance

History = Mapping[str, np.ndarray]
_NUMBERS = ("top1", "top5", "loss", "ece", "num_parameters", "macs", "n")


@dataclass(frozen=True)
class Predictions:
    """Labels and logits over the dataset's classes, as `write_predictions` stores them; WordNet ids in words."""

    labels: np.ndarray
    student_logits: np.ndarray
    teacher_logits: np.ndarray | None
    class_names: list[str]


def read_maps(run_dir: Path) -> Provenance | None:
    """Read the provenance of a run's maps; None for a run without."""
    return read_provenance(run_dir / "maps") if (run_dir / "maps" / "provenance.json").exists() else None


def read_metrics(path: Path, optional: bool = False) -> dict[str, Any]:
    """Read the metrics of an evaluation, as `write_metrics` wrote them; an optional file that is absent is empty.

    Raises:
        InputError: a number that every evaluation has is missing, or no number; the student's, or its teacher's.
    """
    if optional and not path.exists():
        return {}
    found = read_mapping(path)
    _check_metrics(found, str(path))
    if found.get("teacher"):
        _check_metrics(found["teacher"], f"{path}, teacher")
    return found


def _check_metrics(found: Any, where: str) -> None:
    for name in _NUMBERS:
        value = found.get(name) if isinstance(found, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where} must hold the number {name}, found {value!r}; delete it and run again")


def read_history(path: Path) -> History:
    """Read a CSV of numbers into one array per column; an empty field is NaN."""
    refuse_special(path)
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); delete it and run again") from error
    if not rows:
        raise InputError(f"{path} has no epoch; delete it and run again")
    try:
        return {key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0] if key}
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} must hold numbers ({error}); delete it and run again") from error


def read_predictions(path: Path) -> Predictions:
    """Read what `write_predictions` wrote."""
    if not path.exists():
        raise MissingFileError(f"{path} is missing, expected a finished run; run the recipe again to complete it")
    refuse_special(path)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        message = f"{path} is no archive of predictions ({first_line(error)}); delete it and run again"
        raise InputError(message) from error
    missing = {"labels", "student_logits", "class_names"} - set(arrays)
    if missing:
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}; delete it and run again")
    names = readable_names([str(name) for name in arrays["class_names"].ravel()])
    found = Predictions(arrays["labels"], arrays["student_logits"], arrays.get("teacher_logits"), names)
    for logits in (found.student_logits, found.teacher_logits):
        if logits is not None and logits.shape != (len(found.labels), len(names)):
            raise InputError(
                f"{path} must hold logits {(len(found.labels), len(names))}, found {logits.shape}; "
                "delete it and run again"
            )
    return found


def write_predictions(
    path: str | Path,
    evaluation: Evaluation,
    class_names: Sequence[str],
    *,
    class_indices: Sequence[int] | None = None,
    teacher_class_indices: Sequence[int] | None = None,
) -> None:
    """Write labels and logits over the dataset's classes as an .npz file, which the report page reads."""

    def columns(logits: Tensor, indices: Sequence[int] | None) -> np.ndarray:
        return (logits if indices is None else logits[:, list(indices)]).numpy()

    arrays: dict[str, Any] = {
        "labels": evaluation.labels.numpy(),
        "student_logits": columns(evaluation.logits, class_indices),
        "class_names": np.array(list(class_names), dtype=np.str_),
    }
    if evaluation.teacher_logits is not None:
        arrays["teacher_logits"] = columns(evaluation.teacher_logits, teacher_class_indices)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomic(Path(path), buffer.getvalue())
