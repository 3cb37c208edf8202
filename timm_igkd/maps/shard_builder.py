"""The shards of a store: built in order, decoding and writing beside the attribution; a finished one is kept."""

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from tqdm.auto import tqdm

from timm_igkd.data.images import content_key
from timm_igkd.data.items import gives_rows, read_item, row_name
from timm_igkd.errors import InputError, InputTypeError, RunError, check_whole
from timm_igkd.files import exclusive, write_atomic
from timm_igkd.maps.manifest import Halving, Manifest, read_manifest
from timm_igkd.maps.row_format import MapRow, to_table
from timm_igkd.maps.row_maker import Item, RowMaker, free_memory
from timm_igkd.maps.store_files import STATEMENTS, check_shard, file_hash, read_shard, shard_path, write_shard
from timm_igkd.progress import progress_bar
from timm_igkd.records import write_record

MOST_READERS = 8


def checked_shard(shard: Any) -> tuple[int, int]:
    """Return which part of the shards is to be built, (i, n); InputError, or InputTypeError, where it is none."""
    try:
        index, count = (check_whole("shard", part) for part in shard)
    except (TypeError, ValueError) as error:  # of our own too
        raise InputTypeError(
            f"shard must be two whole numbers, got {shard!r}; give (0, 4) for the first of four parts"
        ) from error
    if not 0 <= index < count:
        raise InputError(f"shard must be i/n with 0 <= i < n, got {index}/{count}")
    return index, count


class Statements:
    """Notes beside an unfinished store's shards: each shard's file hash and its data set's content hash.

    The data set is the one that it was built from. Removed when the store is finished. A shard that is copied from
    elsewhere, or in place of another, has no note that fits its bytes.

    Args:
        out: the store's folder.
    """

    def __init__(self, out: Path):
        self.folder = out / STATEMENTS

    def matches(self, shard: Path, file_hash: str, content_hash: str) -> bool:
        """Return whether a shard of these bytes is of the data set of this content hash, as who built it read it."""
        with contextlib.suppress(OSError):
            return self._path(shard).read_bytes() == f"{file_hash} {content_hash}".encode()
        return False

    def write(self, shard: Path, file_hash: str, content_hash: str) -> None:
        """Note it."""
        with contextlib.suppress(FileNotFoundError):  # another call finished the store meanwhile
            self.folder.mkdir(exist_ok=True)
            write_atomic(self._path(shard), f"{file_hash} {content_hash}".encode())

    def remove(self, shards: Iterable[Path]) -> None:
        """Take away those of these shards; what else is in their folder stays."""
        for shard in shards:
            self._path(shard).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or something of somebody else is in it
            self.folder.rmdir()

    def _path(self, shard: Path) -> Path:
        return self.folder / shard.stem


