"""Data sets with names of their own: scikit-learn's digits, for a demo without a network, timm's and torchvision's."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from torchvision.datasets import DatasetFolder

from timm_igkd.data.folders import SPLIT_NAMES, check_folder
from timm_igkd.data.images import Name, decode_image
from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.data.labels import UNLABELED
from timm_igkd.errors import InputError, first_line

HFDS = "hfds/"
TIMM_PREFIXES = ("torch/", HFDS, "folder/")
_TRAIN_OR_TEST = {"cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist"}
DIGITS_SPLITS = ("train", "validation", "test")
TIMMS_SPLITS = ({"train", "training"}, {"val", "valid", "validation", "eval", "evaluation"})
"""Names that timm takes for one another; its own table is private, a test holds this one against it."""


def load_digits_split(split: str) -> LabeledImages:
    """Return scikit-learn's 1,797 digits, 8x8 enlarged to 32x32 RGB; stratified with seed 0 into 1,257 / 180 / 360."""
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


def load_timm_dataset(name: str, split: str, data_dir: str | None) -> Any:
    """Return timm's own dataset of a name, which knows its `split`.

    timm reads any other name of a split as the test split, or as all images below the root.

    Args:
        name: `torch/…` or `folder/`.
        split: a folder of the root, or a name that timm knows for one.
        data_dir: the root.

    Raises:
        InputError: no root, a split that timm would not find, or whatever timm and torchvision refuse.
    """
    if data_dir is None:
        raise InputError(f"timm dataset {name!r} needs its root folder; give it with --data-dir")
    root = check_folder(data_dir)
    _check_timms_split(name, split, root)
    try:
        dataset: Any = timm.data.create_dataset(name, root=root, split=split)
    except (AssertionError, ImportError, TypeError, RuntimeError, ValueError, OSError) as error:
        raise InputError(f"timm dataset {name!r} split {split!r} under {data_dir!r}: {first_line(error)}") from error
    dataset.split = split
    return dataset


def _check_timms_split(name: str, split: str, root: str) -> None:
    """Refuse a split that timm would read as another, without a word."""
    kind = name.lower().rpartition("/")[2]
    if kind in ("", "folder", "image_folder"):
        folders = [entry for entry in sorted(os.listdir(root)) if os.path.isdir(os.path.join(root, entry))]
        is_whole = split in SPLIT_NAMES and not SPLIT_NAMES.intersection(folder.lower() for folder in folders)
        if split in folders or _synonyms(split).intersection(folders) or is_whole:
            return
        found = f"its folders are {folders}"
    elif split in SPLIT_NAMES or kind not in _TRAIN_OR_TEST:  # the others check it themselves
        return
    else:
        found = f"timm knows {sorted(SPLIT_NAMES)}"
    raise InputError(
        f"timm dataset {name!r} has no split {split!r}, {found}; name one of them, without a part in brackets"
    )


def _synonyms(split: str) -> set[str]:
    """Return the folders that timm takes for a split."""
    return next((names for names in TIMMS_SPLITS if split in names), set())


def named_split(dataset: Any) -> str | None:
    """Return the split that a dataset, or timm's reader in it, says it is of; None where neither does."""
    for holder in (dataset, getattr(dataset, "reader", None)):
        found = getattr(holder, "split", None)
        if found and not callable(found):
            return str(found)
    is_train = getattr(dataset, "train", None)  # of torchvision's CIFAR and MNIST
    return ("train" if is_train else "test") if isinstance(is_train, bool) else None


def read_timm_item(dataset: timm.data.ImageDataset, index: int, name: Name) -> tuple[Image.Image, Any]:
    """Read an item of timm's dataset before its transform, with its label, UNLABELED where there is none.

    The dataset itself reads the next image in an unreadable one's place.
    """
    file, target, *_ = dataset.reader[index]
    label = UNLABELED if target is None else _applied(dataset.target_transform, target)
    if isinstance(file, Image.Image):
        return file, label
    if isinstance(file, bytes):
        return decode_image(file, name), label
    with file:
        return decode_image(file.read(), name), label


def read_folder_item(dataset: DatasetFolder, index: int, name: Name) -> tuple[Any, Any]:
    """Read an item of torchvision's folder through its transforms; its own loader clips 16-bit pixels."""
    path, label = dataset.samples[index]
    image = decode_image(Path(path).read_bytes(), name)
    return _applied(dataset.transform, image), _applied(dataset.target_transform, label)


def _applied(transform: Callable[[Any], Any] | None, value: Any) -> Any:
    return value if transform is None else transform(value)
