"""Items of any map-style dataset: the image before its transform, its label, and how messages name it.

torch's Subset and ConcatDataset are looked through; timm's ImageDataset and torchvision's folders are read by file.
A subclass with a `__getitem__` of its own is asked for its items, whatever it holds: see `gives_items_of`.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import default_loader, pil_loader

from timm_igkd.data.images import Name, text, to_rgb
from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.data.labels import to_label
from timm_igkd.data.named_datasets import named_split, read_folder_item, read_timm_item
from timm_igkd.errors import InputError, InputTypeError, UserError, first_line, without_credentials

UNKNOWN_SPLIT = "unknown"
"""The split of images whose data set names none."""
# What Pillow raises on a damaged or huge image, and the system on a missing file.
_UNREADABLE = (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def gives_items_of(dataset: Any, kind: Any) -> bool:
    """Return whether a dataset is of a class and gives that class's items: no `__getitem__` of its own changes them."""
    return isinstance(dataset, kind) and type(dataset).__getitem__ is kind.__getitem__


def gives_rows(dataset: Any) -> bool:
    """Return whether a dataset's items are the rows of a LabeledImages as they are stored."""
    return gives_items_of(dataset, LabeledImages) and type(dataset).read is LabeledImages.read


def read_item(dataset: Any, index: int) -> tuple[Image.Image, int]:
    """Read one (8-bit RGB PIL image, label) of any map-style dataset, before its transform where it is known.

    timm's ImageDataset is read through its reader, because the dataset itself replaces an unreadable image by the next.

    Raises:
        InputTypeError: the dataset gives something else than a PIL image. InputError: the image cannot be read.
    """
    dataset, index = unwrapped(dataset, index)
    if gives_items_of(dataset, LabeledImages):
        return dataset.read(index)

    def name() -> str:
        return row_name(dataset, index)

    try:
        image, label = _own_item(dataset, index, name)
        if not isinstance(image, Image.Image):
            raise InputTypeError(
                f"{name()} is a {type(image).__name__}, expected a PIL image; wrap the dataset before a transform is "
                "set on it"
            )
        image = to_rgb(image, name)
        image.load()  # Pillow reads what it has opened only now
        return image, to_label(label, name)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{name()} cannot be read ({first_line(error)}); repair or remove it") from error


