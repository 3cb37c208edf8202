"""The images of a run: what it fits, what it chooses by, and what it is tested on."""

from functools import cached_property

from timm_igkd.overlay.device_images import DeviceImages, load_images
from timm_igkd.runs.settings import RunConfig
from timm_igkd.runs.splits import cut_validation, load_other_split, load_split


class RunData:
    """Splits of one run, opened and their labels checked when it begins; all count the training split's classes.

    Args:
        config: names them.

    Attributes:
        train: the training split, which maps are made of.
        fitting: the part of it that models are fitted to.
        validation: images to choose by, or None.
        test: images that are read once, at the end.
        num_classes: of the training split.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.train = load_split(config, config.train_split, config.train_limit)
        self.num_classes = self.train.num_classes
        self.fitting, self.validation = cut_validation(config, self.train)
        self.test = load_other_split(config, config.test_split, self.train, config.test_limit)

    @cached_property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the first training image."""
        width, height = self.train.read(0)[0].size
        return height, width

    @cached_property
    def fitting_images(self) -> DeviceImages:
        """All images to fit, decoded once, on the CPU; a SeveralSizesError where they have several sizes."""
        return load_images(self.fitting)
