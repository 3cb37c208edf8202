"""How one attribution map is stored: 8-bit greyscale PNG, a scale and a hash, one row of a Hugging Face dataset."""

import io
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import xxhash
from PIL import Image

from timm_igkd.errors import RunError

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class MapRow:
    """One row of a store.

    Attributes:
        key: `images.content_key` of the image.
        label: the image's label.
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
        "map_hash": datasets.Value("string"),
        "convergence_delta": datasets.Value("float32"),
        "n_steps": datasets.Value("int32"),
        "converged": datasets.Value("bool"),
    }
    if with_logits:
        columns["logits"] = datasets.Sequence(datasets.Value("float32"))
    return datasets.Features(columns)


def quantize(attribution: np.ndarray, signed: bool, name: str) -> tuple[np.ndarray, float]:
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
        raise RunError(f"the attribution of {name} is not finite; check the teacher's weights and normalisation")
    if scale == 0 or attribution.min() == attribution.max():
        return np.full(attribution.shape, 128 if signed else 0, dtype=np.uint8), 0.0
    if signed:
        return (128 + np.round(127 * (attribution / scale))).astype(np.uint8), float(scale)
    return np.round(255 * (attribution / scale)).astype(np.uint8), float(scale)


_RECTIFY = np.round(np.clip(np.arange(256) - 128, 0, 127) * (255 / 127)).astype(np.uint8).tolist()


def rectify(levels: Image.Image) -> Image.Image:
    """Return the positive part of a signed map as 0…255 levels, the form the overlay takes."""
    return levels.point(_RECTIFY)


def map_hash(levels: np.ndarray, scale: float) -> str:
    """Return the hash of a stored map's pixels, size and scale, 16 hex digits."""
    header = struct.pack("<qqf", levels.shape[1], levels.shape[0], scale)
    return xxhash.xxh3_64_hexdigest(header + np.ascontiguousarray(levels).tobytes())


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


def is_intact(data: bytes, scale: float, stored_hash: str) -> bool:
    """Return whether a row's PNG and scale are those its hash was made of."""
    try:
        return map_hash(decode_png(data), scale) == stored_hash
    except Exception:  # PIL's plugins raise OSError, SyntaxError, struct.error and more on altered bytes
        return False


def to_table(rows: list[MapRow]) -> pa.Table:
    """Return rows as an Arrow table with the store's columns."""
    with_logits = rows[0].logits is not None
    schema = features(with_logits).arrow_schema
    columns: dict[str, list] = {
        "key": [row.key for row in rows],
        "label": [row.label for row in rows],
        "map": [{"bytes": encode_png(row.map), "path": None} for row in rows],
        "scale": [row.scale for row in rows],
        "map_hash": [map_hash(row.map, row.scale) for row in rows],
        "convergence_delta": [row.convergence_delta for row in rows],
        "n_steps": [row.n_steps for row in rows],
        "converged": [row.converged for row in rows],
    }
    if with_logits:
        columns["logits"] = [row.logits for row in rows]
    arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)
