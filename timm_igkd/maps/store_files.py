"""The files of a map store: manifest first, shards renamed into place when whole, provenance last.

out/manifest.json                       every setting that changes a number; all processes and any resume read it
out/data/<split>-00000-of-00004.parquet a shard; exists only when complete
out/provenance.json                     written last: the store is complete
out/README.md                           dataset card
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from timm_igkd.errors import InputError, MissingFileError
from timm_igkd.files import read_json, write_atomic, write_json
from timm_igkd.maps.row_format import is_intact

FORMAT_VERSION = 1
_NOT_SETTINGS = ("versions", "out_of_memory_halvings", "chunk_size", "batch_images", "dtype", "compiled", "kernels")


def default_shard_rows(n: int) -> int:
    """Return the rows per shard: at most 256 shards, none under 64 rows, so that a kill loses little."""
    return max(64, -(-n // 256))


def shard_path(out: Path, manifest: dict[str, Any], shard: int) -> Path:
    """Return the file of one shard."""
    split = re.sub(r"[^A-Za-z0-9_]+", "_", manifest["dataset"]["split"]).strip("_") or "train"
    return out / "data" / f"{split}-{shard:05d}-of-{num_shards(manifest):05d}.parquet"


def num_shards(manifest: dict[str, Any]) -> int:
    """Return how many shards the store has when it is complete."""
    return -(-manifest["n"] // manifest["shard_rows"])


def shard_rows(manifest: dict[str, Any], shard: int) -> range:
    """Return the rows of one shard."""
    size = manifest["shard_rows"]
    return range(shard * size, min((shard + 1) * size, manifest["n"]))


def open_manifest(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a new store, or return that of a store begun before with the same settings.

    Raises:
        InputError: the folder holds a store with other settings; the first one that differs is named.
    """
    path = out / "manifest.json"
    if out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is a file, expected a folder; choose another --out")
    if not path.exists():
        if (out / "data").exists() and any((out / "data").iterdir()):
            raise InputError(f"{str(out)!r} holds data but no manifest.json, so it is no store; choose another --out")
        write_json(path, wanted)
        return wanted
    found = read_json(path)
    for name in wanted:
        if name not in _NOT_SETTINGS and found.get(name) != wanted[name]:
            detail = _difference(name, found.get(name), wanted[name])
            raise InputError(
                f"{str(out)!r} holds maps made with other settings: {detail}; choose another --out or delete it"
            )
    return found


def _difference(name: str, found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in wanted:
            if found.get(key) != wanted[key]:
                return _difference(f"{name}.{key}", found.get(key), wanted[key])
    return f"{name} is {found!r} there, {wanted!r} here"


def write_shard(path: Path, table: pa.Table) -> None:
    """Write a shard atomically, with page checksums."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="snappy", write_page_checksum=True, use_dictionary=False)
    write_atomic(path, sink.getvalue().to_pybytes())


def read_shard(path: Path, checksums: bool = True) -> pa.Table:
    """Read a shard.

    Args:
        path: of the shard.
        checksums: also check every page.

    Raises:
        InputError: the file is cut or altered.
    """
    try:
        return pq.read_table(path, page_checksum_verification=checksums)
    except (pa.ArrowInvalid, OSError) as error:
        first = str(error).splitlines()[0]
        raise InputError(
            f"shard {str(path)!r} is corrupt ({first}); delete it and run the same `timm-igkd maps` command again"
        ) from error


def check_shard(path: Path, manifest: dict[str, Any], shard: int) -> pa.Table:
    """Read a finished shard and check its row count and every map's hash.

    Raises:
        InputError: it is not the shard that was written.
    """
    table = read_shard(path)
    expected = len(shard_rows(manifest, shard))
    if table.num_rows != expected:
        raise InputError(
            f"shard {str(path)!r} has {table.num_rows} rows, expected {expected}; delete it and build again"
        )
    cells, scales = table.column("map"), table.column("scale")
    for row, stored in enumerate(table.column("map_hash").to_pylist()):
        if not is_intact(cells[row]["bytes"].as_py(), scales[row].as_py(), stored):
            raise InputError(f"row {row} of shard {str(path)!r} has an altered map; delete the shard and build again")
    return table


def require_complete(out: Path) -> dict[str, Any]:
    """Return a finished store's provenance.

    Raises:
        MissingFileError: no store there. InputError: a store that is not finished, or that lost a shard.
    """
    if not out.is_dir():
        raise MissingFileError(f"map store {str(out)!r} does not exist; build it with: timm-igkd maps --out {out}")
    if not (out / "manifest.json").exists():
        raise MissingFileError(
            f"{str(out)!r} is no map store (manifest.json is missing); build one with: timm-igkd maps"
        )
    manifest = read_json(out / "manifest.json")
    missing = [shard for shard in range(num_shards(manifest)) if not shard_path(out, manifest, shard).exists()]
    if missing or not (out / "provenance.json").exists():
        done = num_shards(manifest) - len(missing)
        raise InputError(
            f"map store {str(out)!r} is not complete ({done} of {num_shards(manifest)} shards); run the same "
            "`timm-igkd maps` "
            "command again to finish it"
        )
    return read_json(out / "provenance.json")


def statistics(tables: list[pa.Table]) -> dict[str, Any]:
    """Return what the provenance says of the maps as numbers; all tables in row order."""
    steps = np.concatenate([table.column("n_steps").to_numpy() for table in tables])
    deltas = np.abs(np.concatenate([table.column("convergence_delta").to_numpy() for table in tables]))
    converged = sum(int(np.sum(table.column("converged").to_numpy(zero_copy_only=False))) for table in tables)
    scales = np.concatenate([table.column("scale").to_numpy() for table in tables])
    return {
        "mean_steps": float(steps.mean()),
        "converged": converged,
        "abs_delta_median": float(np.median(deltas)),
        "abs_delta_p90": float(np.quantile(deltas, 0.9)),
        "constant_maps": int((scales == 0).sum()),
    }
