"""Views of small images made on the device in whole batches: overlaid, cropped, flipped, both views at once.

The same arms as `IGOverlayDataset` behind a loader, in the same order: overlay in source coordinates, then the crop and
flip that student and teacher share, then normalisation. Draws come from streams of their own, one number per (seed,
purpose, epoch, image), so that arms of one seed share order, crops and coins.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from timm_igkd.distillation.options import TeacherViewMode
from timm_igkd.errors import InputError, check_choice, check_range
from timm_igkd.overlay.blend import IGOverlay, blend_map
from timm_igkd.overlay.device_images import DeviceImages
from timm_igkd.random_streams import generator

PaddingMode = Literal["black", "reflect"]


@dataclass(frozen=True)
class DeviceAugmentation:
    """What happens to a batch on the device.

    Attributes:
        overlay: probability and strength of the overlay.
        padding: pixels around the image before a crop of its own size, at a random place; 0: no crop.
        padding_mode: what these are: black, or the image reflected at its border.
        hflip: probability of a horizontal flip.
        alternate_flip: draw the flip of an image once, for epoch 0, and turn it in every later epoch, so that two
            epochs see both sides (K. Jordan, arXiv 2404.00498); with an `hflip` of 0 nothing is flipped.
        cutout: side in pixels of a square set to the mean colour at a random place, in both views; 0: none
            (DeVries and Taylor, arXiv 1708.04552).
        mean: per channel, of the normalisation.
        std: per channel, of the normalisation.
        teacher_view: "clean": the teacher's view has the same crop, flip and square, without the overlay. "same": there
            is one view.
    """

    overlay: IGOverlay
    padding: int = 0
    hflip: float = 0.0
    cutout: int = 0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    teacher_view: TeacherViewMode = "same"
    padding_mode: PaddingMode = "black"
    alternate_flip: bool = False

    def __post_init__(self) -> None:
        check_range("padding", self.padding, 0)
        check_choice("padding_mode", self.padding_mode, get_args(PaddingMode))
        check_range("hflip", self.hflip, 0, 1)
        check_range("cutout", self.cutout, 0)


class Draws(NamedTuple):
    """The random numbers of one epoch, one row per image of the dataset; all on the device.

    Attributes:
        overlaid: [N] bool.
        power: [N] float32, the map's exponent.
        shift: [N, 2] int64, row and column of the crop.
        flipped: [N] bool.
        square: [N, 2] int64, centre of the cutout.
    """

    overlaid: Tensor
    power: Tensor
    shift: Tensor
    flipped: Tensor
    square: Tensor

    def at(self, index: Tensor) -> "Draws":
        """Return the draws of the images at `index`."""
        return Draws(*(part[index] for part in self))


class DeviceViews:
    """The training views of a dataset that lies on the device.

    Args:
        data: images, and maps where the overlay's probability is above 0 or `with_maps`.
        augmentation: what is done to them.
        seed: coins, crops, flips and squares all derive from it, in streams of their own.
        with_maps: `maps` is going to be called.

    Raises:
        InputError: no maps where they are needed, or more padding by reflection than the images have.
    """

    def __init__(self, data: DeviceImages, augmentation: DeviceAugmentation, seed: int, *, with_maps: bool = False):
        if (augmentation.overlay.overlay_prob > 0 or with_maps) and data.maps is None:
            what = "maps of views" if with_maps else "overlays"
            raise InputError(f"{what} need maps, got none; build them with: timm-igkd maps")
        if augmentation.padding_mode == "reflect" and augmentation.padding >= min(data.images.shape[-2:]):
            raise InputError(
                f"padding by reflection must be below the images' side, {min(data.images.shape[-2:])}, got "
                f"{augmentation.padding}"
            )
        self.data, self.augmentation, self.seed = data, augmentation, seed
        self.device = data.labels.device
        self._pixels = _packed(data.images)
        self.mean, self.std = (
            torch.tensor(values, device=self.device) for values in (augmentation.mean, augmentation.std)
        )

    def draws(self, epoch: int) -> Draws:
        """Return the random numbers of one epoch."""
        n, settings = len(self.data), self.augmentation

        def stream(purpose: str) -> np.random.Generator:
            return generator(self.seed, purpose, epoch)

        coins, strengths = stream("overlay").random((2, n))
        powers = np.exp(strengths * np.log(settings.overlay.max_power))
        drawn = Draws(
            torch.from_numpy(coins < settings.overlay.overlay_prob),
            torch.from_numpy(powers.astype(np.float32)),
            torch.from_numpy(stream("crop").integers(0, 2 * settings.padding + 1, (n, 2))),
            torch.from_numpy(self._flips(epoch)),
            torch.from_numpy(stream("cutout").integers(0, self.data.images.shape[-2:], (n, 2))),
        )
        return Draws(*(part.to(self.device) for part in drawn))

    def _flips(self, epoch: int) -> np.ndarray:
        """Return which images are flipped in an epoch, [N] bool."""
        settings = self.augmentation
        drawn_in = 0 if settings.alternate_flip and settings.hflip else epoch
        drawn = generator(self.seed, "flip", drawn_in).random(len(self.data)) < settings.hflip
        return drawn ^ bool((epoch - drawn_in) % 2)

    def views(self, index: Tensor, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Return the student's and the teacher's views of the images at `index`.

        Args:
            index: [B] int64.
            draws: of these images, a row each.

        Returns:
            [B, 3, H, W] float32 each, normalised, channels last in memory; None where there is one view.
        """
        clean = self._pixels.index_select(0, index)
        student = self._overlaid(clean, index, draws) if self.augmentation.overlay.overlay_prob > 0 else clean
        transformed = self._normalized(student, draws)
        if self.augmentation.teacher_view == "same":
            return transformed, None
        return transformed, transformed if student is clean else self._normalized(clean, draws)

    def maps(self, index: Tensor, draws: Draws) -> Tensor:
        """Return the maps of the images at `index` in the coordinates of their views, [B, 1, H, W] float32 in [0, 1].

        Where a view shows no part of its image, in the border and in the square cut out, the map is 0.
        """
        assert self.data.maps is not None  # with_maps
        maps = self._cropped(self.data.maps[index].squeeze(1), draws, "black")[:, None].float().div_(255)
        return self._cut_out(maps, draws) if self.augmentation.cutout else maps

    def _overlaid(self, clean: Tensor, index: Tensor, draws: Draws) -> Tensor:
        """Blend the maps of the images whose coin fell so, rounded to 8 bits as an image file would be."""
        assert self.data.maps is not None
        chosen = draws.overlaid.nonzero().squeeze(1)
        rows = index[chosen]
        images, maps = (part.index_select(0, rows).float() / 255 for part in (self.data.images, self.data.maps))
        power = draws.power[chosen].view(-1, 1, 1, 1)
        blended = blend_map(images, maps, self.augmentation.overlay.overlay_weight, power)
        return clean.index_copy(0, chosen, _packed((blended * 255 + 0.5).floor_().to(torch.uint8)))

    def _normalized(self, pixels: Tensor, draws: Draws) -> Tensor:
        cropped = self._cropped(pixels, draws, self.augmentation.padding_mode)
        levels = _unpacked(cropped)
        normalized = torch.empty(levels.shape, device=self.device, memory_format=torch.channels_last)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            # a channel alone lies contiguous, which a processor's vector units want
            normalized[:, channel] = levels[:, channel].float().div_(255).sub_(mean).div_(std)
        return self._cut_out(normalized, draws) if self.augmentation.cutout else normalized

    def _cropped(self, pixels: Tensor, draws: Draws, padding_mode: PaddingMode) -> Tensor:
        """Crop and flip [B, H, W]: whole rows first, then the columns of each."""
        padding, (height, width) = self.augmentation.padding, pixels.shape[-2:]
        rows = draws.shift[:, :1] + torch.arange(height, device=self.device)
        columns = torch.arange(width, device=self.device).expand(len(pixels), width)
        columns = draws.shift[:, 1:] + torch.where(draws.flipped[:, None], columns.flip(1), columns)
        if padding and padding_mode == "reflect":
            rows, columns = _reflected(rows - padding, height), _reflected(columns - padding, width)
        elif padding:
            pixels = F.pad(pixels, (padding,) * 4)
        rows = rows + torch.arange(len(pixels), device=self.device)[:, None] * pixels.shape[1]
        taken = pixels.flatten(0, 1).index_select(0, rows.flatten()).view(len(pixels), height, -1)
        return taken.gather(2, columns[:, None, :].expand(-1, height, -1))

    def _cut_out(self, images: Tensor, draws: Draws) -> Tensor:
        """Set a square to 0, the mean colour of a normalised image; part of it may lie outside the image."""
        side, near = self.augmentation.cutout, []
        for axis, length in enumerate(images.shape[-2:]):
            place = torch.arange(length, device=self.device) - draws.square[:, axis : axis + 1] + side // 2
            near.append((place >= 0) & (place < side))
        return images.masked_fill((near[0][:, :, None] & near[1][:, None, :])[:, None], 0.0)


def _reflected(positions: Tensor, side: int) -> Tensor:
    """Return positions in an image of `side`, those outside mirrored at its first or last pixel."""
    return side - 1 - (side - 1 - positions.abs()).abs()


def _packed(images: Tensor) -> Tensor:
    """Return images [N, 3, H, W] uint8 as pixels [N, H, W] int32: a gather moves a colour, not three channels."""
    pixels = images.new_zeros(len(images), *images.shape[2:], 4)
    pixels[..., :3] = images.permute(0, 2, 3, 1)
    return pixels.view(torch.int32).squeeze(-1)


def _unpacked(pixels: Tensor) -> Tensor:
    """Return pixels [N, H, W] int32 as images [N, 3, H, W] uint8, channels last in memory: what convolutions want."""
    return pixels[..., None].view(torch.uint8)[..., :3].permute(0, 3, 1, 2)
