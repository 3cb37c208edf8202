"""Which images a run fits, chooses by, and is tested on."""

from pathlib import Path

import numpy as np

from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.data.loading import TIMM_PREFIXES, load_labeled_images
from timm_igkd.data.subsets import stratified_indices
from timm_igkd.errors import InputError
from timm_igkd.runs.settings import RunConfig


def load_split(config: RunConfig, split: str, limit: int | None = None) -> LabeledImages:
    """Return a split of the run's dataset, or only its first `limit` images."""
    if config.dataset.startswith(TIMM_PREFIXES) and not Path(config.dataset).exists():
        raise InputError(f"dataset must be a Hub id, a folder or digits, got timm's {config.dataset}; give its folder")
    images = load_labeled_images(config.dataset, split, config.image_column, config.label_column, config.revision)
    return images.subset(range(min(limit, len(images)))) if limit else images


def cut_validation(config: RunConfig, train: LabeledImages) -> tuple[LabeledImages, LabeledImages | None]:
    """Return the images to fit and those to choose by: a split of their own, or a stratified part of `train`."""
    if config.validation_split is not None:
        return train, load_split(config, config.validation_split)
    if config.validation_fraction == 0:
        return train, None
    labels = train.labels
    held_out = stratified_indices(labels, config.validation_fraction, config.seed, "validation").numpy()
    fitting = np.setdiff1d(np.arange(len(labels)), held_out)
    if not len(held_out) or not len(fitting):
        raise InputError(
            f"validation_fraction {config.validation_fraction:g} leaves {len(fitting)} of {len(labels)} images to "
            f"train on and {len(held_out)} to choose by; give another, or 0 for none"
        )
    return train.subset(fitting), train.subset(held_out)
