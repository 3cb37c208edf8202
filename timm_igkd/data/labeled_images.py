"""Rows of a Hugging Face dataset as (image, label) items, each named in every error."""

import copy
import itertools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.utils.data
import xxhash
from PIL import Image

from timm_igkd.data.folders import splits_share
from timm_igkd.data.images import check_header, decode_image
from timm_igkd.data.labels import UNLABELED, evenly_spread, label_table, to_label
from timm_igkd.errors import InputError, without_credentials
from timm_igkd.progress import progress_bar

if TYPE_CHECKING:
    import datasets

_ROWS_AT_ONCE = 1000
MOST_SHARED = 0.01
"""Share of a split's images that may be elsewhere too, byte for byte: public data sets have some twins, some blank."""
MOST_TWINS = 0.1
"""The same of two splits of a data set: more are told from MOST_SHARED on, and refused from here."""


class LabeledImages(torch.utils.data.Dataset):
    """A map-style dataset of (image, label) over the rows of a Hugging Face dataset.

    Args:
        rows: a dataset with an `Image(decode=False)` column and a column of integer labels.
        name: Hub id or folder, for messages and provenance.
        split: name of the split.
        image_column: of the images.
        label_column: of the labels; None: the images have none, and every item's label is UNLABELED.
        class_names: one name per class, or None where the labels are plain integers.
        revision: commit of a Hub dataset.
        roots: folders that image files named in rows must lie below.
        folder: whose files are taken for data, at whatever depth; None where rows come from elsewhere.

    Items are (8-bit RGB PIL image, or what `transform` makes of it; int label).
    """

    def __init__(
        self,
        rows: "datasets.Dataset",
        name: str,
        split: str,
        image_column: str = "image",
        label_column: str | None = "label",
        class_names: tuple[str, ...] | None = None,
        revision: str | None = None,
        roots: Sequence[str] = (),
        folder: str | None = None,
    ):
        self.rows = rows
        self.name, self.split, self.revision = without_credentials(name), split, revision
        self.image_column, self.label_column = image_column, label_column
        self.class_names, self.roots = class_names, [os.path.abspath(root) for root in roots]
        self.folder = folder
        self.is_part = False  # True after `subset`: not the whole split
        self._digests: list[bytes] = []
        self._label_table: np.ndarray | None = None
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.read(index)
        return (image if self.transform is None else self.transform(image)), label

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return row `index` as (8-bit RGB image, label), before any transform."""
        row = self.rows[int(index)]
        return self._decoded(
            index, row[self.image_column], UNLABELED if self.label_column is None else row[self.label_column]
        )

    def read_each(self, indices: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """Yield what `read` returns for each of `indices`; the table is asked once for all of them."""
        rows = self.rows[[int(index) for index in indices]]
        labels = [UNLABELED] * len(indices) if self.label_column is None else rows[self.label_column]
        yield from map(self._decoded, indices, rows[self.image_column], labels)

    def _decoded(self, index: int, cell: dict[str, Any] | None, label: Any) -> tuple[Image.Image, int]:
        name = self._row_name(index, cell)
        if label is None:
            raise InputError(f"{name} has no label; remove the row")
        if cell is None:
            remedy = "remove the row"
            if self.rows.builder_name == "webdataset":  # `datasets` keeps the members of the first ones' kinds alone
                remedy = (
                    f"give all members of the tars images of one format, as the first ones are .{self.image_column}"
                )
            raise InputError(f"{name} has no image; {remedy}")
        data = cell["bytes"] if cell["bytes"] is not None else self._read_file(cell["path"], name)
        image = decode_image(data, name)
        return image, UNLABELED if self.label_column is None else self._ordered(to_label(label, name), name)

    def _read_file(self, path: str | None, name: str) -> bytes:
        """Return a file that a row names instead of holding it; only below the dataset's own folder is one read."""
        if path is None:
            raise InputError(f"{name} has neither bytes nor a path; remove the row")
        file = os.path.abspath(path)  # links below the folder are the user's own, ".." is not followed out of it
        if not any(file.startswith(os.path.join(root, "")) for root in self.roots):
            raise InputError(
                f"{name} names {path!r}, a file outside of its dataset's folder; put the image's bytes into the row"
            )
        try:
            if not stat.S_ISREG(os.stat(file).st_mode):
                raise InputError(f"{name} names {path!r}, which is no regular file; remove the row")
            with open(file, "rb", buffering=0) as opened:
                return opened.read()
        except OSError as error:
            raise InputError(f"{name} cannot be read ({error.strerror}); restore or remove it") from error

    def _ordered(self, label: int, name: str) -> int:
        """Return a label in the order of `class_names`."""
        if self._are_outside(label):
            raise InputError(f"{name} has label {label}, expected {self._expected_labels}; correct the row")
        return label if self._label_table is None else int(self._label_table[label])

    @property
    def _num_own_classes(self) -> int | None:
        """How many classes the rows' own labels count, before they are put in order; None where that is not known."""
        own = self.class_names if self._label_table is None else self._label_table
        return len(own) if own is not None and len(own) else None

    @property
    def _expected_labels(self) -> str:
        count = self._num_own_classes
        return f"0 to {count - 1}" if count is not None else "a class counted from 0"

    def _are_outside(self, labels: Any) -> Any:
        """Say of rows' own labels, an int or an array, whether they are of no class; -1 too, which says UNLABELED."""
        count = self._num_own_classes
        return (labels < 0) | (labels >= (np.inf if count is None else count))

    def row_name(self, index: int) -> str:
        """Return how messages name a row: its number, its file where it has one, dataset and split."""
        return self._row_name(index, self.rows[int(index)][self.image_column])

    def _row_name(self, index: int, cell: dict[str, Any] | None) -> str:
        path = cell and cell["path"]
        file = f" ({os.path.basename(path)})" if path else ""
        return f"image {index}{file} of {self.name!r} split {self.split!r}"

    @property
    def labels(self) -> np.ndarray:
        """All labels, [n] int64, without decoding an image.

        Raises:
            InputError: a row without a label, or with one outside of the classes.
        """
        if self.label_column is None:
            return np.full(len(self), UNLABELED, dtype=np.int64)
        column = self.rows.select_columns([self.label_column]).with_format("arrow")[:][self.label_column]
        if column.null_count:
            first = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise InputError(f"{self.row_name(first)} has no label; remove the row")
        values = np.asarray(column.to_numpy(), dtype=np.int64)
        outside = np.flatnonzero(self._are_outside(values))
        if len(outside):
            first = int(outside[0])
            raise InputError(
                f"{self.row_name(first)} has label {values[first]}, expected {self._expected_labels}; correct or "
                "remove the row"
            )
        return values if self._label_table is None else self._label_table[values]

    def content_hash(self) -> str:
        """Return a hash of all encoded images and labels in their order, 32 hex digits.

        Of the bytes of files, not of decoded pixels: as fast as reading them, and another for any change of a pixel.
        """
        digest, self._digests = xxhash.xxh3_128(self.labels.tobytes()), []
        for data, _ in progress_bar(self._files(), total=len(self), desc=f"hash {self.split}", unit="img"):
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
            self._digests.append(xxhash.xxh3_128_digest(data))
        return digest.hexdigest()

    def check_images(self, num_decoded: int) -> None:
        """Read every image once, so that one that cannot be used is found before it is needed.

        Args:
            num_decoded: so many, from the first on, are decoded whole; of the others the header alone is looked at,
                which tells size and kind of pixels, but not that a file is cut.

        Raises:
            InputError: the first image that is not there or cannot be decoded; see `images.decode_image`.
        """
        files = progress_bar(self._files(), total=len(self), desc=f"check {self.split}", unit="img")
        for index, (data, name) in enumerate(files):
            (decode_image if index < num_decoded else check_header)(bytes(data), name)

    def common_size(self, num_images: int) -> tuple[int, int] | None:
        """Return (height, width) of the images, by the headers of `num_images` evenly spread ones; None: several."""
        spread = self._files(evenly_spread(len(self), num_images))
        sizes = (check_header(bytes(data), name) for data, name in spread)
        first = next(sizes)
        return first if all(size == first for size in sizes) else None

    def _files(self, indices: Sequence[int] | None = None) -> Iterator[tuple[Any, str]]:
        """Yield each image, or those at `indices`, encoded, bytes or a buffer of them, and how messages name it."""
        columns = self.rows.select_columns([self.image_column]).with_format("arrow")
        columns, numbers = (columns, itertools.count()) if indices is None else (columns.select(indices), iter(indices))
        for batch in columns.iter(_ROWS_AT_ONCE):
            for cell in batch[self.image_column]:
                path, data = cell["path"].as_py(), cell["bytes"].as_buffer()
                name = self._row_name(next(numbers), {"path": path})
                yield self._read_file(path, name) if data is None else data, name

    def shares_images(self, other: "LabeledImages") -> bool:
        """Return whether images of another dataset are here too.

        Told by the names of source and split; where these do not tell, by the files: of two parts or stretches of one
        split, such as train[:80%] and train[70%:], and of a folder within the other's.
        """
        sources = [(_source_of(each.name), each.revision) for each in (self, other)]
        if sources[0] == sources[1]:
            told = splits_share(self.split, other.split)
            told = None if told and self.is_part and other.is_part else told
        else:
            folders = [os.path.realpath(each.folder) for each in (self, other) if each.folder]
            told = None if len(folders) == 2 and os.path.commonpath(folders) in folders else False
        return self.num_shared(other) > MOST_SHARED * len(other) if told is None else told

    def num_shared(self, other: "LabeledImages") -> int:
        """Return how many of another dataset's images are here too, byte for byte; all files of both are read once."""
        here = set(self._image_digests())
        return sum(digest in here for digest in other._image_digests())

    def _image_digests(self) -> list[bytes]:
        """Return a hash of each encoded image, kept from `content_hash` where that was asked for."""
        if len(self._digests) != len(self):
            files = progress_bar(self._files(), total=len(self), desc=f"compare {self.split}", unit="img")
            self._digests = [xxhash.xxh3_128_digest(data) for data, _ in files]
        return self._digests

    @property
    def has_labels(self) -> bool:
        """Whether the images have labels at all."""
        return self.label_column is not None

    @property
    def num_classes(self) -> int:
        """Number of class names, or the largest label + 1; 0 where there are neither names nor labels."""
        return len(self.class_names) if self.class_names else int(self.labels.max()) + 1

    def subset(self, indices: Any) -> "LabeledImages":
        """Return a dataset of the given rows, in that order."""
        found = copy.copy(self)
        found.rows, found.transform, found.is_part = self.rows.select(indices), None, True
        found._digests = []
        return found

    def without_labels(self, class_names: Sequence[str] | None = None) -> "LabeledImages":
        """Return the same images without labels; with the names of the classes that a model shall tell apart."""
        found = copy.copy(self)
        found.label_column, found._label_table = None, None
        found.class_names = None if class_names is None else tuple(class_names)
        return found

    def in_class_order(self, names: Sequence[str]) -> "LabeledImages":
        """Return the same images with labels that count the classes in the order of `names`.

        Raises:
            InputError: a class of these images that is not among `names`, or images without class names.
        """
        what = f"split {self.split!r} of {self.name!r}"
        if self.class_names is None:
            raise InputError(
                f"{what} has labels without class names, expected the names of its classes; make it a ClassLabel column"
            )
        found = copy.copy(self)
        table = label_table(self.class_names, names, what)
        if table is not None:
            found._label_table = table if self._label_table is None else table[self._label_table]
        elif self._label_table is None:
            found._label_table = np.arange(len(self.class_names))  # rows still have labels of these classes alone
        found.class_names = tuple(names)
        return found


def _source_of(name: str) -> str:
    """Return a dataset's name, a folder's as its real path."""
    path = os.path.expanduser(name)
    return os.path.realpath(path) if os.path.exists(path) else name
