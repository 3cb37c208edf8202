"""Labelled images from anywhere: Hub datasets, parquet and class folders, scikit-learn's digits, timm and torchvision.

Every image is decoded as timm does it (images.py) and named in every error. Nothing is ever skipped or replaced.
`datasets` is imported by the functions that read with it: a training process that does not is spared pandas too.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm.data
import torch
import torch.utils.data
from huggingface_hub import errors as hub_errors
from PIL import Image

from timm_igkd.data.images import decode_image
from timm_igkd.errors import InputError, MissingFileError, RunError, nearest

if TYPE_CHECKING:
    import datasets

DIGITS_SPLITS = ("train", "validation", "test")
TIMM_PREFIXES = ("torch/", "hfds/", "folder/")


class LabeledImages(torch.utils.data.Dataset):
    """A map-style dataset of (image, label) over the rows of a Hugging Face dataset.

    Args:
        rows: a dataset with an `Image(decode=False)` column and a column of integer labels.
        name: Hub id or folder, for messages and provenance.
        split: name of the split.
        class_names: one name per class, or None where the labels are plain integers.
        revision: commit of a Hub dataset.

    Items are (8-bit RGB PIL image, or what `transform` makes of it; int label).
    """

    def __init__(
        self,
        rows: "datasets.Dataset",
        name: str,
        split: str,
        image_column: str = "image",
        label_column: str = "label",
        class_names: tuple[str, ...] | None = None,
        revision: str | None = None,
    ):
        self.rows = rows
        self.name, self.split, self.revision = name, split, revision
        self.image_column, self.label_column = image_column, label_column
        self.class_names = class_names
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.read(index)
        return (image if self.transform is None else self.transform(image)), label

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return row `index` as (8-bit RGB image, label), before any transform."""
        row = self.rows[int(index)]
        cell, label = row[self.image_column], row[self.label_column]
        name = self._row_name(index, cell)
        if label is None or cell is None:
            raise InputError(f"{name} has no {'label' if label is None else 'image'}; remove the row")
        data = cell["bytes"]
        if data is None:
            try:
                data = Path(cell["path"]).read_bytes()
            except OSError as error:
                raise InputError(f"{name} cannot be read ({error.strerror}); restore or remove it") from error
        return decode_image(data, name), int(label)

    def row_name(self, index: int) -> str:
        """Return how messages name a row: its number, its file where it has one, dataset and split."""
        return self._row_name(index, self.rows[int(index)][self.image_column])

    def _row_name(self, index: int, cell: dict[str, Any] | None) -> str:
        path = cell and cell["path"]
        file = f" ({os.path.basename(path)})" if path else ""
        return f"image {index}{file} of {self.name!r} split {self.split!r}"

    @property
    def labels(self) -> np.ndarray:
        """All labels, [n] int64, without decoding an image."""
        return np.asarray(self.rows.with_format("numpy")[self.label_column][:], dtype=np.int64)

    @property
    def num_classes(self) -> int:
        """Number of class names, or the largest label + 1."""
        return len(self.class_names) if self.class_names else int(self.labels.max()) + 1

    def subset(self, indices: Any) -> "LabeledImages":
        """Return a dataset of the given rows, in that order."""
        names = (self.name, self.split, self.image_column, self.label_column, self.class_names, self.revision)
        return LabeledImages(self.rows.select(indices), *names)


def load_labeled_images(
    dataset: str,
    split: str,
    image_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
) -> Any:
    """Open a dataset by name.

    Args:
        dataset: a Hub dataset id; a local folder of parquet files, of class folders or written by `save_to_disk`;
            `digits`; or a timm dataset name (`torch/cifar10`, `hfds/user/name`, `folder/`) with `data_dir` as its root.
        split: name of the split.
        image_column: needed where the first column of type Image is not the one wanted.
        label_column: needed where the first ClassLabel column is not the one wanted.
        revision: branch, tag or commit of a Hub dataset.
        data_dir: root folder of a timm dataset.

    Returns:
        LabeledImages, or timm's own dataset for a timm name.

    Raises:
        MissingFileError: no such folder. InputError: wrong split or column, corrupt data. RunError: Hub not reachable.
    """
    import datasets

    if dataset == "digits":
        return _digits(split)
    if dataset.startswith(TIMM_PREFIXES) and not os.path.exists(dataset):
        return _timm_dataset(dataset, split, data_dir)
    rows = _load_rows(dataset, split, revision)
    if len(rows) == 0:
        raise InputError(f"split {split!r} of {dataset!r} has no rows, expected at least one image")
    image_column = _find_column(rows, dataset, image_column, datasets.Image, "--image-column")
    label_column = _find_column(rows, dataset, label_column, datasets.ClassLabel, "--label-column")
    label_feature = rows.features[label_column]
    rows = rows.select_columns([image_column, label_column]).cast_column(image_column, datasets.Image(decode=False))
    return LabeledImages(
        rows,
        dataset,
        split,
        image_column,
        label_column,
        class_names=tuple(getattr(label_feature, "names", None) or ()) or None,
        revision=revision or _resolved_revision(rows),
    )


