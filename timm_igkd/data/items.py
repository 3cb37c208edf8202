"""Items of any map-style dataset: the image before its transform, its label, and how messages name it.

torch's Subset and ConcatDataset are looked through; timm's ImageDataset is read through its reader.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch.utils.data
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision.datasets import DatasetFolder

from timm_igkd.data.images import decode_image, to_rgb
from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.data.labels import UNLABELED, to_label
from timm_igkd.errors import InputError, InputTypeError, without_credentials


def read_item(dataset: Any, index: int) -> tuple[Image.Image, int]:
    """Read one (8-bit RGB PIL image, label) of any map-style dataset, before its transform where it is known.

    timm's ImageDataset is read through its reader, because the dataset itself replaces an unreadable image by the next.

    Raises:
        InputTypeError: the dataset gives something else than a PIL image. InputError: the image cannot be read.
    """
    dataset, index = unwrapped(dataset, index)
    if isinstance(dataset, LabeledImages):
        return dataset.read(index)
    try:
        if isinstance(dataset, timm.data.ImageDataset):
            return _read_timm_item(dataset, index)
        item = dataset[index]
    except OSError as error:
        raise InputError(f"{row_name(dataset, index)} cannot be read ({error}); repair or remove it") from error
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise InputTypeError(
            f"{row_name(dataset, index)} is a {type(item).__name__}, expected (PIL image, label); "
            "open rows of Hugging Face datasets with timm_igkd.load_labeled_images"
        )
    image, label = item[:2]
    if not isinstance(image, Image.Image):
        raise InputTypeError(
            f"{row_name(dataset, index)} is a {type(image).__name__}, expected a PIL image; wrap the dataset before a "
            "transform is set on it"
        )
    name = row_name(dataset, index)
    return to_rgb(image, name), to_label(label, name)


def read_items(dataset: Any, indices: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
    """Yield what `read_item` reads for each of `indices`."""
    if isinstance(dataset, LabeledImages):
        return dataset.read_each(indices)
    return (read_item(dataset, index) for index in indices)


def _read_timm_item(dataset: timm.data.ImageDataset, index: int) -> tuple[Image.Image, int]:
    """Read an item of timm's dataset, with its label as the dataset gives it, UNLABELED where there is none."""
    file, target, *_ = dataset.reader[index]
    label = UNLABELED if target is None else target
    if target is not None and dataset.target_transform is not None:
        label = dataset.target_transform(target)

    def name() -> str:
        return row_name(dataset, index)

    if isinstance(file, Image.Image):
        return to_rgb(file, name), to_label(label, name)
    if isinstance(file, bytes):
        return decode_image(file, name), to_label(label, name)
    with file:
        return decode_image(file.read(), name), to_label(label, name)


def unwrapped(dataset: Any, index: int) -> tuple[Any, int]:
    """Return the dataset within torch's Subset and ConcatDataset that holds item `index`, and its index there."""
    while isinstance(dataset, torch.utils.data.Subset | torch.utils.data.ConcatDataset):
        if isinstance(dataset, torch.utils.data.Subset):
            dataset, index = dataset.dataset, int(dataset.indices[index])
        else:
            index += len(dataset) if index < 0 else 0
            part = int(np.searchsorted(dataset.cumulative_sizes, index, side="right"))
            start = dataset.cumulative_sizes[part - 1] if part else 0
            dataset, index = dataset.datasets[part], index - start
    return dataset, index


def first_part(dataset: Any) -> Any:
    """Return the first dataset within torch's Subset and ConcatDataset."""
    while isinstance(dataset, torch.utils.data.Subset | torch.utils.data.ConcatDataset):
        dataset = dataset.dataset if isinstance(dataset, torch.utils.data.Subset) else dataset.datasets[0]
    return dataset


def parts(dataset: Any) -> list[Any]:
    """Return all datasets within torch's Subset and ConcatDataset."""
    if isinstance(dataset, torch.utils.data.Subset):
        return parts(dataset.dataset)
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        return [found for part in dataset.datasets for found in parts(part)]
    return [dataset]


def row_name(dataset: Any, index: int) -> str:
    """Return how messages name row `index` of any dataset."""
    dataset, index = unwrapped(dataset, index)
    if isinstance(dataset, LabeledImages):
        return dataset.row_name(index)
    file = ""
    if isinstance(dataset, timm.data.ImageDataset):
        with contextlib.suppress(NotImplementedError, AssertionError, KeyError, TypeError):
            name = dataset.filename(index, basename=True)
            file = f" ({name})" if name else ""  # a row of hfds/ may have none
    return f"image {index}{file} of {dataset_name(dataset)!r}"


def dataset_name(dataset: Any) -> str:
    """Return the dataset's `name`, its root folder, or its class."""
    dataset = first_part(dataset)
    reader = getattr(dataset, "reader", dataset)
    name = str(getattr(dataset, "name", None) or getattr(reader, "root", None) or type(dataset).__name__)
    return without_credentials(name)


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
    for part in parts(dataset):
        folder = _searched_folder(part)
        if folder is not None and os.path.realpath(folder) in places:
            raise InputError(f"{str(out)!r} lies among the images of {dataset_name(part)!r}; {remedy}")


def refuse_overlaid(dataset: Any) -> None:
    """Raise InputError where a dataset, or a part of it, is overlaid already: maps are of the images as they are."""
    for part in parts(dataset):
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
    if isinstance(dataset, torch.utils.data.Subset):
        labels = known_labels(dataset.dataset)
        return None if labels is None else labels[np.asarray(dataset.indices, dtype=np.int64)]
    found = dataset.labels if isinstance(dataset, LabeledImages) else getattr(dataset, "targets", None)
    labels = None if found is None else np.asarray(found)
    return labels if labels is not None and labels.shape == (len(dataset),) and labels.dtype.kind in "iu" else None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _labeled_parts(dataset: Any) -> list[Any]:
    """Return the datasets within torch's Subset and ConcatDataset; without those that were added for their images."""
    if isinstance(dataset, torch.utils.data.Subset):
        return _labeled_parts(dataset.dataset)
    if isinstance(dataset, torch.utils.data.ConcatDataset) and not hasattr(dataset, "unlabeled"):
        return [found for part in dataset.datasets for found in _labeled_parts(part)]
    return [first_part(dataset)]


def _own_class_names(dataset: Any) -> tuple[str, ...] | None:
    if isinstance(dataset, LabeledImages):
        return dataset.class_names
    classes = getattr(dataset, "classes", None)
    if classes is not None and len(classes):  # an array of numpy's has no truth
        return tuple(str(name) for name in classes)
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
