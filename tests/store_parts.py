"""What tests of map stores share: small stores, their files, rows altered by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from timm_igkd.attribution.options import IGOptions
from timm_igkd.maps.build import compute_maps
from timm_igkd.maps.row_format import MapRow, encode_png, row_hash
from timm_igkd.maps.store import MapStore

N, SHARD = 10, 4

TWO_STEPS = IGOptions(n_steps=2)


def build(teacher: nn.Module, dataset: Any, folder: Path, **options: Any) -> MapStore | None:
    defaults = {"options": TWO_STEPS, "shard_size": SHARD, "progress": False}
    return compute_maps(teacher, dataset, folder, **defaults | options)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards_of(folder: Path) -> list[Path]:
    return sorted((folder / "data").glob("*.parquet"))


def altered(folder: Path, row: int, **cells: Any) -> Path:
    """Rewrite the shard of one row with other cells, as someone would who repairs nothing else."""
    path = shards_of(folder)[row // SHARD]
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[row % SHARD] |= cells
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return folder


def rehashed(folder: Path, row: int, levels: np.ndarray, scale: float, **changed: Any) -> None:
    """Give a row another map and the hash that fits it."""
    cells = pq.read_table(shards_of(folder)[row // SHARD]).to_pylist()[row % SHARD]
    numbers = {name: cells[name] for name in ("key", "label", "convergence_delta", "n_steps", "converged")}
    numbers |= changed
    made = MapRow(map=levels, scale=scale, logits=np.asarray(cells["logits"], np.float32), **numbers)
    altered(
        folder, row, map={"bytes": encode_png(levels), "path": None}, scale=scale, row_hash=row_hash(made), **changed
    )
