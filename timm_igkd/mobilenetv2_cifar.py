"""MobileNetV2 for 32x32 images, whole or with its last feature blocks cut off, as a timm model.

Source: arXiv 2506.14440 (teacher and students) and 1801.04381 (MobileNetV2); tensor names are torchvision's.
"""

import re
from typing import Any

from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, checkpoint, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops.misc import Conv2dNormActivation

from timm_igkd.errors import InputError

NUM_BLOCKS = 19
"""Feature blocks of the whole network, counting the stem and the last 1x1 convolution."""

STEM_CHANNELS = 32
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Inverted residuals as (expansion, channels, repeats, stride of the first)."""
LAST_CHANNELS = 1280
STAGE_ENDS = (3, 6, 13, 18)
"""Index of the last block at each spatial reduction (1, 2, 4, 8)."""


def _check_drop_blocks(drop_blocks: Any) -> None:
    if isinstance(drop_blocks, bool) or not isinstance(drop_blocks, int) or not 0 <= drop_blocks <= NUM_BLOCKS - 2:
        raise InputError(
            f"drop_blocks must be a whole number from 0 to {NUM_BLOCKS - 2} "
            f"(mobilenetv2_cifar has {NUM_BLOCKS} feature blocks), got {drop_blocks!r}"
        )


def _create_blocks(num_blocks: int, in_chans: int) -> tuple[list[nn.Module], list[dict[str, Any]]]:
    """Return the first `num_blocks` feature blocks and timm's feature_info, one entry per block."""
    blocks: list[nn.Module] = [
        Conv2dNormActivation(in_chans, STEM_CHANNELS, stride=1, norm_layer=nn.BatchNorm2d, activation_layer=nn.ReLU6)
    ]
    channels, reduction = STEM_CHANNELS, 1
    feature_info = [{"num_chs": channels, "reduction": reduction, "module": "features.0"}]
    layout = [(e, c, s if i == 0 else 1) for e, c, repeats, s in STAGES for i in range(repeats)]
    for expansion, width, stride in layout[: num_blocks - 1]:
        blocks.append(InvertedResidual(channels, width, stride, expansion))
        channels, reduction = width, reduction * stride
        feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"features.{len(blocks) - 1}"})
    if num_blocks == NUM_BLOCKS:
        blocks.append(Conv2dNormActivation(channels, LAST_CHANNELS, kernel_size=1, activation_layer=nn.ReLU6))
        feature_info.append({"num_chs": LAST_CHANNELS, "reduction": reduction, "module": f"features.{num_blocks - 1}"})
    return blocks, feature_info


class MobileNetV2Cifar(nn.Module):
    """The paper's network: 19 feature blocks less `drop_blocks`, global average pool, dropout, linear.

    `forward_intermediates` has one entry per block.

    Args:
        drop_blocks: feature blocks cut from the end, 0 to 17.
        num_classes: outputs of the classifier, 0 for none.
        in_chans: image channels.
        drop_rate: dropout before the classifier.
        global_pool: a pooling of timm's, "" for none.

    Raises:
        InputError: `drop_blocks` out of range.
    """

    def __init__(
        self,
        drop_blocks: int = 0,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.2,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check_drop_blocks(drop_blocks)
        self.drop_blocks = drop_blocks
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        blocks, self.feature_info = _create_blocks(NUM_BLOCKS - drop_blocks, in_chans)
        self.features = nn.Sequential(*blocks)
        self.num_features: int = self.feature_info[-1]["num_chs"]
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.classifier = nn.Sequential(
            nn.Dropout(drop_rate), nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()
        )
        self._init_weights()
        self.to(device=device, dtype=dtype)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns that group parameters by depth."""
        return {"stem": r"^features\.0\.", "blocks": r"^features\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.classifier[1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place; the pooling stays unless given."""
        reference = next(self.features.parameters())
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        linear: nn.Module = nn.Identity()
        if num_classes > 0:
            linear = nn.Linear(self.head_hidden_size, num_classes, device=reference.device, dtype=reference.dtype)
            nn.init.normal_(linear.weight, 0, 0.01)
            nn.init.zeros_(linear.bias)
        self.classifier[1] = linear
        self.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the features of the chosen blocks, and the final features unless `intermediates_only`.

        Args:
            x: (B, C, H, W) images.
            indices: blocks to return; the last n if an int, all if None.
            norm: no effect, every block ends in its own normalisation.
            stop_early: stop at the last chosen block; needs `intermediates_only`.
            output_fmt: "NCHW".
            intermediates_only: leave the final features out.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        assert intermediates_only or not stop_early, "Must use intermediates_only for early stopping."
        take_indices, max_index = feature_take_indices(len(self.features), indices)
        intermediates = []
        for i, block in enumerate(self.features[: max_index + 1] if stop_early else self.features):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut the blocks behind the last chosen one, and the classifier; return the chosen indices."""
        take_indices, max_index = feature_take_indices(len(self.features), indices)
        prune_end = max_index < len(self.features) - 1
        self.features = self.features[: max_index + 1]
        self.feature_info = self.feature_info[: max_index + 1]
        self.num_features = self.feature_info[-1]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the (B, C, H, W) features of the last block."""
        return checkpoint_seq(self.features, x) if self.grad_checkpointing else self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of features, or what the linear layer would see."""
        x = self.classifier[0](self.global_pool(x))
        return x if pre_logits else self.classifier[1](x)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, num_classes) logits of (B, C, H, W) images."""
        return self.forward_head(self.forward_features(x))


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


default_cfgs = generate_default_cfgs(
    {
        "mobilenetv2_cifar": {
            "input_size": (3, 32, 32),
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "num_classes": 10,
            "first_conv": "features.0.0",
            "classifier": "classifier.1",
            "license": "apache-2.0",
        }
    }
)


@register_model
def mobilenetv2_cifar(pretrained: bool = False, **kwargs: Any) -> MobileNetV2Cifar:
    """MobileNetV2 for 32x32 images; `drop_blocks` cuts the tail of its 19 feature blocks."""
    _check_drop_blocks(kwargs.get("drop_blocks", 0))
    kept = NUM_BLOCKS - kwargs.get("drop_blocks", 0)
    out_indices = tuple(i for i in STAGE_ENDS if i < kept) or (kept - 1,)
    return build_model_with_cfg(
        MobileNetV2Cifar,
        "mobilenetv2_cifar",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )
