"""Local folders as `datasets` can open them, whatever they are called."""

import contextlib
import os
import re
from pathlib import Path

import xxhash

from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.errors import InputError, MissingFileError

_PATTERN_SIGNS = re.compile(
    r"[*?\[\]{}!\\\x00-\x1f]|::"
)  # `datasets` reads them as patterns and addresses, not as names
_CLASS_FILE = "classes.txt"
_STREAMS = ("wds", "hfids", "tfds")
_SYSTEM_FOLDERS = ("/proc", "/sys")  # their files change under one's eyes, and to list them takes minutes


def local_folder(name: str) -> str:
    """Return the path by which `datasets` opens a local folder.

    One whose path holds signs of patterns or line ends is opened through a tree of links beside the caches of
    `datasets`, which stays there: the rows of class folders name their files by it.

    Args:
        name: as the user gave it; `~` is the home folder.

    Raises:
        MissingFileError, InputError: see `check_folder`.
    """
    path = os.path.abspath(check_folder(name))
    return _mirror(path) if _PATTERN_SIGNS.search(path) else os.path.expanduser(name)


def refuse_stream(name: str) -> None:
    """Raise InputError for timm's name of a stream, unless there is such a folder."""
    prefix, slash, _ = name.partition("/")
    if slash and prefix.lower() in _STREAMS and not os.path.exists(name):
        raise InputError(
            f"dataset {name!r} is timm's name of a stream, whose images have no index; give the folder of its tars, or "
            "a dataset of the Hub as hfds/user/name"
        )


def check_folder(name: str) -> str:
    """Return the path of a folder that can hold a dataset.

    Raises:
        MissingFileError: no such folder, or a file. InputError: a folder of the system's that holds no data.
    """
    path = os.path.expanduser(name)
    if not os.path.isdir(path):
        found = "is a file, expected a folder" if os.path.exists(path) else "does not exist"
        raise MissingFileError(
            f"dataset folder {name!r} {found}; give a Hub dataset id, a folder of parquet, of class folders or of "
            "webdataset tars, or 'digits'"
        )
    if os.path.realpath(path).startswith(_SYSTEM_FOLDERS):
        raise InputError(f"folder {name!r} holds no data, expected parquet files or class folders of images")
    return path


def image_files(folder: str) -> list[str]:
    """Return the image files at any depth below a folder, sorted by path; none where there is no such folder."""
    return sorted(
        os.path.join(root, name)
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
        if _is_image(name)
    )


def has_images(folder: str) -> bool:
    """Say whether image files lie in a folder itself, and not in folders of classes."""
    if not os.path.isdir(folder):
        return False
    with os.scandir(folder) as entries:
        return any(entry.is_file() and _is_image(entry.name) for entry in entries)


def tar_class_names(path: str) -> tuple[str, ...] | None:
    """Return the names in classes.txt beside a folder's tars, one a line as in a class map of timm's; None without it.

    Raises:
        InputError: an empty line, or a name twice.
    """
    file = os.path.join(path, _CLASS_FILE)
    if not os.path.isfile(file):
        return None
    with open(file, encoding="utf-8") as opened:
        names = tuple(line.strip() for line in opened.read().splitlines())
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"{file!r} has an empty line or a name twice, expected a name of its own for each class")
    return names


def class_files_alone(path: str, split: str) -> list[str]:
    """Return the images of a split in class folders beside a split without any, which together have no labels."""
    folders = [os.path.join(path, name) for name in os.listdir(path) if name != split]
    own = os.path.join(path, split)
    return image_files(own) if not has_images(own) and any(has_images(folder) for folder in folders) else []


def load_image_folder(dataset: str, folder: str, split: str) -> LabeledImages:
    """Return all images below a folder, in the order of their paths, as images without labels.

    Args:
        dataset: what messages call it.
        folder: that holds them, at any depth.
        split: what messages call this part of it.

    Raises:
        InputError: there are none.
    """
    import datasets  # here: see loading.py

    files = image_files(folder)
    if not files:
        raise InputError(f"folder {dataset!r} holds no images, expected files like image.png at any depth")
    cells = {"image": [{"bytes": None, "path": file} for file in files]}
    rows = datasets.Dataset.from_dict(cells, features=datasets.Features({"image": datasets.Image(decode=False)}))
    return LabeledImages(rows, dataset, split, label_column=None, roots=[folder])


def _is_image(name: str) -> bool:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder  # here: see loading.py

    return os.path.splitext(name)[1].lower() in ImageFolder.EXTENSIONS and not name.startswith(".")


def _mirror(path: str) -> str:
    """Return a folder like `path` with links to its files; `datasets` resolves a link to a folder, or follows none."""
    import datasets  # here: see loading.py

    names = [
        os.path.relpath(os.path.join(folder, name), path)
        for folder, _, files in os.walk(path, followlinks=True)
        for name in files
    ]
    identity = xxhash.xxh3_128_hexdigest(os.fsencode("\0".join([path, *sorted(names)])))
    mirror = Path(datasets.config.HF_DATASETS_CACHE) / "timm_igkd" / "folders" / identity
    mirror.mkdir(parents=True, exist_ok=True)
    for name in names:
        (mirror / name).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (mirror / name).symlink_to(os.path.join(path, name))
    return str(mirror)