class ShardBuilder:
    """Computes the shards of one manifest.

    Args:
        teacher: in eval mode.
        dataset: as in `compute_maps`.
        out: the store's folder.
        manifest: as written before the first shard.
        device: where to compute.
        content_hash: the dataset's, by which finished shards are known to be of it; None where it has none.
        finished_content_hash: of the images that a finished store is of; None where it is not finished.
    """

    def __init__(
        self,
        teacher: nn.Module,
        dataset: Any,
        out: Path,
        manifest: Manifest,
        device: torch.device,
        content_hash: str | None = None,
        finished_content_hash: str | None = None,
    ):
        self.dataset, self.out, self.manifest = dataset, out, manifest
        self.content_hash, self.finished_content_hash = content_hash, finished_content_hash
        self.statements = Statements(out)
        self._own: dict[int, str] = {}  # hashes of the files that this call wrote or checked, by shard
        self.maker = RowMaker(teacher, dataset, manifest, device)

    def build(self, shards: list[int], progress: bool = True) -> None:
        """Compute and write the shards that are not there yet; those that are there are checked first."""
        total = sum(len(self.manifest.rows_of(shard)) for shard in shards)
        missing = [shard for shard in shards if not self._is_done(shard)]
        there = total - sum(len(self.manifest.rows_of(shard)) for shard in missing)
        bar = progress_bar(total=total, unit="img", desc="maps", show=progress, initial=there, smoothing=0.05)
        writing: Future[None] | None = None
        with bar, ThreadPoolExecutor(1) as writer:
            built: list[MapRow] = []
            for shard, batch, items in self._read_ahead(missing):
                built += self._within_memory(batch, items)
                bar.update(len(batch))
                if batch.stop == self.manifest.rows_of(shard).stop:
                    if writing is not None:
                        writing.result()
                    writing, built = writer.submit(self._write, shard, built), []
            if writing is not None:
                writing.result()

    def _read_ahead(self, shards: list[int]) -> Iterator[tuple[int, range, list[Item]]]:
        """Yield (shard, batch, items), the next batch decoding meanwhile; no batch crosses a shard's border."""
        size = self.manifest.batch_images
        borders = ((shard, self.manifest.rows_of(shard)) for shard in shards)
        batches = ((s, rows[start : start + size]) for s, rows in borders for start in range(0, len(rows), size))
        waiting: deque[tuple[int, range, list[Future[Item]]]] = deque()
        with ThreadPoolExecutor(self._num_readers()) as readers:
            for number in itertools.count():
                for shard, batch in itertools.islice(batches, 1 if number else 2):
                    waiting.append((shard, batch, [readers.submit(self.maker.read, index) for index in batch]))
                if not waiting:
                    return
                shard, batch, reads = waiting.popleft()
                try:
                    items = [read.result() for read in reads]
                except BaseException:
                    readers.shutdown(wait=False, cancel_futures=True)
                    raise
                yield shard, batch, items

    def _num_readers(self) -> int:
        """Return how many threads decode: many beside a GPU, where the dataset is our own; others may not bear it."""
        if self.maker.device.type == "cpu" or not gives_rows(self.dataset):
            return 1
        return min(MOST_READERS, os.cpu_count() or 1)

    def _write(self, shard: int, built: list[MapRow]) -> None:
        path = shard_path(self.out, self.manifest, shard)
        self._note_images(shard, path, write_shard(path, to_table(built)))

    def _is_done(self, shard: int) -> bool:
        path = shard_path(self.out, self.manifest, shard)
        if not path.exists():
            return False
        digest = file_hash(path)
        try:
            table = check_shard(path, self.manifest, shard)
        except InputError as error:
            cause, _, _ = str(error).rpartition("; ")  # its remedy is done here
            tqdm.write(f"rebuilding shard {shard}, which is damaged: {cause}")
            return False
        self._check_rows(shard, table, digest)
        return True

    def check_images(self, shards: list[int]) -> None:
        """Raise InputError where shards that other calls put there are not of the images that are there now."""
        for shard in shards:
            path = shard_path(self.out, self.manifest, shard)
            if (digest := file_hash(path)) != self._own.get(shard):
                self._check_rows(shard, read_shard(path, self.manifest, shard), digest)

    def _note_images(self, shard: int, path: Path, digest: str) -> None:
        self._own[shard] = digest
        if self.content_hash is not None:
            self.statements.write(path, digest, self.content_hash)

    def _check_rows(self, shard: int, table: pa.Table, digest: str) -> None:
        """Refuse a shard of other images or labels; where it is stated to be of these, two rows speak for all."""
        path, rows = shard_path(self.out, self.manifest, shard), self.manifest.rows_of(shard)
        content_hash = self.content_hash
        is_stated = content_hash is not None and (
            self.finished_content_hash == content_hash or self.statements.matches(path, digest, content_hash)
        )
        for position in (0, len(rows) - 1) if is_stated else range(len(rows)):
            image, label = read_item(self.dataset, rows[position])
            found = table.column("key")[position].as_py(), table.column("label")[position].as_py()
            if found != (content_key(image), label):
                raise InputError(
                    f"{str(self.out)!r} holds maps of other data: row {rows[position]} is not "
                    f"{row_name(self.dataset, rows[position])} with label {label}; choose another --out or delete it"
                )
        self._note_images(shard, path, digest)

    def _within_memory(self, indices: range, items: list[Item]) -> list[MapRow]:
        """Return the rows of some images; where the device's memory does not hold a chunk, halve it and go on."""
        while True:
            try:
                return self.maker.rows(indices, items)
            except torch.cuda.OutOfMemoryError as error:
                chunk = self.maker.fast.chunk_size // 2
                if chunk < 1:
                    raise RunError(
                        f"the GPU's memory does not hold one image of {row_name(self.dataset, indices[0])} and its "
                        "gradient; free memory, or use a larger GPU"
                    ) from error
            free_memory(self.manifest.arithmetic)  # outside of `except`, where the traceback still holds the tensors
            self._set_chunk(chunk, indices[0])

    def _set_chunk(self, chunk: int, row: int) -> None:
        """Use smaller chunks from now on, and on a resume, and record it: the last bits may differ from here."""
        self.maker.set_chunk_size(chunk)
        with exclusive(self.out / ".manifest.lock"):
            there = read_manifest(self.out)  # other processes halve it too
            halvings, least = (*there.out_of_memory_halvings, Halving(row, chunk)), min(chunk, there.chunk_size)
            self.manifest = replace(self.manifest, chunk_size=least, out_of_memory_halvings=halvings)
            write_record(self.out / "manifest.json", self.manifest)
        tqdm.write(f"maps: out of GPU memory, going on with chunks of {chunk}")
