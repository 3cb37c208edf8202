"""Reading maps: the row that belongs to an image is found by the image's content, never by its position alone."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from timm_igkd.data.images import Name, content_key, text
from timm_igkd.data.items import UNKNOWN_SPLIT, check_class_numbers, class_names, refuse_overlaid
from timm_igkd.errors import InputError
from timm_igkd.files import given_path
from timm_igkd.hub.transport import TIMEOUT_S, Pushed
from timm_igkd.maps.arrow_cache import arrow_file, mapped_table, sorted_keys
from timm_igkd.maps.manifest import Provenance
from timm_igkd.maps.push import fetch_maps, push_maps, repository_of
from timm_igkd.maps.row_format import MapRow, check_row_of, decode_png, read_row, rectify
from timm_igkd.maps.store_files import check_footers, check_order, require_complete, shard_paths, stored_rows

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


class MapStore:
    """A finished store of attribution maps, of the teacher's logits, or of both.

    Args:
        path: folder written by `timm-igkd maps` / `compute_maps`, or "user/name" of a store on the Hub, which is
            downloaded once and then read from the cache.
        revision: branch, tag or commit of a store on the Hub; also as "user/name@revision".

    Attributes:
        path: the folder; for a store on the Hub, its place in the cache.
        provenance: teacher, dataset, options, versions and statistics.

    Raises:
        MissingFileError: no store there. InputError: not finished, or corrupt.
        RunError: the Hub has none, refuses, or cannot be reached.

    Pickles to DataLoader workers: the rows stay in the memory-mapped file.
    """

    def __init__(self, path: str | Path, revision: str | None = None):
        folder = given_path("path", path)
        repository = repository_of(path, revision)
        self.path = folder if repository is None else fetch_maps(*repository)
        self.provenance: Provenance = require_complete(self.path)
        check_footers(self.path, self.provenance)
        self._folder = Path(os.path.abspath(self.path))  # rows are mapped later, wherever the process is then
        self._file: Path | None = None
        self._mapped: pa.Table | None = None
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None
        self._is_checked = np.zeros(len(self), dtype=bool)

    @property
    def _table(self) -> "pa.Table":
        if self._mapped is None:
            self.map_rows()
        return self._mapped

    def map_rows(self) -> None:
        """Map the rows into memory; converted first where the cache lacks them, or holds an older state of the shards.

        Reading a row does it; called before workers start, its errors come before them.

        Raises:
            InputError: damaged shards, or of another store than was opened. RunError: the cache cannot be written.
        """
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                self._mapped = mapped_table(self._file)
                return
        if require_complete(self._folder) != self.provenance:
            raise InputError(
                f"map store {str(self.path)!r} is another than it was when it was opened; run the same command again"
            )
        shards = shard_paths(self._folder, self.provenance)
        self._file = arrow_file(shards, self.provenance)
        try:
            self._mapped = mapped_table(self._file)
        except FileNotFoundError:  # another process has seen the shards touched, and replaced it in between
            self._file = arrow_file(shards, self.provenance)
            self._mapped = mapped_table(self._file)
        self._sorted, self._is_checked = None, np.zeros(len(self), dtype=bool)

    def __len__(self) -> int:
        return self.provenance.n

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}

    @property
    def rows(self) -> "datasets.Dataset":
        """The memory-mapped Hugging Face dataset, one row per image; opened by each call."""
        import datasets  # here alone: see arrow_cache.py

        self.map_rows()
        return datasets.Dataset.from_file(str(self._file)).cast_column("map", datasets.Image(decode=False))

    @property
    def signed(self) -> bool:
        """Whether the maps have a sign (reduction "sum")."""
        return self.provenance.options.signed

    def require_maps(self) -> None:
        """Raise InputError where the store holds logits alone."""
        if not self.provenance.options.has_maps:
            raise InputError(
                f"map store {str(self.path)!r} holds logits alone; build maps into another folder: timm-igkd maps "
                "--method ig --logits"
            )

    @property
    def has_logits(self) -> bool:
        """Whether the teacher's logits are stored too."""
        return self.provenance.logits

    def find(self, image: Image.Image, label: int, index: int | None, name: Name) -> int:
        """Return the row that belongs to an image.

        Args:
            image: 8-bit RGB, untransformed.
            label: its label; where equal images have several labels, the row with this one is taken.
            index: its position in the dataset, from the end where it is negative, tried first; or None.
            name: how errors call the image.

        Raises:
            InputError: the image has no row, or its row was made for another label.
        """
        key = content_key(image)
        position = -1 if index is None else int(index) + self.provenance.dataset.num_images * (index < 0)
        is_row = 0 <= position < len(self)
        if is_row and (self._cell("key", position), self._cell("label", position)) == (key, label):
            return position
        candidates = self._candidates(key)
        if not len(candidates):
            raise InputError(self._missing(text(name), is_row))
        labels = [self._cell("label", int(row)) for row in candidates]
        if label in labels:
            return int(candidates[labels.index(label)])
        if self.provenance.options.needs_labels:
            raise InputError(
                f"{text(name)} has label {label}, but its map was made "
                f"for label {labels[0]}; rebuild the maps with these labels"
            )
        return int(candidates[0])

    def _candidates(self, key: str) -> np.ndarray:
        if self._sorted is None:
            self._sorted = sorted_keys(self._table)
        keys, order = self._sorted
        encoded = np.bytes_(key)
        return order[np.searchsorted(keys, encoded, "left") : np.searchsorted(keys, encoded, "right")]

    def _cell(self, column: str, row: int) -> Any:
        return self._table.column(column)[row].as_py()

    def _missing(self, name: str, has_position: bool) -> str:
        """Return what to do where an image has no row; `has_position`: there is one of another at its position."""
        source, has_maps = self.provenance.dataset, self.provenance.options.has_maps
        what, method = ("map", "") if has_maps else ("row", " --method none")
        n, total = self.provenance.n, source.num_images
        if n < total and not has_position:
            split = "" if source.split == UNKNOWN_SPLIT else f" --split {source.split}"
            return (
                f"{name} has no {what}: the store covers the first {n} of {total} images of split {source.split!r}; "
                f"rebuild it without --limit: timm-igkd maps{method}{split}"
            )
        return (
            f"{name} has no {what}: its pixels are in none of the {n} rows, which were made from {source.name!r} split "
            f"{source.split!r}{f', the first of {total} images' * (n < total)} (pixels decoded by Pillow "
            f"{self.provenance.versions.get('pillow')}, not rotated by EXIF, as `datasets` does); build "
            f"{'maps' if has_maps else 'logits'} of this data with: timm-igkd maps{method}"
        )

    def row(self, row: int) -> MapRow:
        """Return all that a row holds.

        This and all that reads a row below raises an InputError where the row is damaged, held against its hash and
        the manifest; the parts alone are so the first time that one of them is read.
        """
        cells = {name: self._cell(name, row) for name in self._table.column_names}
        found = read_row(cells, self.provenance, f"row {row} of map store {str(self.path)!r}")
        self._is_checked[row] = True
        return found

    def _read(self, column: str, row: int) -> Any:
        """Return a part of a row; a map as its levels."""
        if not self._is_checked[row]:
            return getattr(self.row(row), column)
        cell = self._cell(column, row)
        return decode_png(cell["bytes"]) if column == "map" else cell

    def levels(self, row: int) -> np.ndarray:
        """Return a stored map as it is, [H, W] uint8 (see `row_format.quantize`); an InputError where there is none."""
        self.require_maps()
        return np.asarray(self._read("map", row))

    def overlay_map(self, row: int) -> Image.Image:
        """Return a map in the form the overlay takes: 8-bit greyscale, a signed map rectified."""
        image = Image.fromarray(self.levels(row))
        return rectify(image) if self.signed else image

    def float_map(self, row: int) -> np.ndarray:
        """Return a map in units of the integrated output, [H, W] float32, to 1/255 (signed: 1/127) of its scale."""
        levels, scale = self.levels(row).astype(np.float32), self._read("scale", row)
        return (levels - 128) * (scale / 127) if self.signed else levels * (scale / 255)

    def require_logits(self, dataset: Any = None) -> None:
        """Raise InputError unless the store holds the teacher's logits, with its columns in a data set's class order.

        See `check_class_numbers`.
        """
        if not self.has_logits:
            raise InputError(
                f"map store {str(self.path)!r} has no logits; rebuild it with --logits, or use a live teacher"
            )
        if dataset is not None:
            where, remedy = f"in the logits of {str(self.path)!r}", "store its own: timm-igkd maps --method none"
            check_class_numbers(dataset, self.provenance.dataset.class_names, where, remedy)

    def labels_decide(self, dataset: Any) -> bool:
        """Return whether labels alone tell if the logits' columns are a data set's classes: both name none of them."""
        return not set(self.provenance.dataset.class_names or ()) & set(class_names(dataset) or ())

    def logits(self, row: int, label: int | None = None, name: Name = "the image") -> np.ndarray:
        """Return the teacher's stored logits for the clean image, [classes] float32.

        Args:
            row: of `find`.
            label: the image's, held against the row's; None where class names tell that the columns are right.
            name: how errors call the image.

        Raises:
            InputError: the row is of another label, where both images have one, or damaged; or there are no logits.
        """
        self.require_logits()
        stored = -1 if label is None else self._cell("label", row)
        if label is not None and stored >= 0 and 0 <= label != stored:
            raise InputError(
                f"{text(name)} has label {label}, but its logits were stored for label {stored}, and no class is named "
                "on both sides, by which their order were known; store them anew: timm-igkd maps --method none"
            )
        return np.asarray(self._read("logits", row), dtype=np.float32)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool = False,
        *,
        overwrite_card: bool = False,
        replace: bool = False,
        create_pr: bool = False,
        timeout_s: float = TIMEOUT_S,
    ) -> Pushed:
        """Publish the store as a dataset of the Hub, see `push_maps`."""
        return push_maps(
            self.path,
            repo_id,
            private,
            overwrite_card=overwrite_card,
            replace=replace,
            create_pr=create_pr,
            timeout_s=timeout_s,
        )

    def verify(self, dataset: Any, progress: Callable = lambda rows: rows) -> None:
        """Check strictly that row i is the map of image i, for all rows, and that nothing of a row was altered.

        Args:
            dataset: map-style dataset of (PIL image, label), of which the maps are said to be.
            progress: yields the rows that it is given, and may show how far they are.

        Raises:
            InputError: the first row that fails is named.
        """
        refuse_overlaid(dataset)
        total, rows, keys = self.provenance.dataset.num_images, stored_rows(self.path, self.provenance), list[str]()
        for index in progress(range(min(len(self), len(dataset)))):
            keys.append(check_row_of(next(rows), self.provenance, dataset, index))
        if len(dataset) != total:
            raise InputError(
                f"the dataset has {len(dataset)} images, but the maps were made from a split of {total}; row "
                f"{min(len(dataset), total)} is the first without its counterpart"
            )
        for _ in rows:  # checks the last pages
            pass
        check_order(self.path, self.provenance, keys)