def read_items(dataset: Any, indices: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
    """Yield what `read_item` reads for each of `indices`."""
    if gives_rows(dataset):
        return dataset.read_each(indices)
    return (read_item(dataset, index) for index in indices)


def _own_item(dataset: Any, index: int, name: Name) -> tuple[Any, Any]:
    """Return image and label as a dataset gives them; of timm's and torchvision's files, decoded with our checks."""
    if gives_items_of(dataset, ImageDataset):
        return read_timm_item(dataset, index, name)
    if gives_items_of(dataset, DatasetFolder) and dataset.loader in (default_loader, pil_loader):
        return read_folder_item(dataset, index, name)
    item = dataset[index]
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise InputTypeError(
            f"{text(name)} is a {type(item).__name__}, expected (PIL image, label); open a Hugging Face dataset by its "
            'name or folder with timm_igkd.load_labeled_images, or wrap it to give (row["image"], row["label"])'
        )
    return item[0], item[1]


def unwrapped(dataset: Any, index: int) -> tuple[Any, int]:
    """Return the dataset within torch's Subset and ConcatDataset that holds item `index`, and its index there."""
    while True:
        if gives_items_of(dataset, Subset):
            dataset, index = dataset.dataset, int(dataset.indices[index])
        elif gives_items_of(dataset, ConcatDataset):
            index += len(dataset) if index < 0 else 0
            part = int(np.searchsorted(dataset.cumulative_sizes, index, side="right"))
            start = dataset.cumulative_sizes[part - 1] if part else 0
            dataset, index = dataset.datasets[part], index - start
        else:
            return dataset, index


def first_part(dataset: Any) -> Any:
    """Return the first dataset within torch's Subset and ConcatDataset."""
    return parts(dataset)[0]


def parts(dataset: Any, looks_through: Callable[[Any, type], bool] = gives_items_of) -> list[Any]:
    """Return all datasets within torch's Subset and ConcatDataset, in order.

    Args:
        dataset: any.
        looks_through: says of a dataset and one of these classes whether what is within counts; `isinstance`: always,
            for where images come from, whatever is made of them.
    """
    if looks_through(dataset, Subset):
        return parts(dataset.dataset, looks_through)
    if looks_through(dataset, ConcatDataset):
        return [found for part in dataset.datasets for found in parts(part, looks_through)]
    return [dataset]


def row_name(dataset: Any, index: int) -> str:
    """Return how messages name row `index` of any dataset."""
    dataset, index = unwrapped(dataset, index)
    if gives_items_of(dataset, LabeledImages):
        return dataset.row_name(index)
    file = None
    if gives_items_of(dataset, ImageDataset):
        with contextlib.suppress(NotImplementedError, AssertionError, KeyError, TypeError):
            file = dataset.filename(index, basename=True)  # a row of hfds/ may have none
    elif gives_items_of(dataset, DatasetFolder):
        file = os.path.basename(dataset.samples[index][0])
    return f"image {index}{f' ({file})' if file else ''} of {dataset_name(dataset)!r}"


def dataset_name(dataset: Any) -> str:
    """Return the dataset's `name`, its root folder, or its class."""
    dataset = first_part(dataset)
    reader = getattr(dataset, "reader", dataset)
    name = str(getattr(dataset, "name", None) or getattr(reader, "root", None) or type(dataset).__name__)
    return without_credentials(name)


def split_name(dataset: Any) -> str:
    """Return the split that a dataset or its reader names, joined by + where its parts name several; UNKNOWN_SPLIT."""
    own = named_split(dataset)
    return own or "+".join(dict.fromkeys(named_split(part) or UNKNOWN_SPLIT for part in parts(dataset)))


def is_part(dataset: Any) -> bool:
    """Return whether images were chosen from a dataset, or put in another order, as far as that is known."""
    if gives_items_of(dataset, Subset):
        return is_part(dataset.dataset) or list(dataset.indices) != list(range(len(dataset.dataset)))
    if gives_items_of(dataset, ConcatDataset):
        return any(is_part(part) for part in dataset.datasets)
    return getattr(dataset, "is_part", False) is True


def refuse_among_images(dataset: Any, out: str | Path, remedy: str) -> None:
    """Raise InputError for an output in a folder whose files are taken for data: it would become a part of it.

    `datasets` reads the most frequent kind of files in a folder: two pictures beside a table are the data.

    Args:
        dataset: whose images are read from there.
        out: the file or folder to be written.
        remedy: end of the message.
    """
    above = [Path(os.path.abspath(out)), Path(os.path.realpath(out))]  # as it is spelled, and through links
    places = {os.path.realpath(place) for path in above for place in (path, *path.parents)}
    for part in parts(dataset, isinstance):
        folder = _searched_folder(part)
        if folder is not None and os.path.realpath(folder) in places:
            raise InputError(f"{str(out)!r} lies among the images of {dataset_name(part)!r}; {remedy}")


def refuse_overlaid(dataset: Any) -> None:
    """Raise InputError where a dataset, or a part of it, is overlaid already: maps are of the images as they are."""
    for part in parts(dataset, isinstance):
        if getattr(part, "is_overlaid", False) is True:
            raise InputError(
                f"{dataset_name(part)!r} is overlaid already, by the {type(part).__name__} that holds it, and has no "
                "maps of overlaid images; give the images without it (run a script that overlays them without "
                "`timm-igkd run`)"
            )


def _searched_folder(dataset: Any) -> str | None:
    """Return the folder whose files a data set takes for data, at whatever depth; None where it does not."""
    if isinstance(dataset, LabeledImages):
        return dataset.folder
    reader = getattr(dataset, "reader", None)
    if isinstance(reader, ReaderImageFolder):
        return str(reader.root)
    if isinstance(dataset, DatasetFolder) and dataset.samples:  # whose root may be that of a download
        first, last = (os.path.dirname(os.path.abspath(dataset.samples[index][0])) for index in (0, -1))
        return os.path.commonpath([first, last])
    return None


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """Return the dataset's class names in label order, or None where it does not tell them.

    Raises:
        InputError: parts of a ConcatDataset whose labels number other classes.
    """
    found = [names for part in _labeled_parts(dataset) if (names := _own_class_names(part)) is not None]
    other = next((names for names in found if names != found[0]), None)
    if other is not None:
        raise InputError(
            f"a part of the ConcatDataset has classes {_few(found[0])}, another {_few(other)}; give all the same "
            "classes in one order"
        )
    return found[0] if found else None


def known_labels(dataset: Any) -> np.ndarray | None:
    """Return all labels of a dataset, [n] int64, where they are known without reading an image; else None."""
    if gives_items_of(dataset, Subset):
        labels = known_labels(dataset.dataset)
        return None if labels is None else labels[np.asarray(dataset.indices, dtype=np.int64)]
    is_changed = isinstance(dataset, DatasetFolder) and not gives_items_of(dataset, DatasetFolder)
    if is_changed or getattr(dataset, "target_transform", None) is not None:
        return None
    found = dataset.labels if gives_rows(dataset) else getattr(dataset, "targets", None)
    labels = None if found is None else np.asarray(found)
    return labels if labels is not None and labels.shape == (len(dataset),) and labels.dtype.kind in "iu" else None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _labeled_parts(dataset: Any) -> list[Any]:
    """Return the datasets within torch's Subset and ConcatDataset; without those that were added for their images."""
    if gives_items_of(dataset, Subset):
        return _labeled_parts(dataset.dataset)
    if gives_items_of(dataset, ConcatDataset) and not hasattr(dataset, "unlabeled"):
        return [found for part in dataset.datasets for found in _labeled_parts(part)]
    return [first_part(dataset)]


def _own_class_names(dataset: Any) -> tuple[str, ...] | None:
    if isinstance(dataset, LabeledImages):
        return dataset.class_names
    for classes in (getattr(dataset, "wnids", None), getattr(dataset, "classes", None)):  # torchvision's ImageNet: both
        if classes is not None and len(classes):  # an array of numpy's has no truth
            return tuple(", ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in classes)
    labels = _reader_labels(dataset)
    return tuple(sorted(labels, key=lambda name: labels[name])) if _are_counted(labels) else None


def check_class_numbers(dataset: Any, names: Sequence[str] | None, where: str, remedy: str) -> None:
    """Raise InputError where a class has another label in a data set than its number elsewhere.

    Names of one side alone may be other spellings.

    Args:
        dataset: whose `class_names` are looked at.
        names: of the classes elsewhere, in their order.
        where: how the message calls that place.
        remedy: what to do.
    """
    numbers = {name: number for number, name in enumerate(names or ())}
    for label, name in enumerate(class_names(dataset) or ()):
        if numbers.get(name, label) != label:
            raise InputError(
                f"class {name!r} is label {label} of {dataset_name(dataset)!r} and number {numbers[name]} {where}; "
                f"{remedy}"
            )


def class_map(dataset: Any) -> dict[str, int] | None:
    """Return the label of each class of a timm dataset whose labels are not 0, 1, 2, …, one class each; else None.

    A `class_map` file can merge classes, leave gaps, begin at 1 or give the labels of another data set.
    """
    labels = _reader_labels(first_part(dataset))
    return None if _are_counted(labels) else labels or None


def _reader_labels(dataset: Any) -> dict[str, int]:
    found = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    return {str(name): int(label) for name, label in found.items()}


def _are_counted(labels: dict[str, int]) -> bool:
    return bool(labels) and sorted(labels.values()) == list(range(len(labels)))
