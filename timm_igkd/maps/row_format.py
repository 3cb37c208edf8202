"""How one attribution map is stored: 8-bit greyscale PNG, its numbers and a hash, one row of a Hugging Face dataset."""

import io
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash
from PIL import Image

from timm_igkd.data.images import Name, content_key, text
from timm_igkd.data.items import read_item, row_name
from timm_igkd.data.labels import UNLABELED
from timm_igkd.errors import InputError, RunError
from timm_igkd.maps.manifest import Manifest, Statistics

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class MapRow:
    """One row of a store.

    Attributes:
        key: `images.content_key` of the image.
        label: the image's label; data/labels.py's UNLABELED where it has none, whatever class was attributed.
        map: [H, W] uint8, see `quantize`.
        scale: largest absolute value of the float map, 0 for a constant one.
        convergence_delta: sum of attributions - (f(x) - f(baseline)).
        n_steps: gradients spent.
        converged: False where "auto" stopped at max_steps.
        logits: [classes] float32 of the teacher on the clean image, or None.
    """

    key: str
    label: int
    map: np.ndarray
    scale: float
    convergence_delta: float
    n_steps: int
    converged: bool
    logits: np.ndarray | None = None


def features(with_logits: bool) -> "datasets.Features":
    """Return the columns of a store; the Hub's viewer shows `map` as an image."""
    import datasets  # here alone: see arrow_cache.py

    columns = {
        "key": datasets.Value("string"),
        "label": datasets.Value("int64"),
        "map": datasets.Image(),
        "scale": datasets.Value("float32"),
        "convergence_delta": datasets.Value("float32"),
        "n_steps": datasets.Value("int32"),
        "converged": datasets.Value("bool"),
    }
    if with_logits:
        columns["logits"] = datasets.Sequence(datasets.Value("float32"))
    return datasets.Features(columns | {"row_hash": datasets.Value("string")})


_COLUMNS = {
    "key": pa.string(),
    "label": pa.int64(),
    "map": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    "scale": pa.float32(),
    "convergence_delta": pa.float32(),
    "n_steps": pa.int32(),
    "converged": pa.bool_(),
    "row_hash": pa.string(),
}


def check_columns(schema: pa.Schema, with_logits: bool) -> None:
    """Raise ArrowInvalid unless a file has a store's columns, those of `features`, which would import `datasets`."""
    for name, wanted in (_COLUMNS | ({"logits": pa.list_(pa.float32())} if with_logits else {})).items():
        found = schema.field(name).type if schema.get_field_index(name) >= 0 else None
        if found is not None and name == "logits" and pa.types.is_list(found):
            found = pa.list_(found.value_type)  # Parquet calls the elements by another name
        if found != wanted:
            raise pa.ArrowInvalid(f"column {name!r} is {found or 'missing'}, expected {wanted}")


def quantize(attribution: np.ndarray, signed: bool, name: Name) -> tuple[np.ndarray, float]:
    """Return a map as 8-bit levels and its scale.

    Args:
        attribution: [H, W] float32.
        signed: False: round(255 * map / scale); True: 128 + round(127 * map / scale).
        name: the image's name, for the error.

    Raises:
        RunError: NaN or infinite values.
    """
    scale = np.float32(np.abs(attribution).max())
    if not np.isfinite(scale):
        raise RunError(f"the attribution of {text(name)} is not finite; check the teacher's weights and normalisation")
    if scale == 0 or attribution.min() == attribution.max():
        return np.full(attribution.shape, 128 if signed else 0, dtype=np.uint8), 0.0
    if signed:
        return (128 + np.round(127 * (attribution / scale))).astype(np.uint8), float(scale)
    return np.round(255 * (attribution / scale)).astype(np.uint8), float(scale)


_KEY = re.compile(r"[0-9a-f]{32}", re.ASCII)
_RECTIFY = np.round(np.clip(np.arange(256) - 128, 0, 127) * (255 / 127)).astype(np.uint8).tolist()


def rectify(levels: Image.Image) -> Image.Image:
    """Return the positive part of a signed map as 0…255 levels, the form the overlay takes."""
    return levels.point(_RECTIFY)


def row_hash(row: MapRow) -> str:
    """Return the hash of everything that a row holds, xxh3-128, 32 hex digits.

    Numbers count as they are stored, in float32; each part's length precedes it, so that none can stand for another.
    """
    numbers = row.label, *row.map.shape, row.scale, row.convergence_delta, row.n_steps, row.converged
    parts = [row.key.encode(), struct.pack("<qqqffi?", *numbers), np.ascontiguousarray(row.map).tobytes()]
    if row.logits is not None:
        parts.append(np.ascontiguousarray(row.logits, dtype="<f4").tobytes())
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(struct.pack("<q", len(part)) + part)
    return digest.hexdigest()


