"""Labelled images from anywhere: Hub datasets, parquet and class folders, scikit-learn's digits, timm and torchvision.

Every image is decoded as timm does it (images.py) and named in every error. Nothing is ever skipped or replaced.
`datasets` is imported by the functions that read with it: a training process that does not is spared pandas too.
"""

import os
import sys
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import constants as hub_constants

from timm_igkd.data.class_folders import load_class_folders, load_image_folder, split_folder
from timm_igkd.data.folders import (
    check_folder,
    is_saved_to_disk,
    local_folder,
    refuse_stream,
    searched_folder,
    tar_class_names,
)
from timm_igkd.data.labeled_images import MOST_SHARED, LabeledImages
from timm_igkd.data.labels import class_order
from timm_igkd.data.named_datasets import HFDS, TIMM_PREFIXES, load_digits_split, load_timm_dataset
from timm_igkd.data.rows import NO_ROWS, load_rows, resolved_revision
from timm_igkd.errors import InputError, MissingColumnError, check_kind, nearest
from timm_igkd.files import given_path
from timm_igkd.hub.names import is_repo_id

if TYPE_CHECKING:
    import datasets

_LABEL_COLUMN = "one class per image as ClassLabel or whole number (datasets' class_encode_column makes one of texts)"
_IMAGE_COLUMN = "one image per row as Image or as the bytes of its file (datasets' cast_column makes an Image of paths)"
Labels = Literal["required", "optional", "ignored"]


