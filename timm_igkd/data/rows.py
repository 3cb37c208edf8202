"""Rows of a split as `datasets` reads them, from the Hub, from parquet, tars or images; what it raises, in one line.

`datasets` is imported by the functions that read with it: a training process that does not is spared pandas too.
"""

import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import xxhash
from huggingface_hub import errors as hub_errors

from timm_igkd.data.folders import image_files, is_image, is_saved_to_disk, splits_named, walk
from timm_igkd.errors import InputError, RunError, UserError, first_line
from timm_igkd.files import given_path
from timm_igkd.hub.cache_notice import cache_use_is_told
from timm_igkd.hub.errors import hub_error

if TYPE_CHECKING:
    import datasets

NO_ROWS = "split {!r} of {!r} has no rows, expected at least one image"
_CLS = (
    "the tars of {!r} have {} as a class, expected its number, which is what timm reads from .cls; write the classes' "
    "numbers, counted from 0, and their names into classes.txt beside the tars, one a line"
)
OTHER_SPLIT = "; name one by --split, in a run by --train-split, --validation-split and --test-split"
# What Arrow and datasets raise on altered parquet or archives, beside ValueError.
_DAMAGE = (OSError, NotImplementedError, AttributeError, IndexError, KeyError, TypeError, zipfile.BadZipFile)


def load_rows(
    dataset: str, path: str, is_local: bool, split: str, revision: str | None, cache_dir: str | None
) -> "datasets.Dataset":
    """Return the rows of a split.

    Args:
        dataset: what messages call it.
        path: of its folder, or its id.
        is_local: it is a folder.
        split: also a part (train[:500]) or a sum (train+test).
        revision: of a Hub dataset.
        cache_dir: of `datasets`.

    Raises:
        InputError: no such split, corrupt data, files that belong to no split or to two. RunError: Hub or disk.
    """
    import datasets

    with _errors_in_one_line(dataset, split, is_local):
        if is_local and is_saved_to_disk(path):
            saved = datasets.load_from_disk(path)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            _check_splits(dataset, split, [split], list(splits))
            return splits[split]
        with _bars_on_a_terminal_only(), nullcontext() if is_local else cache_use_is_told(f"dataset {dataset!r}"):
            builder = _fresh_builder(path, revision, cache_dir)
            _refuse_misread(dataset, path if is_local else None, builder)
            known = [str(name) for name in builder.config.data_files or builder.info.splits or ()]
            if known and split != "all":
                _check_splits(dataset, split, _split_names(split), known)
            if is_local and os.path.isfile(os.path.join(path, "README.md")):
                cache_dir = _cache_of_files(builder)
            parts = _own_files(builder, split)
            if parts is not None:
                return _load_parts(parts, cache_dir)
            return datasets.load_dataset(path, split=split, revision=revision, cache_dir=cache_dir)


