"""The images of a run: what it fits, watches the epochs by and is tested on; and whether given maps are of them."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from timm_igkd.attribution.ig_options import IGOptions
from timm_igkd.data.items import refuse_among_images
from timm_igkd.data.labeled_images import MOST_SHARED, MOST_TWINS, LabeledImages
from timm_igkd.data.labels import check_numbers, stratified_indices, stratified_limit
from timm_igkd.data.loading import Labels, load_labeled_images, refuse_shared
from timm_igkd.data.named_datasets import TIMM_PREFIXES
from timm_igkd.data.unlabeled import MixedImages, load_unlabeled_beside
from timm_igkd.distillation.losses import check_loss_type
from timm_igkd.errors import InputError
from timm_igkd.maps.build import compute_maps, teacher_difference
from timm_igkd.maps.manifest import read_manifest
from timm_igkd.maps.store import MapStore
from timm_igkd.overlay.device_images import DeviceImages, load_images
from timm_igkd.runs.checks import check_unlabeled
from timm_igkd.runs.settings import RunConfig

MOST_DECODED = 10_000
"""Images of a split that are decoded before anything is trained; of others their headers are read."""
_SIZES_READ = 256


class RunData:
    """Splits of one run, opened and their labels checked when it begins; all count the training split's classes.

    Args:
        config: names them.

    Attributes:
        train: the training split; it may lack labels, then the classes are those of the test split.
        unlabeled: images without labels beside it, or None.
        fitting: the part of `train` that models are fitted to.
        validation: images to watch the epochs by, or None; nothing is chosen by them.
        test: images that are read once, at the end.
        num_classes: of the training split.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        train = load_split(config, config.train_split, config.train_limit, labels="optional")
        self.train = train if train.has_labels else take_classes_of_test(config, train)
        self.unlabeled = None
        if config.unlabeled is not None:
            self.unlabeled = load_unlabeled_beside(config.unlabeled, config.unlabeled_split, config.image_column)
        self.num_classes = self.train.num_classes
        if self.num_classes < 2:
            what = f"split {config.train_split!r} of {config.dataset!r}"
            raise InputError(f"{what} has one class, expected two or more; add images of what it is to be told from")
        if config.distill_loss_weight > 0:
            check_loss_type(config.loss_type, self.num_classes)
        self.fitting, self.validation = cut_validation(config, self.train)
        self.test = load_other_split(config, config.test_split, self.train, config.test_limit)
        if config.validation_split is not None and self.validation is not None:
            _check_apart(config, self.validation, self.test)

    @cached_property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of the training images, as _SIZES_READ of them tell; None where they have several sizes."""
        return self.train.common_size(_SIZES_READ)

    @property
    def mapped(self) -> LabeledImages | MixedImages:
        """What maps are made of: the training split, then the images without labels."""
        return self.train if self.unlabeled is None else MixedImages(self.train, self.unlabeled)

    @property
    def student_images(self) -> LabeledImages | MixedImages:
        """What the student is fitted to: `fitting`, then the images without labels."""
        return self.fitting if self.unlabeled is None else MixedImages(self.fitting, self.unlabeled)

    @property
    def num_unlabeled(self) -> int:
        """How many of the student's images have no label."""
        without = [part for part in (self.fitting, self.unlabeled) if part is not None and not part.has_labels]
        return sum(map(len, without))

    @cached_property
    def train_hash(self) -> str:
        """Content hash of the training split."""
        return self.train.content_hash()

    @cached_property
    def validation_hash(self) -> str:
        """Content hash of the images to watch by, empty where they are part of the training split."""
        if self.config.validation_split is None or self.validation is None:
            return ""
        return self.validation.content_hash()

    @cached_property
    def unlabeled_hash(self) -> str:
        """Content hash of the images without labels beside the training split, empty where there are none."""
        return "" if self.unlabeled is None else self.unlabeled.content_hash()

    @cached_property
    def test_hash(self) -> str:
        """Content hash of the test split."""
        return self.test.content_hash()

    @cached_property
    def fitting_images(self) -> DeviceImages:
        """The student's images, decoded once, on the CPU; a SeveralSizesError where they have several sizes."""
        return load_images(self.student_images)

    def refuse_output(self, folder: Path) -> None:
        """Raise InputError for a run's folder that would become a part of its own images."""
        for images in (self.mapped, self.validation, self.test):
            if images is not None:
                refuse_among_images(images, folder, "choose another --output-dir")

    def check_images(self, mapped_first: bool) -> None:
        """Read what is going to be trained on and evaluated, before either; see `LabeledImages.check_images`.

        Of a split, MOST_DECODED images are decoded: seconds for small ones, a minute or two for photographs.

        Args:
            mapped_first: the stage of the maps, which decodes every image that it reads, comes before all training.
        """
        self._check_shared()
        is_read = mapped_first or "fitting_images" in vars(self)  # decoded already, for batches on the device
        found = [] if is_read else [self.fitting, self.unlabeled]
        own_split = self.config.validation_split is not None
        found += [self.validation if own_split or not mapped_first else None, self.test]
        for images in found:
            if images is not None:
                images.check_images(MOST_DECODED)

    def _check_shared(self) -> None:
        """Raise InputError where images that are tested or watched are elsewhere too; see `refuse_shared`."""
        own = self.validation if self.config.validation_split is not None else None
        sources = {"unlabeled": self.unlabeled, "train_split": self.train, "validation_split": own}
        for setting, images in sources.items():
            for target, other in (("test_split", self.test), ("validation_split", own)):
                if images is not None and other is not None and images is not other:
                    names = [f"{name} {getattr(self.config, name)!r}" for name in (setting, target)]
                    most = MOST_SHARED if images is self.unlabeled else MOST_TWINS
                    refuse_shared(images, other, *names, most=most)


