"""What happens to a training image after the overlay: crop, flip, auto-augment, normalise, erase."""

from typing import Any

from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from timm_igkd.errors import InputError
from timm_igkd.overlay.timm_ops import posterize_to_black
from train_config import TrainConfig


def train_transform(config: TrainConfig, data_config: dict[str, Any]) -> Any:
    """Return the training transform; it ends with a normalised tensor, random erasing included.

    Args:
        config: the run's settings.
        data_config: timm's `resolve_model_data_config` of the model that is trained.

    Raises:
        InputError: an auto-augment string timm cannot read.
    """
    create = _resized_crop if config.train_crop == "rrc" else _whole_image
    try:
        with posterize_to_black():
            return create(config, data_config)
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"aa must be a timm auto-augment string such as rand-m9-mstd0.5, got {config.aa!r}") from error


def _resized_crop(config: TrainConfig, data_config: dict[str, Any]) -> Any:
    """timm's ImageNet pipeline."""
    return create_transform(
        input_size=data_config["input_size"],
        is_training=True,
        scale=(config.scale_min, 1.0),
        hflip=config.hflip,
        color_jitter=config.color_jitter,
        auto_augment=config.aa,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        re_prob=config.reprob,
        re_mode="pixel",
    )


def _whole_image(config: TrainConfig, data_config: dict[str, Any]) -> Any:
    """Small images: the whole image, shifted by up to 1/8 where train_crop is pad."""
    size, mean = data_config["input_size"][1:], data_config["mean"]
    steps: list[Any] = [transforms.Resize(size)]
    if config.train_crop == "pad":
        steps.append(transforms.RandomCrop(size, padding=max(1, size[0] // 8)))
    if config.hflip > 0:
        steps.append(transforms.RandomHorizontalFlip(config.hflip))
    if config.aa:
        steps.append(rand_augment_transform(config.aa, {"img_mean": tuple(round(255 * channel) for channel in mean)}))
    steps += [transforms.ToTensor(), transforms.Normalize(mean, data_config["std"])]
    if config.reprob > 0:
        steps.append(RandomErasing(config.reprob, mode="pixel", device="cpu"))
    return transforms.Compose(steps)
