"""Labelled images from anywhere: Hub datasets, parquet and class folders, scikit-learn's digits, timm and torchvision.

Every image is decoded as timm does it (images.py) and named in every error. Nothing is ever skipped or replaced.
`datasets` is imported by the functions that read with it: a training process that does not is spared pandas too.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import timm.data
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors

from timm_igkd.data.digits import load_digits_split
from timm_igkd.data.folders import (
    check_folder,
    is_saved_to_disk,
    load_class_folders,
    load_image_folder,
    local_folder,
    refuse_shared_files,
    refuse_stream,
    split_folder,
    tar_class_names,
)
from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.data.labels import class_order
from timm_igkd.errors import InputError, RunError, UserError, first_line, nearest
from timm_igkd.hub.cache_notice import cache_use_is_told
from timm_igkd.hub.errors import hub_error

if TYPE_CHECKING:
    import datasets

_LABEL_COLUMN = "one class per image as ClassLabel or whole number (datasets' class_encode_column makes one of texts)"
_NO_ROWS = "split {!r} of {!r} has no rows, expected at least one image"
_CLS = (
    "the tars of {!r} have {} as a class, expected its number, which is what timm reads from .cls; write the classes' "
    "numbers, counted from 0, and their names into classes.txt beside the tars, one a line"
)
_OTHER_SPLIT = "; name one by --split, in a run by --train-split, --validation-split and --test-split"
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)
_LONGEST_HUB_ID = 96
# What Arrow and datasets raise on altered parquet, beside ValueError.
_DAMAGE = (OSError, NotImplementedError, AttributeError, IndexError, KeyError, TypeError)
HFDS = "hfds/"
TIMM_PREFIXES = ("torch/", HFDS, "folder/")
Labels = Literal["required", "optional", "ignored"]


def load_labeled_images(
    dataset: str,
    split: str,
    image_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
    labels: Labels = "required",
) -> Any:
    """Open a dataset by name.

    Args:
        dataset: a Hub dataset id, also as timm's `hfds/user/name`; a local folder of parquet files, of class folders,
            of webdataset tars (labels: .cls, names: classes.txt beside them) or written by `save_to_disk`; `digits`; or
            a timm dataset name (`torch/cifar10`, `folder/`) with `data_dir` as its root. Class folders are the split's
            own, counted in timm's order: naturally, 2 before 10.
        split: name of the split.
        image_column: needed where the first column of type Image is not the one wanted; refused where there are none.
        label_column: as `image_column`, of type ClassLabel or whole numbers.
        revision: branch, tag or commit of a Hub dataset; refused for anything else.
        data_dir: root folder of a timm dataset; of `hfds/`: the cache; refused for anything else.
        labels: "optional": a folder whose images lie in no class folders, and rows without a column that could be of
            labels, are images without. "ignored": all are, whatever their columns; see `LabeledImages.has_labels`.

    Returns:
        LabeledImages, or timm's own dataset for `torch/` and `folder/`.

    Raises:
        MissingFileError: no such folder.
        InputError: wrong split or column, corrupt data.
        RunError: Hub not reachable.
    """
    import datasets

    refuse_stream(dataset)
    columns = {"--image-column": image_column, "--label-column": label_column}
    is_timm = dataset.startswith(TIMM_PREFIXES) and not os.path.exists(dataset)
    if not is_timm:
        _refuse(dataset, {"--data-dir": data_dir}, "it is for timm's datasets (torch/…, hfds/…, folder/)")
    if dataset == "digits":
        _refuse(dataset, columns | {"--revision": revision}, "the digits have neither columns nor revisions")
        digits = load_digits_split(split)
        return digits.without_labels() if labels == "ignored" else digits
    if is_timm and not dataset.startswith(HFDS):
        _refuse(dataset, columns | {"--revision": revision}, "it has neither columns nor revisions")
        return _timm_dataset(dataset, split, data_dir)
    source, is_local = (dataset.removeprefix(HFDS), False) if is_timm else (dataset, _looks_local(dataset))
    if is_local:
        _refuse(dataset, {"--revision": revision}, "a local folder has no revisions")
    if not is_local and not (_HUB_ID.fullmatch(source) and len(source) <= _LONGEST_HUB_ID):
        raise InputError(f"dataset {dataset!r} is neither a folder that is there nor an id of the Hub; check the name")
    path = local_folder(source) if is_local else source
    folder = split_folder(path, split) if is_local else None
    if folder is not None and (labels == "ignored" or (labels == "optional" and not folder.has_class_folders)):
        _refuse(dataset, columns, "its images lie in a folder without columns")
        return load_image_folder(dataset, folder, split)
    own = None if folder is None else load_class_folders(path, folder, split)
    rows = _load_rows(dataset, path, is_local, split, revision, data_dir) if own is None else own
    if len(rows) == 0:
        raise InputError(_NO_ROWS.format(split, dataset))
    image_column = _find_column(rows, dataset, image_column, datasets.Image, "--image-column")
    are_tars = rows.builder_name == "webdataset"
    if are_tars and label_column is None and "cls" in rows.features:
        label_column = "cls"  # as timm reads them
    lacks_labels = labels == "ignored" or (labels == "optional" and label_column is None and not _may_be_labels(rows))
    if not lacks_labels:
        label_column = _find_column(rows, dataset, label_column, datasets.ClassLabel, "--label-column")
    label_feature = None if lacks_labels else rows.features[label_column]
    is_by_class = is_local and rows.builder_name == "imagefolder" and not is_saved_to_disk(path)
    kept = [image_column] if lacks_labels else [image_column, label_column]
    rows = rows.select_columns(kept).cast_column(image_column, datasets.Image(decode=False))
    names = tuple(getattr(label_feature, "names", None) or ()) or None
    if are_tars and is_local:
        names = tar_class_names(path)
    images = LabeledImages(
        rows,
        dataset,
        split,
        image_column,
        None if lacks_labels else label_column,
        class_names=names,
        revision=revision or _resolved_revision(rows),
        roots=[path, os.path.realpath(path)]
        if is_local
        else [hub_constants.HF_HUB_CACHE, datasets.config.HF_CACHE_HOME],
    )
    return images.in_class_order(class_order(names)) if is_by_class and names else images


def _refuse(dataset: str, options: dict[str, str | None], why: str) -> None:
    """Raise for an option that would have no effect."""
    for flag, value in options.items():
        if value is not None:
            raise InputError(f"{flag} {value} has no effect on {dataset!r}, {why}; leave it out")


def _looks_local(dataset: str) -> bool:
    """Say whether a name is meant as a folder: an id of the Hub is name or user/name."""
    return dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1 or os.path.exists(dataset)


def _load_rows(
    dataset: str, path: str, is_local: bool, split: str, revision: str | None, cache_dir: str | None
) -> "datasets.Dataset":
    import datasets

    try:
        if is_local and is_saved_to_disk(path):
            saved = datasets.load_from_disk(path)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            if split not in splits:
                raise ValueError(f"Unknown split {split!r}. Should be one of {list(splits)}.")
            return splits[split]
        with _bars_on_a_terminal_only(), nullcontext() if is_local else cache_use_is_told(f"dataset {dataset!r}"):
            files = _own_files(dataset, path, split, revision, cache_dir)
            if files is not None:
                return datasets.load_dataset("parquet", data_files={split: files}, split=split, cache_dir=cache_dir)
            return datasets.load_dataset(path, split=split, revision=revision, cache_dir=cache_dir)
    except (datasets.exceptions.DatasetNotFoundError, hub_errors.HfHubHTTPError, ConnectionError) as error:
        raise hub_error(error, f"dataset {dataset!r}") or RunError(  # datasets cuts some causes off
            f"dataset {dataset!r} does not exist, or is private and this login may not see it ({first_line(error)}); "
            "check the id, or log in: hf auth login"
        ) from error
    except (datasets.data_files.EmptyDatasetError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise InputError(
            f"folder {dataset!r} holds no data, expected parquet files or class folders of images"
        ) from error
    except UserError:
        raise
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise InputError(_NO_ROWS.format(split, dataset)) from error
        if "invalid literal for int()" in str(error):
            raise InputError(_CLS.format(dataset, str(error).partition(": b")[2])) from error
        why = first_line(error).rstrip(".") + (_OTHER_SPLIT if "nknown split" in str(error) else "")
        raise InputError(f"split {split!r} of dataset {dataset!r}: {why}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None:
            raise RunError(f"dataset {dataset!r} cannot be prepared: {first_line(cause)}") from error
        raise InputError(f"dataset {dataset!r} cannot be read ({first_line(cause)}); a file is corrupt") from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"dataset {dataset!r} cannot be read ({first_line(error)}); a file is corrupt") from error


def _own_files(dataset: str, path: str, split: str, revision: str | None, cache_dir: str | None) -> list[str] | None:
    """Return the parquet files of one split where they alone say what its columns are, else None.

    Read together with others, a split gets the class names of the first, whatever its own files call them.
    """
    import datasets

    builder = datasets.load_dataset_builder(path, revision=revision, cache_dir=cache_dir)
    refuse_shared_files(dataset, builder.config.data_files or {})
    if builder.dataset_name is None or builder.name != "parquet" or builder.info.features is not None:
        return None
    files = builder.config.data_files
    return [str(file) for file in files[split]] if files is not None and len(files) > 1 and split in files else None


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
            raise InputError(_no_column(rows, dataset, feature, flag))
        return found[0]
    if name not in columns:
        raise InputError(f"{dataset!r} has no column {name!r}{nearest(name, columns)}; its columns are {columns}")
    kind = rows.features[name]
    is_integer = isinstance(kind, datasets.Value) and "int" in kind.dtype
    if not isinstance(kind, feature) and not (feature is datasets.ClassLabel and is_integer):
        wanted = "Image" if feature is datasets.Image else _LABEL_COLUMN
        raise InputError(f"column {name!r} of {dataset!r} is {kind}, expected {wanted}; name another with {flag}")
    return name


def _numbers(rows: "datasets.Dataset") -> list[str]:
    import datasets

    return [c for c, kind in rows.features.items() if isinstance(kind, datasets.Value) and "int" in kind.dtype]


def _may_be_labels(rows: "datasets.Dataset") -> bool:
    import datasets

    return bool(_numbers(rows)) or any(isinstance(kind, datasets.ClassLabel) for kind in rows.features.values())


def _no_column(rows: "datasets.Dataset", dataset: str, feature: type, flag: str) -> str:
    """Return what to do where no column of a kind is found."""
    import datasets

    columns = list(rows.features)
    if feature is datasets.ClassLabel:
        if columns == ["image"] and rows.builder_name == "imagefolder":
            return (
                f"the images of {dataset!r} have no labels, expected a folder for each of two classes or more; put "
                "them into split/class/image.png"
            )
        numbers = _numbers(rows)
        remedy = (
            f"name one of {numbers} with {flag}" if numbers else f"give it {_LABEL_COLUMN}, and name it with {flag}"
        )
        return f"{dataset!r} has no ClassLabel column among {columns}; {remedy}"
    return f"{dataset!r} has no {feature.__name__} column among {columns}; name one with {flag}"


def _timm_dataset(name: str, split: str, data_dir: str | None) -> Any:
    if data_dir is None:
        raise InputError(f"timm dataset {name!r} needs its root folder; give it with --data-dir")
    root = check_folder(data_dir)
    try:
        return timm.data.create_dataset(name, root=root, split=split)
    except (AssertionError, ImportError, TypeError, RuntimeError, ValueError, OSError) as error:
        raise InputError(f"timm dataset {name!r} split {split!r} under {data_dir!r}: {first_line(error)}") from error
