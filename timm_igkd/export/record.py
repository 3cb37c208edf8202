"""What an export says of itself, export.json: one reader and one writer."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from timm_igkd.data.items import dataset_name, first_part
from timm_igkd.environment import environment
from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.evaluation.latency import Timing
from timm_igkd.evaluation.onnx_file import OnnxMetadata, onnx_versions
from timm_igkd.export.budget import Budget
from timm_igkd.intervals import three_digits
from timm_igkd.records import read_record, write_record

Format = Literal["onnx", "onnx-int8"]
FILES: dict[Format, str] = {"onnx": "model.onnx", "onnx-int8": "model_int8.onnx"}
RECORD = "export.json"


@dataclass(frozen=True)
class Images:
    """Images that an export was calibrated or verified with; without a dataset it is noise."""

    n: int
    dataset: str | None = None
    split: str | None = None

    def told(self) -> str:
        """Return them in words."""
        return f"{self.n} image{'s' * (self.n != 1)} of {self.split or self.dataset or 'noise'}"


def images_of(dataset: Any, n: int) -> Images:
    """Return how a record names `n` images."""
    if dataset is None:
        return Images(n)
    return Images(n, dataset_name(dataset), getattr(first_part(dataset), "split", None))


def file_sha256(path: Path) -> str:
    """Return the hash by which a record knows a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class ExportedFile:
    """One file of an export.

    Attributes:
        format: of the file.
        file: its name in the export's folder.
        sha256: of its bytes.
        size_mb: in 10^6 bytes.
        top1: percent of `ExportRecord.verified_on`; None where no split was named to measure it.
        drop: points of top1 below PyTorch's.
        drop_low: lower end of its 95 % interval, paired over the images (`image_interval`).
        drop_high: upper end.
        agreement: percent of those images with PyTorch's answer.
        max_difference: largest difference of a logit from PyTorch's.
        latency_ms: of one image on one thread, in turn with the export's other files.
        runtime: that it was measured in.
        passed: no drop above `ExportRecord.max_drop`. Where accuracy was not measured: true where so few answers are
            others that it is hardly more (95 %, one-sided, for int8), else None, not known.
    """

    format: Format
    file: str
    sha256: str
    size_mb: float
    top1: float | None
    drop: float | None
    agreement: float
    max_difference: float
    latency_ms: Timing
    runtime: str
    passed: bool | None
    drop_low: float | None = None
    drop_high: float | None = None

    def is_in(self, folder: Path) -> bool:
        """Return whether a folder has it as it was written."""
        path = folder / FILES[self.format]
        return path.is_file() and file_sha256(path) == self.sha256

    def lost(self) -> str:
        """Return its drop in words, never as 0 where there is one."""
        return "0" if self.drop is None else f"{self.drop:.2f}" if abs(self.drop) >= 0.005 else three_digits(self.drop)

    def is_within(self, budget: Budget | None) -> bool:
        """Return whether it takes no more than a budget allows; true without one."""
        return budget is None or budget.allows(self.latency_ms.median, self.size_mb)


@dataclass(frozen=True)
class ExportSummary:
    """What a run's metrics.json says of one file; names as of `ExportedFile`.

    Attributes:
        latency_ms: median.
        recommended: the fastest of the files that passed and are within the budget.
        is_within_budget: as the student was chosen for one; true without.
    """

    format: Format
    file: str
    size_mb: float
    top1: float | None
    agreement: float
    latency_ms: float
    runtime: str
    passed: bool | None = True
    recommended: bool = False
    is_within_budget: bool = True


@dataclass(frozen=True)
class Quantisation:
    """How a file was made int8: onnxruntime's static quantisation, see `int8.quantise`.

    Attributes:
        calibrated_on: images evenly spread over a split, see `int8.spread_indices`.
        compared_on: as many others, likewise, which decide `float_edges`.
        float_edges: the first and the last layers stay in float, which lowers the divergence by a tenth or more.
        divergence: mean KL(PyTorch || file) in nats with all layers in int8, on `compared_on`.
        divergence_float_edges: the same with the first and the last in float.
    """

    calibrated_on: Images
    compared_on: Images
    float_edges: bool
    divergence: float
    divergence_float_edges: float