def load_split(config: RunConfig, split: str, limit: int | None = None, labels: Labels = "required") -> LabeledImages:
    """Return a split of the run's dataset, or `limit` images of it, drawn by the seed with every class in its share."""
    if config.dataset.startswith(TIMM_PREFIXES) and not Path(config.dataset).exists():
        raise InputError(f"dataset must be a Hub id, a folder or digits, got timm's {config.dataset}; give its folder")
    columns = config.image_column, config.label_column, config.revision
    images = load_labeled_images(config.dataset, split, *columns, labels=labels)
    found = images.labels  # all are checked here, before anything is trained
    return images.subset(stratified_limit(found, limit, config.seed)) if limit and limit < len(images) else images


def take_classes_of_test(config: RunConfig, train: LabeledImages) -> LabeledImages:
    """Return a training split without labels with the names of the classes that its teacher tells apart.

    Raises:
        InputError: settings that need its labels, or a test split that does not name its classes.
    """
    what = f"split {config.train_split!r} of {config.dataset!r} has no labels"
    if config.compare is not None:
        raise InputError(f"{what} to train the arm without a teacher on; drop --compare")
    if config.teacher_epochs > 0:
        remedy = "set teacher_epochs to 0, or put the images into folders of two classes or more"
        raise InputError(f"{what} to train a teacher on; {remedy}")
    try:
        check_unlabeled(config)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    names = load_split(config, config.test_split).class_names
    if names is None:
        raise InputError(f"{what}, and split {config.test_split!r} no names of classes; make its labels a ClassLabel")
    return train.without_labels(names)


def load_other_split(config: RunConfig, split: str, train: LabeledImages, limit: int | None = None) -> LabeledImages:
    """Return a split whose labels count the training split's classes.

    Raises:
        InputError: the training split itself, a class that it lacks, or labels beyond its classes where they have no
            names.
    """
    images = load_split(config, split, limit)
    if train.shares_images(images):
        raise InputError(
            f"split {split!r} of {config.dataset!r} holds images of {train.split!r}, which is trained on: accuracy on "
            "them says nothing; name another"
        )
    if train.class_names is not None:
        return images.in_class_order(train.class_names)
    check_numbers(images.labels, images.class_names, train.num_classes, f"split {split!r} of {config.dataset!r}")
    return images


def _check_apart(config: RunConfig, validation: LabeledImages, test: LabeledImages) -> None:
    """Raise InputError where the epochs are watched by images that are to be read once, at the end."""
    if validation.shares_images(test):
        raise InputError(
            f"validation_split {config.validation_split!r} holds images of test_split {config.test_split!r}, which are "
            "read once, at the end; name another, or set validation_fraction in its place"
        )


