"""The files of a map store: manifest first, shards renamed into place when whole, provenance last.

out/manifest.json                       every setting that changes a number; all processes and any resume read it
out/data/<split>-00000-of-00004.parquet a shard; exists only when complete
out/provenance.json                     written last: the store is complete
out/README.md                           dataset card
out/.images/                            while it is built: of which images each shard is
"""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from timm_igkd.attribution.teacher_copy import answers_alike
from timm_igkd.data.items import UNKNOWN_SPLIT
from timm_igkd.errors import InputError, MissingFileError, first_line
from timm_igkd.files import refuse_special, write_atomic
from timm_igkd.maps.manifest import Manifest, Provenance, read_manifest, read_provenance
from timm_igkd.maps.row_format import check_columns, read_row
from timm_igkd.records import parse_record, record_bytes, write_record

STATEMENTS = ".images"
_SHARD_NAME = re.compile(r"-(\d+)-of-\d+\.parquet\Z")


def default_shard_rows(n: int) -> int:
    """Return the rows per shard: at most 256 shards, none under 64 rows, so that a kill loses little."""
    return max(64, -(-n // 256))


def split_in_names(manifest: Manifest) -> str:
    """Return the split as the shards' file names and the card have it: a word that `datasets` takes for one split."""
    split = re.sub(r"[^A-Za-z0-9_]+", "_", manifest.dataset.split).strip("_") or "train"
    return f"{split}_splits" if split.lower() == "all" else split  # all is its word for every split


def shard_name(manifest: Manifest, shard: int) -> str:
    """Return the file name of one shard."""
    return f"{split_in_names(manifest)}-{shard:05d}-of-{manifest.num_shards:05d}.parquet"


def shard_path(out: Path, manifest: Manifest, shard: int) -> Path:
    """Return the file of one shard."""
    name, split = shard_name(manifest, shard), split_in_names(manifest).removesuffix("_splits")
    if split.lower() == "all" and any((out / "data").glob(f"{split}-*.parquet")):  # of an earlier version
        name = name.replace("_splits", "", 1)
    return out / "data" / name


def shard_paths(out: Path, manifest: Manifest) -> list[Path]:
    """Return the files of all shards of a complete store."""
    return [shard_path(out, manifest, shard) for shard in range(manifest.num_shards)]


def count_shards(out: Path, manifest: Manifest) -> int:
    """Return how many of the shards are there; it takes no longer where a damaged manifest promises billions."""
    names = {path.name for path in (out / "data").glob("*.parquet")}
    shards = {int(found[1]) for name in names if (found := _SHARD_NAME.search(name))}
    return sum(shard < manifest.num_shards and shard_path(out, manifest, shard).name in names for shard in shards)


def open_manifest(out: Path, wanted: Manifest) -> Manifest:
    """Write the manifest of a new store, or return that of a store begun before with the same settings.

    Raises:
        InputError: the folder holds a store with other settings; the first one that differs is named.
    """
    _check_readable(wanted)
    if out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is a file, expected a folder; choose another --out")
    if out.is_symlink() and not out.exists():
        there = os.readlink(out)
        raise InputError(
            f"{str(out)!r} is a link to {there!r}, which is not there; mount or make it, or remove the link"
        )
    # Asked first: another build may just begin.
    has_data = (out / "data").exists() and any((out / "data").iterdir())
    others = sorted(path.name for path in [*out.glob("[!.]*"), *out.glob(STATEMENTS)] if path.name != "data")
    if not (out / "manifest.json").exists():
        if has_data or others:
            what = "data" if has_data else repr(others[0])
            raise InputError(f"{str(out)!r} holds {what} but no manifest.json, so it is no store; choose another --out")
        with contextlib.suppress(FileExistsError):  # of another build that was first
            write_record(out / "manifest.json", wanted, replace=False)
    found = read_manifest(out)
    if found.dataset.content_hash is not None and found.dataset.content_hash == wanted.dataset.content_hash:
        wanted = replace(wanted, dataset=replace(wanted.dataset, name=found.dataset.name))  # another path to the same
    if wanted.dataset.split == UNKNOWN_SPLIT:  # earlier versions called it train
        wanted = replace(wanted, dataset=replace(wanted.dataset, split=found.dataset.split))
    if (difference := first_difference(found, wanted)) is not None:
        what = "maps made" if has_data else "a store without maps yet, begun"
        raise InputError(
            f"{str(out)!r} holds {what} with other settings: {difference}; choose another --out or delete it"
        )
    return found


def _check_readable(wanted: Manifest) -> None:
    """Raise InputError for a manifest that could not be read back: the store would be lost with all its maps."""
    what = "what would be written into manifest.json"
    try:
        parse_record(Manifest, json.loads(record_bytes(wanted)), what)
    except TypeError as error:  # of json, for values of another library
        raise InputError(f"{what} cannot be: {first_line(error)}; give texts, bools and numbers of Python") from error


def first_difference(found: Manifest, wanted: Manifest) -> str | None:
    """Return the first setting in which two manifests differ, in words; None where the same maps were asked for.

    The images' own hash is no setting: a damaged image may be repaired between two parts of a build, see `Statements`.
    Nor is an option that nothing uses, such as the tolerance of a fixed number of steps, nor what the teacher was asked
    for by: its weights, preprocessing and answer say which it is, `./teacher` and `teacher` are the same.
    """
    there, here = (asdict(_settings_alone(each)) | {"options": each.options.used} for each in (found, wanted))
    for setting in fields(Manifest):
        name = setting.name
        if setting.metadata.get("is_setting", True) and there[name] != here[name]:
            if name == "teacher" and found.teacher.name != wanted.teacher.name:
                return _difference("teacher.name", found.teacher.name, wanted.teacher.name)
            return _difference(name, there[name], here[name])
    if not answers_alike(found.teacher.answer, wanted.teacher.answer):
        return "a teacher of the same weights answered otherwise there, that is, it had other arguments"
    return None


def _settings_alone(manifest: Manifest) -> Manifest:
    teacher = replace(manifest.teacher, answer=None, name="")
    return replace(manifest, dataset=replace(manifest.dataset, content_hash=None, is_part=False), teacher=teacher)


def _difference(name: str, found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in wanted:
            if found.get(key) != wanted[key]:
                return _difference(f"{name}.{key}", found.get(key), wanted[key])
    return f"{name} is {found!r} there, {wanted!r} here"


def write_shard(path: Path, table: pa.Table) -> str:
    """Write a shard atomically, with page checksums, and return its `file_hash`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="snappy", write_page_checksum=True, use_dictionary=False)
    data = sink.getvalue().to_pybytes()
    write_atomic(path, data)
    return xxhash.xxh3_128_hexdigest(data)


def file_hash(path: Path) -> str:
    """Return the hash of a file's bytes, xxh3-128, 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def read_shard(path: Path, manifest: Manifest, shard: int, checksums: bool = True) -> pa.Table:
    """Read a shard, with the columns and the number of rows that it must have.

    Args:
        path: of the shard.
        manifest: of its store.
        shard: its number.
        checksums: also check every page.

    Raises:
        InputError: the file is cut or altered, or has other columns or rows.
    """
    with _opened_shard(path, manifest, shard) as file:
        return pq.read_table(file, page_checksum_verification=checksums)


def check_footers(out: Path, manifest: Manifest) -> None:
    """Raise InputError where a shard of a complete store is cut, or has other columns or rows; no page is read."""
    for shard, path in enumerate(shard_paths(out, manifest)):
        with _opened_shard(path, manifest, shard):
            pass


@contextlib.contextmanager
def _opened_shard(path: Path, manifest: Manifest, shard: int) -> Iterator[pa.NativeFile]:
    """Open a shard whose footer is right; what is wrong with it, or with a page read meanwhile, is one line.

    Not as a file of Python's: a thread of Arrow lets go of that after `read_table` has returned, and when the process
    ends just then, it is aborted or hangs (apache/arrow issues 33975 and 50482). Nor by name, which can be an address
    to pyarrow, begin with ~, or hold columns: lr=0.1.
    """
    refuse_special(path)
    try:
        with pa.OSFile(os.fsencode(path)) as file:
            footer = pq.read_metadata(file)
            check_columns(footer.schema.to_arrow_schema(), manifest.logits)
            if footer.num_rows == len(manifest.rows_of(shard)):
                yield file
                return
    except (pa.ArrowInvalid, OSError) as error:
        first = str(error).splitlines()[0]
        raise InputError(
            f"shard {str(path)!r} is corrupt ({first}); delete it and run the same `timm-igkd maps` command again"
        ) from error
    raise InputError(
        f"shard {str(path)!r} has {footer.num_rows} rows, expected {len(manifest.rows_of(shard))}; delete it and build "
        "again"
    )


def check_shard(path: Path, manifest: Manifest, shard: int) -> pa.Table:
    """Read a finished shard and check each row.

    Raises:
        InputError: it is not the shard that was written.
    """
    table = read_shard(path, manifest, shard)
    for row, cells in enumerate(rows_of_table(table)):
        read_row(cells, manifest, f"row {row} of shard {str(path)!r}")
    return table


def rows_of_table(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table by column, a few at a time as Python objects."""
    for batch in table.to_batches(max_chunksize=64):
        yield from batch.to_pylist()


def stored_rows(out: Path, provenance: Manifest) -> Iterator[dict[str, Any]]:
    """Yield the rows as the shards hold them now, whatever the cache holds."""
    for shard in range(provenance.num_shards):
        path = shard_path(out, provenance, shard)
        yield from rows_of_table(read_shard(path, provenance, shard, checksums=False))
        read_shard(path, provenance, shard)  # the checksums, after the rows, whose errors say more


def rows_at(out: Path, provenance: Manifest, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the rows at ascending numbers, as the shards hold them; only the shards that hold one are read."""
    for shard, chosen in itertools.groupby(indices, lambda index: index // provenance.shard_rows):
        table = read_shard(shard_path(out, provenance, shard), provenance, shard)
        yield from table.take([index - provenance.rows_of(shard).start for index in chosen]).to_pylist()


def keys_hash(keys: Iterable[str]) -> str:
    """Return the hash of a store's keys in order, xxh3-128, 32 hex digits."""
    digest = xxhash.xxh3_128()
    for key in keys:
        digest.update(key.encode())
    return digest.hexdigest()


def require_complete(out: Path) -> Provenance:
    """Return a finished store's provenance.

    Raises:
        MissingFileError: no store there. InputError: a store that is not finished, that lost a shard, or whose files
        are damaged.
    """
    if not out.is_dir():
        raise MissingFileError(f"map store {str(out)!r} does not exist; build it with: timm-igkd maps --out {out}")
    if not (out / "manifest.json").exists():
        raise MissingFileError(
            f"{str(out)!r} is no map store (manifest.json is missing); build one with: timm-igkd maps"
        )
    manifest = read_manifest(out)
    done = count_shards(out, manifest)
    if done < manifest.num_shards or not (out / "provenance.json").exists():
        raise InputError(
            f"map store {str(out)!r} is not complete ({done} of {manifest.num_shards} shards); run the same "
            "`timm-igkd maps` command again to finish it"
        )
    provenance = read_provenance(out)
    if (difference := first_difference(provenance, manifest)) is not None:
        raise InputError(
            f"provenance.json of map store {str(out)!r} is of another manifest.json: {difference}; run the same "
            "`timm-igkd maps` command again"
        )
    return provenance


def check_order(out: Path, provenance: Provenance, keys: Iterable[str]) -> None:
    """Raise InputError unless the rows are those that the store was finished with, in their order."""
    if keys_hash(keys) != provenance.keys_hash:
        raise InputError(
            f"the rows of map store {str(out)!r} are in another order than when it was finished, or were replaced; "
            "delete its data and run the same `timm-igkd maps` command again"
        )
