"""What a store says of itself: `Manifest`, written before the first shard, and `Provenance`, written after the last.

Both are JSON files (manifest.json, provenance.json) with the fields' names as keys; everything behind `read_manifest`
and `read_provenance` trusts them.
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from timm_igkd.attribution.chunk_gradient import Arithmetic
from timm_igkd.attribution.ig_options import OF_AUTO, Dtype, IGOptions
from timm_igkd.errors import InputError, check_choice, check_count, check_range
from timm_igkd.files import read_mapping
from timm_igkd.records import parse_record

FORMAT_VERSION = 2  # 1 hashed a row's map and scale alone
EngineName = Literal["captum", "fast"]
_REMEDY = "restore it, or delete the store and build it again with: timm-igkd maps"


def _note(**options: Any) -> Any:
    """Return a field that no resume is held against: it says how a build went, not what was asked for."""
    return field(metadata={"is_setting": False}, **options)


@dataclass(frozen=True, kw_only=True)
class SourceDataset:
    """The images that maps are of.

    Attributes:
        name: Hub id, folder or class of the dataset.
        split: its split; "unknown" where the dataset names none.
        revision: commit of a dataset on the Hub, None of any other.
        num_images: of the whole split.
        class_names: in label order, or None.
        content_hash: of the images and labels that have maps; None where the dataset cannot tell it.
        is_part: the images were chosen from the split, or put in another order; `num_images` counts the chosen ones.
    """

    name: str
    split: str
    revision: str | None = None
    num_images: int
    class_names: tuple[str, ...] | None = None
    content_hash: str | None = None
    is_part: bool = False

    def __post_init__(self) -> None:
        check_range("num_images", self.num_images, 1)


@dataclass(frozen=True, kw_only=True)
class SourceTeacher:
    """The model whose attributions maps are.

    Attributes:
        name: as it was asked for.
        architecture: timm's name, or None.
        weights_sha256: `models.loading.weights_hash`.
        input_size: (channels, H, W) that it was fed.
        mean: of its normalisation, per channel.
        std: of its normalisation, per channel.
        interpolation: that images were resized with, as timm names it. None, of a teacher whose `pretrained_cfg` had no
            entry, was written where that meant bilinear, and is read so; timm means bicubic, as we do now.
        num_classes: how many outputs it has.
        class_indices: its output for each class of the dataset; None: they are the same in the same order.
        answer: to a fixed image, see `teacher_copy.answer_to_noise`; by it other arguments are seen, which change no
            tensor. None in stores from before it was written.
    """

    name: str
    architecture: str | None
    weights_sha256: str
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str | None
    num_classes: int
    class_indices: tuple[int, ...] | None
    answer: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.interpolation is None:
            object.__setattr__(self, "interpolation", "bilinear")
        object.__setattr__(self, "num_classes", check_count("num_classes", self.num_classes))
        for index in self.class_indices or ():
            check_range("class_indices", index, 0, self.num_classes - 1)


@dataclass(frozen=True)
class Halving:
    """A chunk that the device's memory did not hold.

    Attributes:
        row: that was computed.
        chunk_size: from there on.
    """

    row: int
    chunk_size: int


@dataclass(frozen=True)
class Deviation:
    """What bfloat16 or compiling changes, measured on some images of the dataset against eager float32.

    Attributes:
        images: how many.
        relative: the worst map's difference, as a share of its norm.
        correlation: the least of a map with the float32 one.
    """

    images: int
    relative: float
    correlation: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Every setting that changes a number of a store's maps, and what they are of.

    Attributes:
        format: of the store's files.
        dataset: the images.
        teacher: the model.
        options: which gradients.
        engine: "fast" or "captum".
        n: rows of the store; fewer than the dataset has images: a prefix.
        map_size: side of the stored maps; None: the teacher's input size.
        logits: whether the teacher's logits are stored.
        shard_rows: rows per shard.
        versions: of the packages that made the store.
        chunk_size: (image, step) pairs per pass.
        batch_images: images attributed together.
        dtype: of weights and activations.
        compiled: whether gradients were compiled.
        kernel_error: what that dtype and compiling changed; None in eager float32.
        out_of_memory_halvings: of `chunk_size`, in order.
    """

    format: int = FORMAT_VERSION
    dataset: SourceDataset
    teacher: SourceTeacher
    options: IGOptions
    engine: EngineName
    n: int
    map_size: int | None
    logits: bool
    shard_rows: int
    versions: Mapping[str, str | None] = _note()
    chunk_size: int = _note()
    batch_images: int = _note()
    dtype: Dtype = "float32"
    compiled: bool = False
    kernel_error: Deviation | None = _note(default=None)
    out_of_memory_halvings: tuple[Halving, ...] = _note(default=())

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, ("captum", "fast"))
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if self.options.method != "ig" and self.engine == "captum":
            raise InputError(
                f"engine 'captum' is the reference of method 'ig' alone; take 'fast' for {self.options.method!r}"
            )
        if self.options.method in ("grad_cam", "none") and self.arithmetic != Arithmetic():
            what = "grad_cam is" if self.options.has_maps else "logits are"
            raise InputError(f"{what} computed in eager float32; leave dtype and compile out")
        if not self.options.has_maps and not self.logits:
            raise InputError("method 'none' makes no maps, so that logits are all there is to keep; set logits to true")
        if not self.options.has_maps and self.map_size is not None:
            raise InputError("map_size is of maps, method 'none' makes none; leave it out")
        if self.engine == "captum" and self.options.n_steps == "auto":
            raise InputError("n_steps 'auto' needs engine 'fast'; captum takes a whole number")
        if self.engine == "captum" and self.arithmetic != Arithmetic():
            raise InputError("engine 'captum' computes in eager float32; leave dtype and compile out, or take 'fast'")
        check_range("n", self.n, 1, self.dataset.num_images)
        for name in ("shard_rows", "chunk_size", "batch_images", "map_size"):
            if name != "map_size" or self.map_size is not None:
                object.__setattr__(self, name, check_count(name, getattr(self, name)))

    @property
    def arithmetic(self) -> Arithmetic:
        """How gradients are computed."""
        return Arithmetic(self.dtype, self.compiled)

    @property
    def map_shape(self) -> tuple[int, int]:
        """(H, W) of the stored maps; a `map_size` beyond the teacher's input changes nothing. (1, 1) without maps."""
        if not self.options.has_maps:
            return 1, 1
        height, width = self.teacher.input_size[1:]
        if self.map_size is None or (self.map_size >= height and self.map_size >= width):
            return height, width
        return self.map_size, self.map_size

    @property
    def num_logits(self) -> int:
        """How many logits a row holds, where the store has them: one per class of the dataset."""
        indices = self.teacher.class_indices
        return self.teacher.num_classes if indices is None else len(indices)

    @property
    def num_shards(self) -> int:
        """How many shards the store has when it is complete."""
        return -(-self.n // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """Return the rows of one shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.n))


@dataclass(frozen=True)
class Statistics:
    """A store's maps as numbers.

    Attributes:
        mean_steps: gradients spent on an image.
        converged: how many images are.
        abs_delta_median: of the absolute convergence delta.
        abs_delta_p90: its 90th percentile.
        constant_maps: how many have scale 0.
    """

    mean_steps: float
    converged: int
    abs_delta_median: float
    abs_delta_p90: float
    constant_maps: int


@dataclass(frozen=True, kw_only=True)
class Provenance(Manifest):
    """The manifest of a finished store, with what its rows are.

    Attributes:
        keys_hash: xxh3-128 of all keys in order, 32 hex digits.
        statistics: of the rows.
    """

    keys_hash: str
    statistics: Statistics


_Kind = TypeVar("_Kind", Manifest, Provenance)


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json of a store, finished or not.

    Raises:
        InputError: whatever is wrong with it. FileNotFoundError: there is none.
    """
    return _read(Manifest, folder / "manifest.json")


def read_provenance(folder: Path) -> Provenance:
    """Read provenance.json of a finished store; errors as of `read_manifest`."""
    return _read(Provenance, folder / "provenance.json")


def _read(kind: type[_Kind], path: Path) -> _Kind:
    content = read_mapping(path)
    found = content.get("format")
    if found == 1:
        raise InputError(
            f"{str(path)!r} is of format 1, whose rows have no hash of their own, expected {FORMAT_VERSION}; "
            f"build it again with: {_rebuilding_command(content)}"
        )
    if found != FORMAT_VERSION:
        raise InputError(
            f"{str(path)!r} is of format {str(found)[:20]!r}, expected {FORMAT_VERSION}; "
            "update timm-igkd, or build the store again with: timm-igkd maps"
        )
    try:
        return parse_record(kind, content, repr(str(path)))
    except InputError as error:
        raise InputError(f"{error}; {_REMEDY}") from error


def _rebuilding_command(content: dict[str, Any]) -> str:
    """Return the command line that an older store was built with, as far as its manifest tells it."""

    def part(name: str) -> dict[str, Any]:
        found = content.get(name)
        return found if isinstance(found, dict) else {}

    dataset, options, defaults = part("dataset"), part("options"), asdict(IGOptions())
    flags = {"teacher": part("teacher").get("name"), "dataset": dataset.get("name"), "split": dataset.get("split")}
    used = [name for name in defaults if name not in OF_AUTO or options.get("n_steps") == "auto"]
    flags |= {name: options.get(name) for name in used if options.get(name) != defaults[name]}
    flags |= {"engine": "captum" if content.get("engine") == "captum" else None, "map_size": content.get("map_size")}
    flags |= {"limit": content.get("n") if content.get("n") != dataset.get("num_images") else None}
    given = {f"--{name.replace('_', '-')}": str(value) for name, value in flags.items() if value is not None}
    words = [word for pair in given.items() for word in pair]
    logits = ["--logits"] if content.get("logits") is True else []
    command = shlex.join(["timm-igkd", "maps", *words, *logits, "--out", "NEW_FOLDER"])
    return " ".join(command.split())
