"""Local folders as `datasets` can open them, whatever they are called."""

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import xxhash
from PIL import Image

from timm_igkd.errors import InputError, MissingFileError, first_line
from timm_igkd.files import given_path

_PATTERN_SIGNS = re.compile(
    r"[*?\[\]{}!\\\x00-\x1f]|::"
)  # `datasets` reads them as patterns and addresses, not as names
_CLASS_FILE = "classes.txt"
_STREAMS = ("wds", "hfids", "tfds")
SPLIT_FOLDERS = {
    "train": ("training",),
    "validation": ("valid", "val", "dev"),
    "test": ("testing", "eval", "evaluation"),
}
SPLIT_NAMES = {name for main, others in SPLIT_FOLDERS.items() for name in (main, *others)}
_SPLIT_WORDS = {  # as `datasets` has them in its patterns of data files
    main: re.compile(rf"(?:^|[-._ 0-9/])(?:{'|'.join((main, *others))})(?:[-._ 0-9/]|$)")
    for main, others in SPLIT_FOLDERS.items()
}
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
TABLES = (".parquet", ".arrow", ".tar", ".zip")
_OTHER_IMAGES = (".heic", ".heif", ".hif", ".avif", ".avifs", ".jxl")  # telephones and browsers write them
_SHARD = re.compile(r"-\d{5}-of-\d{5}.*\.")  # as `datasets` tells them from other files
_SYSTEM_FOLDERS = ("/proc/", "/sys/")  # their files change under one's eyes, and to list them takes minutes


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
    path = str(given_path("a folder of data", name))
    if not os.path.isdir(path):
        found = "is a file, expected a folder" if os.path.exists(path) else "does not exist"
        raise MissingFileError(
            f"dataset folder {name!r} {found}; give a Hub dataset id, a folder of parquet, of class folders or of "
            "webdataset tars, or 'digits'"
        )
    if os.path.join(os.path.realpath(path), "").startswith(_SYSTEM_FOLDERS):
        raise InputError(f"folder {name!r} holds no data, expected parquet files or class folders of images")
    return path