def cut_validation(config: RunConfig, train: LabeledImages) -> tuple[LabeledImages, LabeledImages | None]:
    """Return the images to fit and those to watch the epochs by: a split of their own, or a stratified part of `train`.

    Nothing is cut from images without labels, of which no accuracy is known.
    """
    if config.validation_split is not None:
        return train, load_other_split(config, config.validation_split, train)
    if config.validation_fraction == 0 or not train.has_labels:
        return train, None
    labels = train.labels
    held_out = stratified_indices(labels, config.validation_fraction, config.seed, "validation").numpy()
    fitting = np.setdiff1d(np.arange(len(labels)), held_out)
    if not len(held_out) or not len(fitting):
        most = int(np.bincount(labels).max())  # images of a class, of which such a share is one
        other = f"{math.ceil(100 / most) / 100:g}, or to 0 for none" if most > 1 else "0 for none"
        raise InputError(
            f"validation_fraction {config.validation_fraction:g} leaves {len(fitting)} of {len(labels)} images to "
            f"train on and {len(held_out)} to watch the epochs by; set it to {other}"
        )
    return train.subset(fitting), train.subset(held_out)


def build_maps(config: RunConfig, teacher: nn.Module, data: RunData, out: Path) -> None:
    """Compute the teacher's maps of the training images; its logits alone where the run reads no map.

    Raises:
        InputError: the folder was begun for a run that reads no map, see `check_own_maps`.
    """
    check_own_maps(config, out)
    reads_maps = config.reads_maps
    trained = "trained from scratch" if config.teacher_init == "random" else "fine-tuned"
    compute_maps(
        teacher,
        data.mapped,
        out,
        options=config.ig_options() if reads_maps else IGOptions(method="none"),
        engine=config.engine if reads_maps else "fast",
        map_size=config.map_size if reads_maps else None,
        logits=config.stored_logits,
        teacher_name=f"{config.teacher}, {trained}" if config.teacher_epochs else config.teacher,
    )


def check_own_maps(config: RunConfig, out: Path) -> None:
    """Raise InputError where a run reads maps, and its folder holds a store without any, finished or begun."""
    is_own = config.maps is None and not out.is_symlink() and (out / "manifest.json").exists()
    if config.reads_maps and is_own and not read_manifest(out).options.has_maps:
        raise InputError(
            f"{str(out)!r} holds logits alone: it was begun by a run without overlay and explanation loss; delete it, "
            "or choose another --name"
        )


def check_given_maps(config: RunConfig, store: MapStore, teacher: nn.Module, data: RunData) -> None:
    """Raise InputError unless the store of --maps is of the teacher, the number of images and the settings of the run.

    That its rows are those of the images, `MapStore.verify` tells, in the stage that would build maps.

    Args:
        config: the run's settings.
        store: what --maps names or, once the run has a link, what that leads to.
        teacher: of the run.
        data: its images.
    """
    found = store.provenance
    if (difference := teacher_difference(found, teacher, data.train)) is not None:
        raise InputError(
            f"maps {config.maps!r} were made by another teacher than this run's: {difference}, or drop --maps"
        )
    if found.n != len(data.mapped):
        more = f" and {config.unlabeled!r} give" if config.unlabeled else " gives"
        raise InputError(
            f"maps {config.maps!r} are of {found.n} images, split {config.train_split!r}{more} {len(data.mapped)} to "
            "this run; give the store of these images, or drop --maps"
        )
    if config.stored_logits:
        store.require_logits(data.train)
    if not config.reads_maps:
        return  # logits are the same, whatever maps lie beside them
    store.require_maps()
    wanted: dict[str, Any] = {**config.ig_options().used, "engine": config.engine, "map_size": config.map_size}
    flags = {name: f"map_{name}" for name in ("method", "baseline", "target", "output", "reduction")}
    there = {**found.options.used, "engine": found.engine, "map_size": found.map_size}
    for name, value in wanted.items():
        if there.get(name) != value:
            flag, own = flags.get(name, name), there.get(name)
            raise InputError(
                f"maps {config.maps!r} were made with {flag} {own}, this run asks for {value}; set {flag} to "
                f"{'none' if own is None else own}, or drop --maps"
            )