def load_labeled_images(
    dataset: str | os.PathLike[str],
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
        image_column: needed where the first column of type Image is not the one wanted, or where images are columns of
            encoded bytes; refused where there are no columns.
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
    check_kind("dataset", dataset, (str, os.PathLike), "a name or a folder", "give a text or a pathlib.Path")
    check_kind("split", split, str, "a name", "give one such as 'train'")
    dataset = os.fspath(dataset)
    refuse_stream(dataset)
    _check_split(dataset, split)
    columns = {"--image-column": image_column, "--label-column": label_column}
    is_timm = dataset.startswith(TIMM_PREFIXES) and not os.path.exists(dataset)
    if not is_timm:
        _refuse(dataset, {"--data-dir": data_dir}, "it is for timm's datasets (torch/…, hfds/…, folder/)")
    if dataset == "digits":
        return _load_digits(split, columns | {"--revision": revision}, labels)
    if is_timm and not dataset.startswith(HFDS):
        _refuse(dataset, columns | {"--revision": revision}, "it has neither columns nor revisions")
        return load_timm_dataset(dataset, split, data_dir)
    if not is_timm and _looks_local(dataset):
        _refuse(dataset, {"--revision": revision}, "a local folder has no revisions")
        return _load_folder(dataset, split, image_column, label_column, labels)
    cache = None if data_dir is None else str(given_path("data_dir", data_dir))
    rows = _load_hub_rows(dataset, dataset.removeprefix(HFDS) if is_timm else dataset, split, revision, cache)
    return _images_of_rows(rows, dataset, split, None, image_column, label_column, labels, revision)


def _load_hub_rows(
    dataset: str, source: str, split: str, revision: str | None, cache_dir: str | None
) -> "datasets.Dataset":
    if not is_repo_id(source):
        raise InputError(f"dataset {dataset!r} is neither a folder that is there nor an id of the Hub; check the name")
    return load_rows(dataset, source, False, split, revision, cache_dir)


def _load_folder(
    dataset: str, split: str, image_column: str | None, label_column: str | None, labels: Labels
) -> LabeledImages:
    path, given = local_folder(dataset), os.path.abspath(check_folder(dataset))
    folder = split_folder(path, split)
    if folder is None:
        rows = load_rows(dataset, path, True, split, None, None)
        images = _images_of_rows(rows, dataset, split, path, image_column, label_column, labels)
        images.folder = searched_folder(given)
        return images
    if labels == "ignored" or (labels == "optional" and not folder.has_class_folders):
        columns = {"--image-column": image_column, "--label-column": label_column}
        _refuse(dataset, columns, "its images lie in a folder without columns")
        images = load_image_folder(dataset, folder, split)
    else:
        rows = load_class_folders(path, folder, split)
        images = _images_of_rows(rows, dataset, split, path, image_column, label_column, labels)
    images.folder = os.path.normpath(os.path.join(given, os.path.relpath(folder.path, path)))
    return images


def _load_digits(split: str, options: dict[str, str | None], labels: Labels) -> LabeledImages:
    if os.path.isdir("digits"):
        raise InputError(
            "dataset 'digits' is scikit-learn's, and there is a folder of that name here; give the folder as "
            "./digits, or run in another folder"
        )
    _refuse("digits", options, "the digits have neither columns nor revisions")
    digits = load_digits_split(split)
    return digits.without_labels() if labels == "ignored" else digits


def _images_of_rows(
    rows: "datasets.Dataset",
    dataset: str,
    split: str,
    path: str | None,
    image_column: str | None,
    label_column: str | None,
    labels: Labels,
    revision: str | None = None,
) -> LabeledImages:
    """Return the images of rows, with the labels of a column; arguments as `load_labeled_images` takes them.

    Args:
        path: of the data set's folder; None: it is one of the Hub.
    """
    import datasets

    if len(rows) == 0:
        raise InputError(NO_ROWS.format(split, dataset))
    image_column = _find_column(rows, dataset, image_column, datasets.Image, "--image-column")
    are_tars = rows.builder_name == "webdataset"
    if are_tars and label_column is None and "cls" in rows.features:
        label_column = "cls"  # as timm reads them
    lacks_labels = labels == "ignored" or (labels == "optional" and label_column is None and not _may_be_labels(rows))
    if lacks_labels:
        label_column, names = None, None
    else:
        label_column = _find_column(rows, dataset, label_column, datasets.ClassLabel, "--label-column")
        names = tuple(getattr(rows.features[label_column], "names", None) or ()) or None
    if are_tars and path is not None:
        names = tar_class_names(path)
    images = LabeledImages(
        rows.select_columns(list(filter(None, (image_column, label_column)))).cast_column(
            image_column, datasets.Image(decode=False)
        ),
        dataset,
        split,
        image_column,
        label_column,
        class_names=names,
        revision=revision or resolved_revision(rows),
        roots=[hub_constants.HF_HUB_CACHE, datasets.config.HF_CACHE_HOME]
        if path is None
        else [path, os.path.realpath(path)],
    )
    is_by_class = path is not None and rows.builder_name == "imagefolder" and not is_saved_to_disk(path)
    return images.in_class_order(class_order(names)) if is_by_class and names else images


def _check_split(dataset: str, split: str) -> None:
    """Raise InputError for a split without a name, or with one that leads out of the data set's folder."""
    for part in split.split("+"):
        name = part.strip().partition("[")[0]
        if any(place in ("", ".", "..") for place in name.split("/")):
            raise InputError(
                f"split {split!r} of dataset {dataset!r} is no name of a split, expected one such as train"
            )


def _refuse(dataset: str, options: dict[str, str | None], why: str) -> None:
    """Raise for an option that would have no effect."""
    for flag, value in options.items():
        if value is not None:
            raise InputError(f"{flag} {value} has no effect on {dataset!r}, {why}; leave it out")


def _looks_local(dataset: str) -> bool:
    """Say whether a name is meant as a folder: an id of the Hub is name or user/name."""
    return dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1 or os.path.exists(dataset)


def _find_column(rows: "datasets.Dataset", dataset: str, name: str | None, feature: type, flag: str) -> str:
    import datasets

    columns = list(rows.features)
    others = _encoded(rows) if feature is datasets.Image else _numbers(rows)
    if name is None:
        found = [column for column, kind in rows.features.items() if isinstance(kind, feature)]
        found = found or [column for column in others if isinstance(rows.features[column], dict)]
        if not found:
            raise InputError(_no_column(rows, dataset, feature, others, flag))
        return found[0]
    if name not in columns:
        raise MissingColumnError(
            f"{dataset!r} has no column {name!r}{nearest(name, columns)}; its columns are {columns}"
        )
    kind = rows.features[name]
    if not isinstance(kind, feature) and name not in others:
        wanted = _IMAGE_COLUMN if feature is datasets.Image else _LABEL_COLUMN
        raise InputError(f"column {name!r} of {dataset!r} is {kind}, expected {wanted}; name another with {flag}")
    return name


def _numbers(rows: "datasets.Dataset") -> list[str]:
    """Return the columns of whole numbers."""
    import datasets

    return [c for c, kind in rows.features.items() if isinstance(kind, datasets.Value) and "int" in kind.dtype]


def _encoded(rows: "datasets.Dataset") -> list[str]:
    """Return the columns of bytes, plain or as `datasets` keeps an Image: {"bytes": …, "path": …}."""
    import datasets

    def are_bytes(kind: Any) -> bool:
        return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")

    def is_kept_image(kind: Any) -> bool:
        return isinstance(kind, dict) and set(kind) == {"bytes", "path"} and are_bytes(kind["bytes"])

    return [column for column, kind in rows.features.items() if are_bytes(kind) or is_kept_image(kind)]


def _may_be_labels(rows: "datasets.Dataset") -> bool:
    import datasets

    return bool(_numbers(rows)) or any(isinstance(kind, datasets.ClassLabel) for kind in rows.features.values())


def _no_column(rows: "datasets.Dataset", dataset: str, feature: type, others: list[str], flag: str) -> str:
    """Return what to do where no column of a kind is found; `others` can be taken for it when they are named."""
    import datasets

    columns = list(rows.features)
    if feature is datasets.ClassLabel and columns == ["image"] and rows.builder_name == "imagefolder":
        return (
            f"the images of {dataset!r} have no labels, expected a folder for each of two classes or more; put "
            "them into split/class/image.png"
        )
    wanted = _IMAGE_COLUMN if feature is datasets.Image else _LABEL_COLUMN
    remedy = f"name one of {others} with {flag}" if others else f"give it {wanted}, and name it with {flag}"
    return f"{dataset!r} has no {feature.__name__} column among {columns}; {remedy}"


def refuse_shared(images: LabeledImages, other: LabeledImages, where: str, what: str, *, most: float) -> None:
    """Refuse images of one split that are in another, byte for byte, under whatever names; say where a few are.

    Args:
        images: that are learnt from or watched.
        other: that accuracy is measured on.
        where: what the first are called.
        what: what the others are called.
        most: share of `other` that may be in both.

    Raises:
        InputError: more than that.
    """
    shared = images.num_shared(other)
    told = f"{shared} of the {len(other)} images of {what} are also in {where}"
    if shared > most * len(other):
        raise InputError(
            f"{told}: accuracy on what is trained on or watched says nothing; take them out of it, or name another"
        )
    if shared > MOST_SHARED * len(other):
        print(f"note: {told}; accuracy on them says nothing", file=sys.stderr)