@dataclass(frozen=True)
class ExportRecord:
    """A student's export.

    Attributes:
        model: how the student was named.
        weights_sha256: of the PyTorch model, see `weights_hash`.
        opset: of ONNX.
        metadata: what the files say of themselves.
        verified_on: the images that `agreement` and `max_difference` are of, and `top1` where it was measured.
        pytorch_top1: percent of the PyTorch model, where it was measured.
        max_drop: points of top1 that a file may lose.
        quantisation: None without an int8 file.
        exports: the files.
        recommended: the fastest file that passed and is within the budget; None where none is.
        passed: no file lost more than it may.
        environment: versions and hardware.
        budget: that the student was chosen for, or None.
    """

    model: str
    weights_sha256: str
    opset: int
    metadata: OnnxMetadata
    verified_on: Images
    pytorch_top1: float | None
    max_drop: float
    quantisation: Quantisation | None
    exports: tuple[ExportedFile, ...]
    recommended: Format | None
    passed: bool
    environment: Mapping[str, str | int | None]
    budget: Budget | None = None

    def metrics(self) -> list[dict[str, Any]]:
        """Return the entry `exports` of a run's metrics.json."""
        left_out = {"is_within_budget"} if self.budget is None else set()
        return [
            {name: value for name, value in asdict(summary).items() if name not in left_out}
            for summary in self.summaries()
        ]

    def summaries(self) -> list[ExportSummary]:
        """Return what a run's metrics.json says of each file."""
        names = ("format", "file", "size_mb", "top1", "agreement", "runtime", "passed")
        return [
            ExportSummary(
                **{name: getattr(file, name) for name in names},
                latency_ms=file.latency_ms.median,
                recommended=file.format == self.recommended,
                is_within_budget=file.is_within(self.budget),
            )
            for file in self.exports
        ]

    def sentences(self, folder: Path) -> list[str]:
        """Return what people are told: one line a file of the export's folder, and which one to take."""
        return [f"{folder / file.file}: {self._told(file)}" for file in self.exports] + [self._recommendation()]

    def _told(self, file: ExportedFile) -> str:
        images = self.verified_on
        top1 = "" if file.top1 is None else f"top1 {file.top1:.2f} % (PyTorch {self.pytorch_top1:.2f} %{_ends(file)}), "
        return (
            f"{three_digits(file.size_mb)} MB, {top1}PyTorch's answer on {file.agreement:.2f} % of {images.told()}, "
            f"largest difference {file.max_difference:.2g}, {three_digits(file.latency_ms.median)} ms"
            + ("" if file.is_within(self.budget) else f", over the budget of {self.budget}")
        )

    def _recommendation(self) -> str:
        times = {file.format: file.latency_ms.median for file in self.exports}
        unknown = "".join(
            f"; {file.file} {self._answers(file)} and its accuracy was not measured: name a split (--evaluate-split)"
            for file in self.exports
            if file.passed is None
        )
        if "onnx-int8" not in times:
            return f"recommended: {self.recommended or 'none'}{unknown}"
        ratio = times["onnx-int8"] / times["onnx"]
        slower = "as fast as" if f"{ratio:.2f}" == "1.00" else "slower than" if ratio > 1 else "faster than"
        lost = "".join(f"; {f.format} lost {f.lost()} points of top1" for f in self.exports if f.passed is False)
        of_time = f"int8 is {slower} float on this machine, {ratio:.2f} of its time"
        return f"recommended: {self.recommended or 'none'}; {of_time}{lost}{unknown}"

    def _answers(self, file: ExportedFile) -> str:
        """Return why equal and other answers do not tell whether a file loses too much."""
        n = self.verified_on.n
        if differing := round(n * (1 - file.agreement / 100)):
            return f"answers otherwise on {differing} of {self.verified_on.told()}"
        return f"answers the same on {self.verified_on.told()}, too few to tell"


def _ends(file: ExportedFile) -> str:
    """Return how far the drop can be from the one that was seen, as far as it was measured."""
    if file.drop is None or file.drop_low is None or file.drop_high is None:
        return ""
    return f"; {file.drop:.2f} points lost, 95 % interval {file.drop_low:.2f} to {file.drop_high:.2f}"


def onnx_environment() -> dict[str, str | int | None]:
    """Return versions and hardware, those of onnxruntime and its companions too."""
    found = {key: value for key, value in environment().items() if not isinstance(value, list)}
    return found | onnx_versions()


def write_export_record(folder: Path, record: ExportRecord) -> None:
    """Write export.json, which comes last: a folder that has one is complete."""
    write_record(folder / RECORD, record)


def exported_before(folder: Path) -> list[str]:
    """Return the files of an earlier export that are in a folder as it wrote them; others are somebody else's."""
    try:
        found = read_export_record(folder)
    except (InputError, MissingFileError):
        return []
    return [FILES[file.format] for file in found.exports if file.is_in(folder)]


def read_export_record(folder: str | Path) -> ExportRecord:
    """Read the export.json of an export's folder.

    Raises:
        MissingFileError: no such file. InputError: it is damaged.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise MissingFileError(f"{str(folder)!r} has no {RECORD}; export the student with: timm-igkd export")
    return read_record(ExportRecord, path)
