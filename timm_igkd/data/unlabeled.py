"""Images without labels, alone or beside labelled ones: a teacher's answers are all that a student learns from them."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.utils.data
import xxhash

from timm_igkd.data.class_folders import SplitFolder, load_image_folder
from timm_igkd.data.folders import TABLES, check_folder, image_files, walk
from timm_igkd.data.items import gives_rows, parts
from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.data.loading import load_labeled_images
from timm_igkd.data.named_datasets import TIMM_PREFIXES
from timm_igkd.errors import InputError, MissingColumnError
from timm_igkd.files import given_path


def load_unlabeled_beside(dataset: str, split: str | None, image_column: str | None) -> LabeledImages:
    """Open images without labels for a run whose labelled ones are of a column that was named, or None.

    That column is theirs too where they have it. Else, and in a folder of images or the digits, none was named.

    Raises:
        as `load_unlabeled_images` does.
    """
    if image_column is not None and dataset != "digits" and not _is_image_folder(dataset):
        with contextlib.suppress(MissingColumnError):
            return load_unlabeled_images(dataset, split, image_column)
    return load_unlabeled_images(dataset, split)


def load_unlabeled_images(
    dataset: str, split: str | None = None, image_column: str | None = None, revision: str | None = None
) -> LabeledImages:
    """Open images whose labels, if there are any, are not looked at.

    Args:
        dataset: a folder of images at any depth; or what `load_labeled_images` opens by `datasets`: a folder of
            parquet, a Hub id, `digits`.
        split: of the latter, train if None; of a folder of images: one folder in it. None, and train where there is no
            such folder: all of it.
        image_column: as `load_labeled_images` takes it.
        revision: of a Hub dataset.

    Raises:
        MissingFileError: no such folder. InputError: no images in it, or whatever `load_labeled_images` refuses.
    """
    if dataset.startswith(TIMM_PREFIXES) and not os.path.exists(dataset):
        raise InputError(f"unlabeled must be a folder of images or of parquet, or a Hub id, got timm's {dataset}")
    folder = str(given_path("unlabeled", dataset))
    if _is_image_folder(dataset):
        if image_column is not None:
            raise InputError(f"image_column {image_column} has no effect on a folder of images; leave it out")
        part = os.path.join(folder, split or "train")
        is_whole = split is None or (split == "train" and not os.path.isdir(part))
        found = os.path.abspath(check_folder(folder if is_whole else part))
        if not (files := image_files(found)):
            raise InputError(f"folder {dataset!r} holds no images, expected files like image.png at any depth")
        return load_image_folder(dataset, SplitFolder(found, files), split or "train")
    return load_labeled_images(dataset, split or "train", image_column, None, revision, labels="ignored")


def _is_image_folder(dataset: str) -> bool:
    """Return whether a name is a folder's, of image files and no tables."""
    folder = str(given_path("unlabeled", dataset))
    return os.path.isdir(folder) and not any(name.endswith(TABLES) for _, _, names in walk(folder) for name in names)


class MixedImages(torch.utils.data.ConcatDataset):
    """Labelled images, then images without labels, as one dataset whose classes are those of the labelled ones.

    Args:
        labeled: images with labels.
        unlabeled: images without.
    """

    def __init__(self, labeled: LabeledImages, unlabeled: LabeledImages):
        super().__init__([labeled, unlabeled])
        self.labeled, self.unlabeled = labeled, unlabeled
        self.name, self.split, self.revision = labeled.name, labeled.split, labeled.revision

    @property
    def labels(self) -> np.ndarray:
        """All labels, [n] int64, UNLABELED where there is none."""
        return np.concatenate([self.labeled.labels, self.unlabeled.labels])

    @property
    def class_names(self) -> Sequence[str] | None:
        """Of the labelled images."""
        return self.labeled.class_names

    @property
    def num_classes(self) -> int:
        """Of the labelled images."""
        return self.labeled.num_classes

    def content_hash(self) -> str:
        """Return a hash of both parts, 32 hex digits."""
        return xxhash.xxh3_128_hexdigest((self.labeled.content_hash() + self.unlabeled.content_hash()).encode())


def content_hash_of(dataset: Any, limit: int | None) -> str | None:
    """Return the hash of a data set's images, of the first `limit` alone; None where it tells none of its own."""
    if not all(gives_rows(part) for part in parts(dataset)):
        return None
    if isinstance(dataset, MixedImages) and not limit:
        return dataset.content_hash()
    if not isinstance(dataset, LabeledImages):
        return None
    return (dataset.subset(range(limit)) if limit and limit < len(dataset) else dataset).content_hash()