def encode_png(levels: np.ndarray) -> bytes:
    """Return [H, W] uint8 levels as a greyscale PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def open_png(data: bytes) -> Image.Image:
    """Return a stored map as an 8-bit greyscale image."""
    return Image.open(io.BytesIO(data), formats=("PNG",))


def decode_png(data: bytes) -> np.ndarray:
    """Return the levels of a stored map, [H, W] uint8."""
    return np.asarray(open_png(data))


def read_row(cells: Mapping[str, Any], manifest: Manifest, name: Name) -> MapRow:
    """Return a stored row after holding it against its store's manifest and its own hash.

    Args:
        cells: as Arrow gives them, by column.
        manifest: of the store.
        name: how the error calls the row.

    Raises:
        InputError: a cell that no row of this store can hold, or a hash of other cells.
    """
    try:
        row = MapRow(
            key=_checked_key(cells["key"]),
            label=_present(cells["label"], "label"),
            map=_checked_map(cells["map"], manifest),
            scale=_checked_number(cells["scale"], "scale", low=0.0),
            convergence_delta=_checked_number(cells["convergence_delta"], "convergence_delta"),
            n_steps=_checked_steps(cells["n_steps"], cells["converged"], manifest),
            converged=cells["converged"],
            logits=_checked_logits(cells["logits"], manifest.num_logits) if manifest.logits else None,
        )
        if row_hash(row) != cells["row_hash"]:
            raise ValueError("its hash differs from its content")
    except ValueError as error:
        raise InputError(
            f"{text(name)} is damaged: {error}; delete its shard and run the same `timm-igkd maps` again"
        ) from error
    return row


def check_row_of(cells: Mapping[str, Any], manifest: Manifest, dataset: Any, index: int) -> str:
    """Return the key of a stored row after holding it against image `index` of a dataset too; see `read_row`.

    Raises:
        InputError: other pixels, another label, or a damaged row.
    """
    image, label = read_item(dataset, index)
    if cells["key"] != content_key(image):
        raise InputError(
            f"row {index} does not belong to {row_name(dataset, index)}: the pixels differ; give the images that it "
            f"was made of, in their order, decoded by Pillow {manifest.versions.get('pillow')}, or build the maps again"
        )
    if cells["label"] != label:
        remedy = "give the labels that it was made with, or build the maps again"
        if cells["label"] == UNLABELED:
            remedy = "it was made without labels: add --label-column none"
        raise InputError(f"row {index} has label {cells['label']}, {row_name(dataset, index)} has {label}; {remedy}")
    return read_row(cells, manifest, lambda: f"the map of {row_name(dataset, index)} (row {index})").key


def _present(value: Any, column: str) -> Any:
    if value is None:
        raise ValueError(f"its {column} is null")
    return value


def _checked_key(key: str | None) -> str:
    if not _KEY.fullmatch(_present(key, "key")):
        raise ValueError(f"its key is {ascii(key)[:50]}, expected 32 hex digits")
    return key  # type: ignore[return-value]


def _checked_map(cell: dict[str, Any] | None, manifest: Manifest) -> np.ndarray:
    """Return the levels of a stored map, [H, W] uint8."""
    data = _present(_present(cell, "map")["bytes"], "map")
    try:
        image = open_png(data)  # its header alone; pixels are decoded when there are as many as there should be
        found, expected = (image.mode, image.size), ("L", manifest.map_shape[::-1])
        levels = np.asarray(image) if found == expected else None
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, struct.error and more on altered bytes
        raise ValueError("its map cannot be decoded as PNG") from error
    if levels is None:
        (mode, size), (_, wanted) = found, expected
        raise ValueError(
            f"its map is {size[0]}x{size[1]} of mode {mode!r}, expected {wanted[0]}x{wanted[1]} of 8-bit greyscale 'L'"
        )
    return levels


def _checked_number(value: float | None, column: str, low: float = -math.inf) -> float:
    number = _present(value, column)
    if not (math.isfinite(number) and number >= low):
        raise ValueError(f"its {column} is {number:g}")
    return number


def _checked_steps(n_steps: int | None, converged: bool | None, manifest: Manifest) -> int:
    steps, fixed = _present(n_steps, "n_steps"), manifest.options.n_steps
    if fixed == "auto" and not 1 <= steps <= manifest.options.max_steps:
        raise ValueError(f"its n_steps is {steps}, expected 1 to {manifest.options.max_steps}")
    if fixed != "auto" and (steps, converged) != (fixed, True):
        raise ValueError(f"its n_steps is {steps}, expected {fixed}, and converged {converged}, expected True")
    _present(converged, "converged")
    return steps


def _checked_logits(values: list[float | None] | None, count: int) -> np.ndarray:
    """Return stored logits, [count] float32."""
    logits = np.asarray(_present(values, "logits"), dtype=np.float32)  # null becomes NaN
    if logits.shape != (count,) or not np.isfinite(logits).all():
        raise ValueError(f"its logits are {len(logits)} numbers, expected {count} finite ones")
    return logits


def to_table(rows: list[MapRow]) -> pa.Table:
    """Return rows as an Arrow table with the store's columns."""
    with_logits = rows[0].logits is not None
    schema = features(with_logits).arrow_schema
    columns: dict[str, list] = {
        "key": [row.key for row in rows],
        "label": [row.label for row in rows],
        "map": [{"bytes": encode_png(row.map), "path": None} for row in rows],
        "scale": [row.scale for row in rows],
        "row_hash": [row_hash(row) for row in rows],
        "convergence_delta": [row.convergence_delta for row in rows],
        "n_steps": [row.n_steps for row in rows],
        "converged": [row.converged for row in rows],
    }
    if with_logits:
        columns["logits"] = [row.logits for row in rows]
    arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def statistics(tables: list[pa.Table]) -> Statistics:
    """Return what the provenance says of the maps as numbers; all tables in row order."""
    steps = np.concatenate([table.column("n_steps").to_numpy() for table in tables])
    deltas = np.abs(np.concatenate([table.column("convergence_delta").to_numpy() for table in tables]))
    converged = sum(int(np.sum(table.column("converged").to_numpy(zero_copy_only=False))) for table in tables)
    scales = np.concatenate([table.column("scale").to_numpy() for table in tables])
    return Statistics(
        mean_steps=float(steps.mean()),
        converged=converged,
        abs_delta_median=float(np.median(deltas)),
        abs_delta_p90=float(np.quantile(deltas, 0.9)),
        constant_maps=int((scales == 0).sum()),
    )