def _load_rows(dataset: str, split: str, revision: str | None) -> "datasets.Dataset":
    import datasets

    is_no_id = dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1  # an id is name or user/name
    looks_local = is_no_id or os.path.exists(dataset)
    path = os.path.expanduser(dataset)
    if looks_local and not os.path.isdir(path):
        raise MissingFileError(
            f"dataset folder {dataset!r} does not exist; give a Hub dataset id, a folder of parquet or of class "
            "folders, "
            "or 'digits'"
        )
    try:
        if looks_local and _saved_to_disk(path):
            saved = datasets.load_from_disk(path)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            if split not in splits:
                raise ValueError(f"Unknown split {split!r}. Should be one of {list(splits)}.")
            return splits[split]
        with _bars_on_a_terminal_only():
            return datasets.load_dataset(path, split=split, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise RunError(
            f"dataset {dataset!r} is missing on the Hub or gated for this login ({_first_line(error)}); check the id, "
            "accept its terms, or set HF_TOKEN"
        ) from error
    except datasets.data_files.EmptyDatasetError as error:
        raise InputError(
            f"folder {dataset!r} holds no data, expected parquet files or class folders of images"
        ) from error
    except hub_errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "unknown")
        text = "refused the token; log in again: hf auth login" if status in (401, 403) else "failed; try again later"
        raise RunError(f"the Hub's answer to dataset {dataset!r} (status {status}) {text}") from error
    except ConnectionError as error:
        raise RunError(
            f"dataset {dataset!r} cannot be fetched: {_first_line(error)}; connect, or use a local folder"
        ) from error
    except ValueError as error:
        raise InputError(f"split {split!r} of dataset {dataset!r}: {_first_line(error)}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None:
            raise RunError(f"dataset {dataset!r} cannot be prepared: {_first_line(cause)}") from error
        raise InputError(f"dataset {dataset!r} cannot be read ({_first_line(cause)}); a file is corrupt") from error


@contextmanager
def _bars_on_a_terminal_only() -> Iterator[None]:
    """Show no progress bars of `datasets` where nobody watches."""
    import datasets

    hide = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def _saved_to_disk(path: str) -> bool:
    return any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _resolved_revision(rows: "datasets.Dataset") -> str | None:
    """Return the commit a Hub dataset was read at, from the addresses datasets recorded."""
    for source in rows.info.download_checksums or ():
        _, found, commit = source.partition("@")
        if found:
            return commit.partition("/")[0]
    return None


def _find_column(rows: "datasets.Dataset", dataset: str, name: str | None, feature: type, flag: str) -> str:
    import datasets

    columns = list(rows.features)
    if name is None:
        found = [column for column, kind in rows.features.items() if isinstance(kind, feature)]
        if not found:
            raise InputError(f"{dataset!r} has no {feature.__name__} column among {columns}; name one with {flag}")
        return found[0]
    if name not in columns:
        raise InputError(f"{dataset!r} has no column {name!r}{nearest(name, columns)}; its columns are {columns}")
    kind = rows.features[name]
    is_integer = isinstance(kind, datasets.Value) and "int" in kind.dtype
    if not isinstance(kind, feature) and not (feature is datasets.ClassLabel and is_integer):
        raise InputError(
            f"column {name!r} of {dataset!r} is {kind}, expected {feature.__name__}; name another with {flag}"
        )
    return name


def _digits(split: str) -> LabeledImages:
    """scikit-learn's 1,797 digits, 8x8 enlarged to 32x32 RGB; stratified with seed 0 into 1,257 / 180 / 360."""
    import datasets

    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError(
            "dataset 'digits' needs scikit-learn; install it with: pip install 'timm-igkd[demo]'"
        ) from error
    if split not in DIGITS_SPLITS:
        raise InputError(f"dataset 'digits' has no split {split!r}; expected one of {list(DIGITS_SPLITS)}")
    digits = load_digits()
    rest, test = train_test_split(np.arange(1797), test_size=360, stratify=digits.target, random_state=0)
    train, validation = train_test_split(rest, test_size=180, stratify=digits.target[rest], random_state=0)
    chosen = np.sort({"train": train, "validation": validation, "test": test}[split])
    cells = []
    for pixels in digits.images[chosen]:
        image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).convert("RGB")
        buffer = io.BytesIO()
        image.resize((32, 32), Image.Resampling.BICUBIC).save(buffer, format="PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    names = [str(digit) for digit in range(10)]
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict({"image": cells, "label": digits.target[chosen].tolist()}, features=features)
    return LabeledImages(rows, "digits", split, class_names=tuple(names))


def _timm_dataset(name: str, split: str, data_dir: str | None) -> Any:
    if data_dir is None and not name.startswith("hfds/"):
        raise InputError(f"timm dataset {name!r} needs its root folder; give it with --data-dir")
    try:
        return timm.data.create_dataset(name, root=data_dir, split=split)
    except (AssertionError, ImportError, TypeError, RuntimeError, ValueError, OSError) as error:
        raise InputError(f"timm dataset {name!r} split {split!r} under {data_dir!r}: {_first_line(error)}") from error