def image_files(folder: str) -> list[str]:
    """Return the image files at any depth below a folder, sorted by path; none where there is no such folder."""
    return sorted(os.path.join(root, name) for root, _, names in walk(folder) for name in names if is_image(name))


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield what `os.walk` does, through links to folders too.

    Raises:
        InputError: a folder that may not be read, or a link to one that holds it; an image's name that is not UTF-8; an
            image that this Pillow does not open: it would be left out without a word, and so would a class of them.
    """

    def refuse(error: OSError) -> None:
        if error.filename == folder and not os.path.isdir(folder):
            return  # nothing is below what is no folder
        raise InputError(
            f"folder {error.filename!r} cannot be read ({error.strerror}); change its permissions"
        ) from error

    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        for path in (os.path.join(root, name) for name in folders):
            if os.path.islink(path) and is_within(root, path):
                raise InputError(f"folder {path!r} is a link to a folder that holds it; remove the link")
        for name in names:
            if is_unopened_image(name):
                raise InputError(
                    f"{os.path.join(root, name)!r} is an image of a format that Pillow does not open here; convert it "
                    "to JPEG or PNG, or move it elsewhere"
                )
            if is_image(name) and os.fsencode(name) != name.encode(errors="replace"):
                raise InputError(f"file {os.path.join(root, name)!r} has a name that is not UTF-8; rename it")
        yield root, folders, names


def is_within(path: str, folder: str) -> bool:
    """Say whether a path is a folder, or leads into it, through links or not."""
    inner, outer = (os.path.join(os.path.realpath(each), "") for each in (path, folder))
    return inner.startswith(outer)


def tar_class_names(path: str) -> tuple[str, ...] | None:
    """Return the names in classes.txt beside a folder's tars, one a line as in a class map of timm's; None without it.

    Where splits have folders of their own, theirs may hold it too.

    Raises:
        InputError: an empty line, a name twice, or files that differ.
    """
    files = [
        os.path.join(root, _CLASS_FILE)
        for root, _, names in walk(path)
        if os.path.isfile(os.path.join(root, _CLASS_FILE))  # no pipe
        and (root == path or any(name.endswith(".tar") for name in names))
    ]
    found = {file: _class_names(file) for file in sorted(files)}
    if len(set(found.values())) > 1:
        raise InputError(f"{sorted(files)[0]!r} and {sorted(files)[-1]!r} name other classes; keep one of them")
    return next(iter(found.values()), None)


def _class_names(file: str) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise InputError(f"{file!r} is not UTF-8 ({first_line(error)}); save it as UTF-8") from error
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"{file!r} has an empty line or a name twice, expected a name of its own for each class")
    return names


def is_saved_to_disk(path: str) -> bool:
    """Say whether `save_to_disk` wrote a folder."""
    return any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def searched_folder(path: str) -> str | None:
    """Return the folder whose files `datasets` takes for data, whatever is put there; None where others tell them.

    It is `path`, or data/ in it where that holds shards such as train-00000-of-00002.parquet; a card's `data_files` and
    what `save_to_disk` wrote name the files.
    """
    if is_saved_to_disk(path) or _card_names_files(os.path.join(path, "README.md")):
        return None
    data = os.path.join(path, "data")
    has_shards = os.path.isdir(data) and any(_SHARD.search(name) for name in os.listdir(data))
    return data if has_shards else path


def _card_names_files(card: str) -> bool:
    from timm_igkd.hub.cards import metadata  # here: who reads no card does without

    if not os.path.isfile(card):
        return False
    configs = metadata(Path(card).read_text(encoding="utf-8", errors="replace")).get("configs")
    return isinstance(configs, list) and any(isinstance(one, dict) and "data_files" in one for one in configs)


def splits_named(path: str) -> set[str]:
    """Return the splits whose names `datasets` finds in a path: as words between marks and digits, in lower case."""
    return {split for split, words in _SPLIT_WORDS.items() if words.search(path)}


def is_image(name: str) -> bool:
    """Say whether a file is an image by its name; hidden files are none."""
    return os.path.splitext(name)[1].lower() in _image_suffixes() and not os.path.basename(name).startswith(".")


def is_unopened_image(name: str) -> bool:
    """Say whether a file is an image, by its name, of a format that this Pillow does not open."""
    return os.path.splitext(name)[1].lower() in _OTHER_IMAGES and not name.startswith(".") and not is_image(name)


@functools.cache
def _image_suffixes() -> frozenset[str]:
    """Return the suffixes of images: those of `datasets`, and what else this Pillow opens, such as .avif."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder  # here: see loading.py

    opened = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return frozenset(ImageFolder.EXTENSIONS) | (opened - {".pdf"})


def _mirror(path: str) -> str:
    """Return a folder like `path` with links to its files; `datasets` resolves a link to a folder, or follows none."""
    import datasets  # here: see loading.py

    names = [os.path.relpath(os.path.join(folder, name), path) for folder, _, files in walk(path) for name in files]
    identity = xxhash.xxh3_128_hexdigest(os.fsencode("\0".join([path, *sorted(names)])))
    mirror = given_path("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE) / "timm_igkd" / "folders" / identity
    mirror.mkdir(parents=True, exist_ok=True)
    for name in names:
        (mirror / name).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (mirror / name).symlink_to(os.path.join(path, name))
    return str(mirror)


def splits_share(split: str, other: str) -> bool | None:
    """Return whether two sums of splits of a dataset share images; None where two stretches of one may or may not."""
    found: bool | None = False
    parts, others = ([part.strip() for part in each.split("+")] for each in (split, other))
    for one, two in itertools.product(parts, others):
        names = {one.partition("[")[0], two.partition("[")[0]}
        if one == two:
            return True
        if len(names) == 1 or "all" in names:
            if "[" not in one or "[" not in two:
                return True
            found = None
    return found
