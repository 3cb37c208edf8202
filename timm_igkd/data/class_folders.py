"""Images in folders: the folder of a split, and its images with the classes of their folders, as timm counts them."""

import os
from typing import TYPE_CHECKING, NamedTuple

from timm_igkd.data.folders import (
    METADATA,
    SPLIT_FOLDERS,
    SPLIT_NAMES,
    TABLES,
    image_files,
    is_image,
    is_saved_to_disk,
    splits_named,
    walk,
)
from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.data.labels import class_order
from timm_igkd.data.rows import OTHER_SPLIT
from timm_igkd.errors import InputError, first_line

if TYPE_CHECKING:
    import datasets


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
        path: of the data set; where it holds class folders alone, they are those of the training split.
        split: a folder in it, or what `datasets` calls one (validation for val) in upper or lower case, also with a
            part: train[:500].

    Raises:
        InputError: no such split; a folder that cannot be read; a table or an archive among class folders.
    """
    if is_saved_to_disk(path) or not METADATA.isdisjoint(os.listdir(path)):
        return None
    name = split if os.path.isdir(os.path.join(path, split)) or "+" in split else split.partition("[")[0]
    found = _named_folder(path, name)
    if found is None and ("+" in name or not _holds_classes_alone(path)):
        return None
    if found is None and name != "train":
        raise InputError(f"dataset {path!r} has class folders alone, which are split 'train'{OTHER_SPLIT}")
    folder = found or path
    files, tables = [], []
    for root, _, names in walk(folder):
        if not METADATA.isdisjoint(names):
            return None  # what the images are is told by files that `datasets` reads
        files += [os.path.join(root, name) for name in names if is_image(name)]
        tables += [os.path.join(root, name) for name in names if name.endswith(TABLES)]
    if tables and any(os.path.dirname(file) != folder for file in files):
        raise InputError(
            f"{tables[0]!r} lies among the class folders of {folder!r}, expected images alone; move it elsewhere"
        )
    return SplitFolder(folder, sorted(files)) if files and not tables else None


def _named_folder(path: str, name: str) -> str | None:
    """Return the folder that a split's name means: of that very name, else the only one that is a name for it."""
    if os.path.isdir(exact := os.path.join(path, name)):
        return exact
    names = {name.lower(), *SPLIT_FOLDERS.get(name.lower(), ())}
    found = [entry for entry in os.listdir(path) if entry.lower() in names and os.path.isdir(os.path.join(path, entry))]
    return os.path.join(path, found[0]) if len(found) == 1 else None


def _holds_classes_alone(path: str) -> bool:
    """Return whether all images lie in folders directly below, none of them, and no file, called as a split."""
    files = [os.path.relpath(file, path) for file in image_files(path)]
    return bool(files) and not any(
        file.count(os.sep) != 1 or splits_named(os.path.basename(file)) or file.split(os.sep)[0].lower() in SPLIT_NAMES
        for file in files
    )


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


def _classes(split: SplitFolder) -> list[str]:
    """Return the class folder of each image; nothing where all lie in the split's folder itself."""
    folder = split.path
    places = [os.path.relpath(file, folder).split(os.sep) for file in split.files]
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
    places = {os.path.dirname(file) for other in others if other != folder for file in image_files(other)}
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
    return LabeledImages(rows, dataset, split, label_column=None, roots=[folder.path], folder=folder.path)
