"""The shards of a store: built in order, decoding and writing beside the attribution; a finished one is kept."""

import itertools
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from tqdm.auto import tqdm

from timm_igkd.data.images import content_key
from timm_igkd.data.items import read_item, row_name
from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.errors import InputError, InputTypeError, RunError, check_range
from timm_igkd.files import exclusive
from timm_igkd.maps.manifest import Halving, Manifest, read_manifest
from timm_igkd.maps.row_format import MapRow, to_table
from timm_igkd.maps.row_maker import Item, RowMaker, free_memory
from timm_igkd.maps.store_files import Statements, check_shard, file_hash, read_shard, shard_path, write_shard
from timm_igkd.progress import progress_bar
from timm_igkd.records import write_record

MOST_READERS = 8


def check_division(shard: Any, **sizes: int | None) -> None:
    """Raise InputError, or InputTypeError, for a part of the shards that is none, or a size below 1."""
    for name, size in sizes.items():
        if size is not None:
            check_range(name, size, 1)
    if not isinstance(shard, tuple | list) or [type(part) for part in shard] != [int, int]:
        raise InputTypeError(f"shard must be two whole numbers, got {shard!r}; give (0, 4) for the first of four parts")
    index, count = shard
    if not 0 <= index < count:
        raise InputError(f"shard must be i/n with 0 <= i < n, got {index}/{count}")


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
        if self.maker.device.type == "cpu" or not isinstance(self.dataset, LabeledImages):
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