@contextmanager
def _errors_in_one_line(dataset: str, split: str, is_local: bool) -> Iterator[None]:
    """Turn what `datasets`, Arrow and the Hub's client raise into one line; a name may be meant as a folder."""
    import datasets

    try:
        yield
    except (datasets.exceptions.DatasetNotFoundError, hub_errors.HfHubHTTPError, ConnectionError) as error:
        found = hub_error(error, f"dataset {dataset!r}") or RunError(  # datasets cuts some causes off
            f"dataset {dataset!r} does not exist, or is private and this login may not see it ({first_line(error)}); "
            "check the id, or log in: hf auth login"
        )
        raise found if is_local else type(found)(f"{found} (there is no folder {dataset!r} here either)") from error
    except (datasets.data_files.EmptyDatasetError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise InputError(
            f"folder {dataset!r} holds no data, expected parquet files or class folders of images"
        ) from error
    except UserError:
        raise
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise InputError(NO_ROWS.format(split, dataset)) from error
        if "invalid literal for int()" in str(error):
            raise InputError(_CLS.format(dataset, str(error).partition(": b")[2])) from error
        raise InputError(f"split {split!r} of dataset {dataset!r}: {first_line(error).rstrip('.')}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None:
            raise RunError(f"dataset {dataset!r} cannot be prepared: {first_line(cause)}") from error
        raise InputError(f"dataset {dataset!r} cannot be read ({first_line(cause)}); a file is corrupt") from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"dataset {dataset!r} cannot be read ({first_line(error)}); a file is corrupt") from error


def _split_names(split: str) -> list[str]:
    """Return the splits of a sum, without the parts that are asked for of them."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def _check_splits(dataset: str, split: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(
                f"split {split!r} of dataset {dataset!r}: Unknown split {name!r}. Should be one of {known}{OTHER_SPLIT}"
            )


def _refuse_misread(dataset: str, folder: str | None, builder: "datasets.DatasetBuilder") -> None:
    """Raise InputError where `datasets` would give files to the wrong split, twice, to none, or read tars as texts.

    Args:
        dataset: what messages call it.
        folder: its own; None: it is one of the Hub.
        builder: of `datasets`.
    """
    files = builder.config.data_files or {}
    _refuse_shared_files(dataset, files)
    if folder is None:
        return
    if builder.name == "text" and any(name.endswith(".tar") for _, _, names in walk(folder) for name in names):
        raise InputError(
            f"folder {dataset!r} is taken for texts, which are more than its tars; call these by their split, as in "
            "train-0000.tar, or put them into folders train/ and test/"
        )
    _refuse_hidden_splits(dataset, folder, files)
    if builder.name == "imagefolder":
        _refuse_files_left_out(dataset, folder, files)


def _own_files(builder: "datasets.DatasetBuilder", split: str) -> list[tuple[str, list[str]]] | None:
    """Return the parquet files of each split of a sum where they alone say what the columns are, else None.

    Read together with others, a split gets the class names of the first, whatever its own files call them.
    """
    files = builder.config.data_files or {}
    if builder.dataset_name is None or builder.name != "parquet" or builder.info.features is not None:
        return None
    names = _split_names(split)
    if len(files) < 2 or any(name not in files for name in names):
        return None
    parts = [part.strip() for part in split.split("+")]
    return [(part, [str(file) for file in files[name]]) for part, name in zip(parts, names, strict=True)]


def _fresh_builder(path: str, revision: str | None, cache_dir: str | None) -> "datasets.DatasetBuilder":
    """Return a builder whose features, if it has any, stand in the data set's card.

    One that finds the data set in the cache has those of the split that was read first.
    """
    import datasets

    with tempfile.TemporaryDirectory() as empty:
        try:
            return datasets.load_dataset_builder(path, revision=revision, cache_dir=empty)
        except (ConnectionError, OSError):  # no network: the cache is all there is
            return datasets.load_dataset_builder(path, revision=revision, cache_dir=cache_dir)


def _cache_of_files(builder: "datasets.DatasetBuilder") -> str:
    """Return a cache for the rows of a local folder's files as they are now.

    Where a card names the files, `datasets` knows prepared rows by the card and the folder's last name alone: files
    that changed since, or those of another such folder, would give the rows of the first.
    """
    import datasets

    named = {str(file) for files in (builder.config.data_files or {}).values() for file in files}
    states = [
        (os.path.realpath(file), (state := os.stat(file)).st_size, state.st_mtime_ns)
        for file in sorted(named)
        if os.path.exists(file)  # a card can name addresses too
    ]
    cache = given_path("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE) / "timm_igkd" / "rows"
    return str(cache / xxhash.xxh3_128_hexdigest(repr(states).encode()))


def _load_parts(parts: list[tuple[str, list[str]]], cache_dir: str | None) -> "datasets.Dataset":
    """Return the rows of the splits of a sum, each read from its own files.

    Raises:
        InputError: they have other columns or classes.
    """
    import datasets

    found = []
    for part, files in parts:
        data_files = {part.partition("[")[0]: files}
        found.append(datasets.load_dataset("parquet", data_files=data_files, split=part, cache_dir=cache_dir))
    for (part, _), rows in zip(parts, found, strict=True):
        if rows.features != found[0].features:
            raise InputError(
                f"splits {parts[0][0]!r} and {part!r} have other columns or classes, or these in another order; name "
                "one of them"
            )
    if len(found) == 1:
        return found[0]
    rows = datasets.concatenate_datasets(found)
    rows.info.download_checksums = found[0].info.download_checksums
    return rows


def _refuse_shared_files(dataset: str, data_files: Mapping[str, Sequence[str]]) -> None:
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


def _refuse_hidden_splits(dataset: str, path: str, data_files: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError where files of several splits would be one, since `datasets` did not know their names.

    Args:
        dataset: what the message calls it.
        path: its folder.
        data_files: the files of each split.
    """
    if set(data_files) != {"train"}:
        return
    names = sorted(os.path.relpath(file, path) for file in map(str, data_files["train"]))
    for name in names:
        if splits_named(name.lower()) - splits_named(name) - {"train"}:
            raise InputError(
                f"{name!r} of dataset {dataset!r} would be part of split 'train': `datasets` knows splits by names in "
                "lower case; rename it"
            )
    tops = sorted({name.split(os.sep)[0] for name in names if name.count(os.sep) > 1 and is_image(name)})
    if len(tops) > 1 and not any(splits_named(name) for name in names):
        raise InputError(
            f"the images of {dataset!r} lie two folders deep or more, below {tops[0]!r} and {tops[1]!r}, and would all "
            f"be of split 'train'; name one of these as the split, or put them into train/class/image.png"
        )


def _refuse_files_left_out(dataset: str, path: str, data_files: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError where `datasets` gives an image below a folder to no split."""
    found = {os.path.realpath(str(file)) for files in data_files.values() for file in files}
    for file in image_files(path):
        name = os.path.relpath(file, path)
        if os.path.realpath(file) not in found and not any(part.startswith(".") for part in name.split(os.sep)):
            splits = ", ".join(repr(str(split)) for split in data_files)
            raise InputError(
                f"{name!r} of dataset {dataset!r} would be left out: `datasets` finds splits by words in the paths, "
                f"{splits} here, and gives it to none; put all images into split/class/image.png"
            )


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


def resolved_revision(rows: "datasets.Dataset") -> str | None:
    """Return the commit a Hub dataset was read at, from the addresses datasets recorded."""
    for source in rows.info.download_checksums or ():
        _, found, commit = source.partition("@")
        if found:
            return commit.partition("/")[0]
    return None
