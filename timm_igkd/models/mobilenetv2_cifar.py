"""MobileNetV2 for 32x32 images, whole or with its last feature blocks cut off, as a timm model.

Source: arXiv 2506.14440 (teacher and students) and 1801.04381 (MobileNetV2); tensor names are torchvision's.
"""

import re
from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops.misc import Conv2dNormActivation

from timm_igkd.models.cifar_network import CifarNetwork, cifar_cfgs, kept_blocks, stage_features

NUM_BLOCKS = 19
"""Feature blocks of the whole network, counting the stem and the last 1x1 convolution."""

STEM_CHANNELS = 32
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Inverted residuals as (expansion, channels, repeats, stride of the first)."""
LAST_CHANNELS = 1280
STAGE_ENDS = (3, 6, 13, 18)
"""Index of the last block at each spatial reduction (1, 2, 4, 8)."""


def _create_blocks(num_blocks: int, in_chans: int) -> tuple[list[nn.Module], list[int], list[int]]:
    """Return the first `num_blocks` feature blocks, and the channels and reduction of each."""
    blocks: list[nn.Module] = [
        Conv2dNormActivation(in_chans, STEM_CHANNELS, stride=1, norm_layer=nn.BatchNorm2d, activation_layer=nn.ReLU6)
    ]
    channels, reductions = [STEM_CHANNELS], [1]
    layout = [(e, c, s if i == 0 else 1) for e, c, repeats, s in STAGES for i in range(repeats)]
    for expansion, width, stride in layout[: num_blocks - 1]:
        blocks.append(InvertedResidual(channels[-1], width, stride, expansion))
        channels.append(width)
        reductions.append(reductions[-1] * stride)
    if num_blocks == NUM_BLOCKS:
        blocks.append(Conv2dNormActivation(channels[-1], LAST_CHANNELS, kernel_size=1, activation_layer=nn.ReLU6))
        channels.append(LAST_CHANNELS)
        reductions.append(reductions[-1])
    return blocks, channels, reductions


class MobileNetV2Cifar(CifarNetwork):
    """The paper's network: 19 feature blocks less `drop_blocks`, global average pool, dropout, linear.

    Args:
        drop_blocks: feature blocks cut from the end, 0 to 17.
        in_chans: image channels.
        drop_rate: dropout before the classifier.
        options: of `CifarNetwork`.

    Raises:
        InputError: `drop_blocks` out of range.
    """

    def __init__(self, drop_blocks: int = 0, *, in_chans: int = 3, drop_rate: float = 0.2, **options: Any) -> None:
        blocks = _create_blocks(kept_blocks("mobilenetv2_cifar", drop_blocks, NUM_BLOCKS), in_chans)
        super().__init__(*blocks, drop_blocks, False, in_chans=in_chans, drop_rate=drop_rate, **options)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of the authors' attention-transfer students, split at a middle block, to `features.N`."""
    if "state_dict" in state_dict:
        state_dict = state_dict["state_dict"]  # type: ignore[assignment]
    front = [int(match[1]) for name in state_dict if (match := re.match(r"front_layers\.(\d+)\.", name))]
    if not front:
        return state_dict
    middle = max(front) + 1
    renamed = {}
    for name, tensor in state_dict.items():
        name = re.sub(r"^front_layers\.", "features.", name)
        name = re.sub(r"^middle_layer\.", f"features.{middle}.", name)
        name = re.sub(r"^end_layers\.(\d+)", lambda match: f"features.{middle + 1 + int(match[1])}", name)
        renamed[name] = tensor
    return renamed


default_cfgs = cifar_cfgs(["mobilenetv2_cifar"], "features.0.0", 4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@register_model
def mobilenetv2_cifar(pretrained: bool = False, **kwargs: Any) -> MobileNetV2Cifar:
    """MobileNetV2 for 32x32 images; `drop_blocks` cuts the tail of its 19 feature blocks."""
    kept = kept_blocks("mobilenetv2_cifar", kwargs.get("drop_blocks", 0), NUM_BLOCKS)
    return build_model_with_cfg(
        MobileNetV2Cifar,
        "mobilenetv2_cifar",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=stage_features(STAGE_ENDS, kept),
        **kwargs,
    )
