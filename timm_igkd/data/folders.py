"""Local folders as `datasets` can open them, whatever they are called."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.data.labels import class_order
from timm_igkd.errors import InputError, MissingFileError, first_line

if TYPE_CHECKING:
    import datasets

_PATTERN_SIGNS = re.compile(
    r"[*?\[\]{}!\\\x00-\x1f]|::"
)  # `datasets` reads them as patterns and addresses, not as names
_CLASS_FILE = "classes.txt"
_STREAMS = ("wds", "hfids", "tfds")
_SPLIT_FOLDERS = {
    "train": ("training",),
    "validation": ("valid", "val", "dev"),
    "test": ("testing", "eval", "evaluation"),
}
_METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
TABLES = (".parquet", ".arrow", ".tar", ".zip")
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
    return _mirror(path) if _PATTERN_SIGNS.search(path) else path


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
    return sorted(_walk_images(folder))


def _walk_images(folder: str) -> Iterator[str]:
    for root, _, names in os.walk(folder, followlinks=True):
        yield from (os.path.join(root, name) for name in names if _is_image(name))


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


def is_saved_to_disk(path: str) -> bool:
    """Say whether `save_to_disk` wrote a folder."""
    return any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


class SplitFolder(NamedTuple):
    """The folder of a split's images.

    Attributes:
        path: of the folder.
        files: all images below it, in the order of their paths; one at least.
    """

    path: str
    files: list[str]

    @property
    def has_class_folders(self) -> bool:
        """Whether images lie in folders below; where others lie in the folder itself, in two of them or more."""
        places = {os.path.dirname(file) for file in self.files}
        return len(places - {self.path}) > (self.path in places)


def split_folder(path: str, split: str) -> SplitFolder | None:
    """Return the folder of a split's images where it is read by itself; None where `datasets` is to read it.

    `datasets` looks for splits in every part of a path: it gives the images of a class "train" to the training split
    wherever they lie, and passes over class folders whose names begin with a dot or two underscores.

    Args:
        path: of the data set.
        split: a folder in it, or what `datasets` calls one (validation for val), also with a part: train[:500].
    """
    exact = os.path.join(path, split)
    name = split if os.path.isdir(exact) or "+" in split else split.partition("[")[0]
    named = [os.path.join(path, part) for part in (name, *_SPLIT_FOLDERS.get(name, ()))]
    found = [folder for folder in named if os.path.isdir(folder)]
    if not found or (found[0] != named[0] and len(found) > 1) or is_saved_to_disk(path):
        return None
    if not _METADATA.isdisjoint(os.listdir(path)):
        return None
    files = []
    for root, _, names in os.walk(found[0], followlinks=True):
        if any(name in _METADATA or name.endswith(TABLES) for name in names):
            return None  # what the images are is told by files that `datasets` reads
        files += [os.path.join(root, name) for name in names if _is_image(name)]
    return SplitFolder(found[0], sorted(files)) if files else None


def load_class_folders(path: str, folder: SplitFolder, split: str) -> "datasets.Dataset":
    """Return a split's images and the classes of their folders, as `datasets` does; no labels where there is one class.

    Args:
        path: of the data set.
        folder: of the split.
        split: its name, also with a part: train[:500].

    Returns:
        Rows in the order of the files' paths: `image`, not decoded, and `label`, its classes in timm's order.

    Raises:
        InputError: images beside class folders or at several depths, or in a hidden folder; a part that is none.
    """
    import datasets  # here: see loading.py

    classes, rows = _classes(folder), _image_rows(folder.files)
    if classes and (len(set(classes)) > 1 or _has_other_classes(path, folder.path, classes[0])):
        names = class_order(list(set(classes)))
        position = {name: label for label, name in enumerate(names)}
        labels = datasets.Dataset.from_dict(
            {"label": [position[name] for name in classes]},
            features=datasets.Features({"label": datasets.ClassLabel(names=names)}),
        )
        rows = datasets.concatenate_datasets([rows, labels], axis=1)
    rows.info.builder_name = "imagefolder"
    return _part(rows, folder.path, split)


def refuse_shared_files(dataset: str, data_files: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError where `datasets` found a file for two of the usual splits, or twice for one.

    Args:
        dataset: what the message calls it.
        data_files: the files of each split, as a builder of `datasets` has them.
    """
    first: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        for file in map(str, data_files.get(split, ())):
            if file in first:
                raise InputError(
                    f"{file!r} of dataset {dataset!r} belongs to split {split!r} by one part of its path and to "
                    f"{first[file]!r} by another; rename the folder, or put the images into split/class/image.png"
                )
            first[file] = split


def _classes(split: SplitFolder) -> list[str]:
    """Return the class folder of each image; nothing where all lie in the split's folder itself."""
    folder = split.path
    places = [file[len(folder) + 1 :].split(os.sep) for file in split.files]
    first = next((place for place in places if len(place) > 1), None)
    if first is None:
        return []
    for place in places:
        if any(part.startswith(".") for part in place):
            raise InputError(
                f"folder {os.path.join(folder, *place[:-1])!r} holds images, but a name that begins with a dot is "
                "hidden; rename the folder, or remove it"
            )
        if len(place) != len(first):
            raise InputError(
                f"{os.path.join(*place)!r} and {os.path.join(*first)!r} of {folder!r} lie at different depths, "
                "expected every image in a class folder, all of them at one depth; move or remove what does not belong "
                "there"
            )
    return [place[-2] for place in places]


def _has_other_classes(path: str, folder: str, name: str) -> bool:
    """Return whether another split's images lie in folders of other classes than the only one here."""
    others = [os.path.join(path, other) for other in sorted(os.listdir(path))]
    places = {os.path.dirname(file) for other in others if other != folder for file in _walk_images(other)}
    return any(os.path.basename(place) != name for place in places.difference(others))


def _image_rows(files: list[str]) -> "datasets.Dataset":
    import datasets  # here: see loading.py

    return datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image(decode=False))


def _part(rows: "datasets.Dataset", folder: str, split: str) -> "datasets.Dataset":
    """Return the rows of a split's part, as `datasets` reads train[:500] and train[10%:]; all where it names none."""
    import datasets  # here: see loading.py

    name, bracket, _ = split.partition("[")
    if not bracket or os.path.basename(folder) == split:
        return rows
    try:
        (span,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    except (ValueError, AssertionError) as error:
        raise InputError(f"split {split!r}: {first_line(error)}") from error
    start, end = span.from_ or 0, len(rows) if span.to is None else span.to
    return rows.select(range(start, end) if start < end else [])


def load_image_folder(dataset: str, folder: SplitFolder, split: str) -> LabeledImages:
    """Return all images below a folder, in the order of their paths, as images without labels.

    Args:
        dataset: what messages call it.
        folder: that holds them, at any depth.
        split: what messages call this part of it; also with a part: train[:500].
    """
    rows = _part(_image_rows(folder.files), folder.path, split)
    return LabeledImages(rows, dataset, split, label_column=None, roots=[folder.path])


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
