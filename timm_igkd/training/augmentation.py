"""What happens to a training image after the overlay: crop, flip, auto-augment, normalise, erase.

torch and timm are imported where they are used: the settings of a run are checked without them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from timm_igkd.distillation.options import TeacherViewMode
from timm_igkd.errors import InputError, check_choice, check_range
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.training.settings import TrainCrop

if TYPE_CHECKING:
    from timm_igkd.overlay.device_views import DeviceAugmentation


@dataclass(frozen=True)
class TrainAugmentation:
    """The random transform of a training image, for timm's pipeline and, where it can, for the device.

    Attributes:
        train_crop: "none": the whole image; "pad": a crop of its own size, the image padded by 1/8 (the paper's);
            "rrc": timm's RandomResizedCrop.
        scale_min: smallest area of RandomResizedCrop.
        color_jitter: its strength; with RandomResizedCrop alone, and beside no aa but 3a.
        hflip: probability of a horizontal flip.
        aa: timm's auto-augment string, without the overlay.
        reprob: probability of random erasing.
    """

    train_crop: TrainCrop = "pad"
    scale_min: float = 0.08
    hflip: float = 0.0
    aa: str | None = None
    color_jitter: float = 0.0
    reprob: float = 0.0

    def __post_init__(self) -> None:
        check_choice("train_crop", self.train_crop, get_args(TrainCrop))
        for name in ("scale_min", "hflip", "reprob"):
            check_range(name, getattr(self, name), 0, 1)
        if self.color_jitter and self.train_crop != "rrc":
            raise InputError(
                f"color_jitter goes with train_crop rrc alone, got {self.color_jitter:g} with {self.train_crop}; set "
                "train_crop to rrc, or color_jitter to 0"
            )
        if self.color_jitter and self.aa and "3a" not in self.aa:
            raise InputError(
                f"timm has no color_jitter beside aa, got {self.color_jitter:g} and {self.aa!r}; drop one of them"
            )
        if self.aa and "tigkd" in self.aa.split("-"):  # what overlays: timm_ops.py
            raise InputError(
                f"the overlay comes before all other augmentations, got aa {self.aa!r}; drop tigkd, set overlay_prob"
            )

    @property
    def only_by_workers(self) -> str | None:
        """The first setting that only timm's pipeline can do, or None."""
        needs = {"train_crop rrc": self.train_crop == "rrc", "aa": bool(self.aa), "reprob": self.reprob > 0}
        return next((name for name, needed in needs.items() if needed), None)

    def on_device(
        self, data_config: dict[str, Any], overlay: IGOverlay, teacher_view: "TeacherViewMode"
    ) -> "DeviceAugmentation":
        """Return the same for whole batches on the device; `only_by_workers` must be None."""
        from timm_igkd.overlay.device_views import DeviceAugmentation

        padding = _border(data_config) if self.train_crop == "pad" else 0
        mean, std = data_config["mean"], data_config["std"]
        return DeviceAugmentation(
            overlay, padding=padding, hflip=self.hflip, mean=mean, std=std, teacher_view=teacher_view
        )

    def transform(self, data_config: dict[str, Any]) -> Any:
        """Return the transform of one image, to [3, H, W].

        uint8 pixels, which `WorkerBatches` normalises in whole batches, or with random erasing, which comes after the
        normalisation, a float32 tensor.

        Args:
            data_config: timm's `resolve_model_data_config` of the model that is trained.

        Raises:
            InputError: an auto-augment string timm cannot read.
        """
        from timm_igkd.overlay.timm_ops import posterize_to_black

        create = self._resized_crop if self.train_crop == "rrc" else self._whole_image
        try:
            with posterize_to_black():
                return create(data_config)
        except (AssertionError, KeyError, ValueError) as error:
            if not self.aa:
                raise
            raise InputError(
                f"aa must be a timm auto-augment string such as rand-m9-mstd0.5, got {self.aa!r}"
            ) from error

    def _resized_crop(self, data_config: dict[str, Any]) -> Any:
        """Timm's ImageNet pipeline."""
        from timm.data import create_transform

        return create_transform(
            input_size=data_config["input_size"],
            is_training=True,
            scale=(self.scale_min, 1.0),
            hflip=self.hflip,
            color_jitter=self.color_jitter,
            auto_augment=self.aa,
            interpolation=data_config["interpolation"],
            mean=data_config["mean"],
            std=data_config["std"],
            re_prob=self.reprob,
            re_mode="pixel",
            use_prefetcher=not self.reprob,  # with it, timm leaves normalisation and erasing to others
        )

    def _whole_image(self, data_config: dict[str, Any]) -> Any:
        """Small images: the whole image, shifted by up to 1/8 where train_crop is pad."""
        from timm.data.auto_augment import (
            augment_and_mix_transform,
            auto_augment_transform,
            rand_augment_transform,
        )
        from timm.data.random_erasing import RandomErasing
        from timm.data.transforms import ToNumpy, str_to_interp_mode, str_to_pil_interp
        from torchvision import transforms

        size, mean = data_config["input_size"][1:], data_config["mean"]
        steps: list[Any] = [transforms.Resize(size, str_to_interp_mode(data_config["interpolation"]))]
        if self.train_crop == "pad":
            steps.append(transforms.RandomCrop(size, padding=_border(data_config)))
        if self.hflip > 0:
            steps.append(transforms.RandomHorizontalFlip(self.hflip))
        if self.aa:
            kinds = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
            kind = next((kind for kind in kinds if self.aa.startswith(kind)), "")
            params: dict[str, Any] = {  # these are timm's, of transforms_imagenet_train
                "translate_const": int(0.45 * min(size)),
                "img_mean": tuple(min(255, round(255 * value)) for value in mean),
                "interpolation": str_to_pil_interp(data_config["interpolation"]),
            }
            if kind == "augmix":
                params["translate_pct"] = 0.3
            steps.append(kinds.get(kind, auto_augment_transform)(self.aa, params))
        if self.reprob > 0:
            steps += [transforms.ToTensor(), transforms.Normalize(mean, data_config["std"])]
            steps.append(RandomErasing(self.reprob, mode="pixel", device="cpu"))
        else:
            steps.append(ToNumpy())
        return transforms.Compose(steps)


def _border(data_config: dict[str, Any]) -> int:
    return max(1, data_config["input_size"][1] // 8)
