"""A store's rows as one memory-mapped Arrow table, without importing `datasets` into a training process.

Parquet has to be decoded, Arrow can be mapped: the shards are converted once, into an Arrow stream file beside the
caches of `datasets` (HF_DATASETS_CACHE), which `datasets.Dataset.from_file` opens as well. It takes as much of the disk
as the shards; every worker and process maps the same one. `datasets` itself, with pandas behind it, would be most of
the memory that an overlay adds to a training process.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from huggingface_hub import constants

from timm_igkd.errors import InputError, RunError, UserError
from timm_igkd.files import atomic_file, exclusive, given_path, remove_abandoned
from timm_igkd.maps.manifest import Manifest
from timm_igkd.maps.store_files import read_shard


def arrow_file(shards: Sequence[Path], manifest: Manifest) -> Path:
    """Return the Arrow stream file with the rows of these shards, written where it is not there yet.

    A shard that was written again (another size or time of change) makes another file, which takes the place of the
    folder's earlier ones. Who has mapped one of those on a local disk keeps its rows.

    Args:
        shards: all of a store, in one folder.
        manifest: of the store.

    Raises:
        InputError: a shard is cut or altered. RunError: the cache cannot be written, or its disk is full.
    """
    states = [(os.path.realpath(path), (state := path.stat()).st_size, state.st_mtime_ns) for path in shards]
    cache = cache_folder()
    parts = os.path.realpath(shards[0].parent), states
    folder, shards_now = (xxhash.xxh3_128_hexdigest(repr(part).encode()) for part in parts)
    path = cache / f"{folder}-{shards_now}.arrow"
    if not path.exists():
        with _disk_errors(cache), exclusive(cache / f"{folder}.lock"):  # of several processes at once, one converts it
            if not path.exists():
                remove_abandoned(cache, ".*.tmp")
                _convert(shards, manifest, path)
                for earlier in {*cache.glob(f"{folder}-*.arrow")} - {path}:
                    with contextlib.suppress(OSError):  # of another user, in a cache that several share
                        earlier.unlink(missing_ok=True)
    return path


def cache_folder() -> Path:
    """Return the folder of the converted rows, by its absolute path."""
    given = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    return Path(os.path.abspath(given_path("HF_DATASETS_CACHE", given))) / "timm_igkd"


@contextlib.contextmanager
def _disk_errors(cache: Path) -> Iterator[None]:
    """Turn what the system raises where the cache cannot be written into one line."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise RunError(
            f"the rows of a map store cannot be written into the cache {str(cache)!r} ({error.strerror or error}), "
            "where they take as much room as its shards; free some, or name another folder by HF_DATASETS_CACHE"
        ) from error


def mapped_table(path: Path) -> pa.Table:
    """Return an Arrow stream file as a table whose values stay on disk until they are read.

    Raises:
        InputError: the file was damaged. FileNotFoundError: another one has taken its place.
    """
    try:
        return pa.ipc.open_stream(pa.memory_map(os.fsencode(path))).read_all()
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"cached maps {str(path)!r} are damaged ({error}); delete that file, it will be made again"
        ) from error


def sorted_keys(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return a table's keys in their order, [n] bytes, and the row of each, [n] int64; equal keys by their rows."""
    stored = [[(key or "").encode() for key in keys.to_pylist()] for keys in table.column("key").iterchunks()]
    keys = np.concatenate([np.asarray(part, dtype="S33") for part in stored])  # one more than a key has
    order = np.argsort(keys, kind="stable")
    return keys[order], order


def _convert(shards: Sequence[Path], manifest: Manifest, path: Path) -> None:
    """Write the rows of all shards as one Arrow stream file; one shard at a time is in memory."""
    first = read_shard(shards[0], manifest, 0)
    with atomic_file(path) as file, pa.ipc.new_stream(file, first.schema) as writer:
        writer.write_table(first)
        for shard, file_of_shard in enumerate(shards[1:], start=1):
            writer.write_table(read_shard(file_of_shard, manifest, shard))
