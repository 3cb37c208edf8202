"""The files of a finished run that the report page is made from; a missing or damaged one is named."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from timm_igkd.data.labels import readable_names
from timm_igkd.errors import InputError, MissingFileError, first_line
from timm_igkd.evaluation.comparison import Comparison
from timm_igkd.evaluation.latency import Timing
from timm_igkd.evaluation.metrics import Evaluation, write_metrics
from timm_igkd.export.record import ExportSummary
from timm_igkd.files import open_arrays, read_mapping, refuse_special, write_atomic
from timm_igkd.maps.manifest import Provenance, read_provenance
from timm_igkd.records import parse_record

History = Mapping[str, np.ndarray]
_NUMBERS = ("top1", "top5", "loss", "ece", "num_parameters", "macs", "n")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model takes; latency by batch size, `batch_1` and `batch_64`."""

    num_parameters: int
    macs: float
    size_mb: float | None = None
    latency_ms: Mapping[str, Timing] = field(default_factory=dict)


@dataclass(frozen=True)
class Robustness:
    """Top-1 under corruption: the mean, and of each kind at severities 1 to 5; `n` images each."""

    top1: float
    n: int
    kinds: Mapping[str, tuple[float, float, float, float, float]]


@dataclass(frozen=True, kw_only=True)
class ModelMetrics(Sizes):
    """What `evaluate` measured of one model; None: it was not measured, or is not known."""

    top1: float
    top5: float
    loss: float
    ece: float
    n: int
    top1_subset: float | None = None
    top1_all_classes: float | None = None
    robustness: Robustness | None = None
    device: str | None = None
    threads: int | None = None
    hardware: str | None = None
    dataset: str | None = None
    split: str | None = None
    dataset_revision: str | None = None


@dataclass(frozen=True)
class TrainingImages:
    """How many images the student learnt from."""

    labeled: int
    unlabeled: int


@dataclass(frozen=True, kw_only=True)
class Metrics(ModelMetrics):
    """metrics.json of a run: its student beside its teacher, and what stages after the evaluation add."""

    teacher: ModelMetrics | None = None
    agreement: float | None = None
    teacher_kl: float | None = None
    compression: float | None = None
    needs_plugin: bool = True
    weights_sha256: str | None = None
    is_part: bool | None = None
    training_images: TrainingImages | None = None
    onnx_latency_ms: Mapping[str, Timing] = field(default_factory=dict)
    wall_time_s: Mapping[str, float] = field(default_factory=dict)
    exports: tuple[ExportSummary, ...] = ()
    arms: Comparison | None = None


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


def read_metrics(path: Path) -> Metrics:
    """Read what `write_metrics` wrote of a run; errors as of `parse_metrics`."""
    return parse_metrics(read_mapping(path), str(path))


def update_metrics(path: Path, more: Mapping[str, Any]) -> None:
    """Write more into a run's metrics.json, where it is not there yet; None takes an entry away.

    Errors as of `parse_metrics`.
    """
    content = read_mapping(path)
    parse_metrics(content, str(path))
    changed = {name: value for name, value in {**content, **more}.items() if value is not None}
    if changed != content:  # a finished run may lie where nothing can be written
        write_metrics(path, changed)


def parse_metrics(content: Any, where: str) -> Metrics:
    """Return what metrics.json holds of a run; entries that only another version knows are left out.

    Raises:
        InputError: a number that every evaluation has is missing, or an entry is not what it should be.
    """
    known = _known(Metrics, content, where)
    if "teacher" in known:
        known["teacher"] = _known(ModelMetrics, known["teacher"], f"{where}, teacher")
    return parse_record(Metrics, known, where)


def _known(kind: type[ModelMetrics], content: Any, where: str) -> dict[str, Any]:
    for name in _NUMBERS:
        value = content.get(name) if isinstance(content, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where} must hold the number {name}, found {value!r}; delete it and run again")
    return {item.name: content[item.name] for item in fields(kind) if content.get(item.name) not in (None, {}, [])}


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
    with open_arrays(path, "delete it and run again") as archive:
        arrays = {name: archive[name] for name in archive.files}
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
    teacher_class_indices: Sequence[int] | None = None,
) -> None:
    """Write labels and logits over the dataset's classes as an .npz file, which the report page reads."""
    arrays: dict[str, Any] = {
        "labels": evaluation.labels.numpy(),
        "student_logits": evaluation.logits.numpy(),
        "class_names": np.array(list(class_names), dtype=np.str_),
    }
    logits, indices = evaluation.teacher_logits, teacher_class_indices
    if logits is not None:
        arrays["teacher_logits"] = (logits if indices is None else logits[:, list(indices)]).numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomic(Path(path), buffer.getvalue())
