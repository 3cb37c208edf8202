"""The residual networks of the distillation literature for 32x32 images, as timm models.

Sources: He et al., arXiv 1512.03385 (ResNet-20 to -110); Zagoruyko & Komodakis, arXiv 1605.07146 (Wide ResNets); the
"x4" widths are Tian et al.'s, arXiv 1910.10699. Weights of others load through `checkpoint_filter_fn`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch.nn.functional as F
from timm.models import build_model_with_cfg, clean_state_dict, register_model
from torch import Tensor, nn

from timm_igkd.errors import InputError, check_choice
from timm_igkd.models.cifar_network import CifarNetwork, cifar_cfgs, kept_blocks, stage_features

Shortcut = Literal["projection", "padding"]


class _PaddedShortcut(nn.Module):
    """Every second pixel, and channels of zeros on both sides: a shortcut without parameters (He et al., option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.before = stride, (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm, around a shortcut; ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = _PaddedShortcut(inputs, outputs, stride)
            if shortcut == "projection":
                projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H / stride, W / stride)."""
        residual = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(residual + self.shortcut(x))


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each behind batch norm and ReLU, and a sum that stays without either."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H / stride, W / stride)."""
        active = self.act(self.bn1(x))
        residual = self.conv2(self.act(self.bn2(self.conv1(active))))
        return residual + (x if self.shortcut is None else self.shortcut(active))


class ResNetCifar(CifarNetwork):
    """3x3 stem, three stages of residual blocks at 32, 16 and 8 pixels, global average pool, linear.

    Args:
        depth: layers: 6 n + 2 for n basic blocks a stage, 6 n + 4 for n pre-activation blocks.
        widths: channels of the stem and of each stage.
        pre_activation: blocks of Wide ResNets.
        shortcut: what basic blocks add where size or width change: a 1x1 convolution, or padding without parameters.
        drop_blocks: feature blocks cut from the end (the stem and every residual block are one each).
        in_chans: image channels.
        options: of `CifarNetwork`.

    Raises:
        InputError: unknown `shortcut`, or `drop_blocks` out of range.
    """

    def __init__(
        self,
        depth: int,
        widths: Sequence[int],
        pre_activation: bool = False,
        shortcut: Shortcut = "projection",
        drop_blocks: int = 0,
        *,
        in_chans: int = 3,
        **options: Any,
    ) -> None:
        check_choice("shortcut", shortcut, get_args(Shortcut))
        self_stage_blocks = stage_blocks(depth, pre_activation)
        kept = kept_blocks(f"a ResNet of depth {depth}", drop_blocks, 1 + 3 * self_stage_blocks)
        stem: list[nn.Module] = [nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)]
        if not pre_activation:
            stem += [nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
        blocks: list[nn.Module] = [nn.Sequential(*stem)]
        channels, reductions = [widths[0]], [1]
        for index in range(kept - 1):
            stage, is_first = index // self_stage_blocks, index % self_stage_blocks == 0
            stride = 2 if stage > 0 and is_first else 1
            shape = channels[-1], widths[stage + 1], stride
            blocks.append(PreActBlock(*shape) if pre_activation else BasicBlock(*shape, shortcut))
            channels.append(widths[stage + 1])
            reductions.append(reductions[-1] * stride)
        super().__init__(
            blocks,
            channels,
            reductions,
            drop_blocks,
            pre_activation,
            in_chans=in_chans,
            **options,
        )
        self.stage_blocks = self_stage_blocks
        self.shape_args = {} if shortcut == "projection" else {"shortcut": shortcut}


def stage_blocks(depth: int, pre_activation: bool) -> int:
    """Return the residual blocks of each stage."""
    return (depth - (4 if pre_activation else 2)) // 6


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Rename the tensors of other implementations' checkpoints to this module's.

    Known: akamaster's ResNets (`layer1.0.…`, `linear`; padding shortcuts, so create the model with shortcut="padding"),
    torchvision-like ones of chenyaofo and mdistiller (`downsample`, `fc`), and mdistiller's Wide ResNets
    (`block1.layer.0.…`, `convShortcut`, `bn1` at the end).

    Raises:
        InputError: a checkpoint of the other kind of shortcut.
    """
    found = clean_state_dict(state_dict.get("state_dict", state_dict))
    tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    if any(name.startswith("features.") for name in tensors):
        return tensors
    wide = any(name.startswith("block1.") for name in tensors)
    renamed = {_renamed(name, model.stage_blocks, wide): tensor for name, tensor in tensors.items()}
    has_projection = any(".shortcut." in name for name in renamed)
    wants_projection = any(".shortcut." in name for name in model.state_dict())
    if not wide and has_projection != wants_projection:
        kinds = ("projection", "padding")
        stored, wanted = kinds if has_projection else kinds[::-1]
        raise InputError(
            f"the checkpoint has {stored} shortcuts, the model {wanted} ones; create it with shortcut={stored}"
        )
    return renamed


def _renamed(name: str, blocks_per_stage: int, wide: bool) -> str:
    def block(match: re.Match[str]) -> str:
        return f"features.{1 + (int(match[1]) - 1) * blocks_per_stage + int(match[2])}."

    name = re.sub(r"^layer(\d)\.(\d+)\.", block, name)
    name = re.sub(r"^block(\d)\.layer\.(\d+)\.", block, name)
    name = re.sub(r"\.(downsample|convShortcut)\.", ".shortcut.", name)
    name = re.sub(r"^conv1\.", "features.0.0.", name)
    name = re.sub(r"^bn1\.", "norm.0." if wide else "features.0.1.", name)
    return re.sub(r"^(linear|fc)\.", "classifier.1.", name)


def _create(name: str, pretrained: bool, **kwargs: Any) -> Any:
    depth, width, stem, pre_activation = SHAPES[name]
    blocks = stage_blocks(depth, pre_activation)
    kept = kept_blocks(name, kwargs.get("drop_blocks", 0), 1 + 3 * blocks)
    return build_model_with_cfg(
        ResNetCifar,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=stage_features(range(0, kept, blocks), kept),
        depth=depth,
        widths=(stem, 16 * width, 32 * width, 64 * width),
        pre_activation=pre_activation,
        **kwargs,
    )


# Depth, width in 16 channels, channels of the stem, pre-activation.
SHAPES = {
    "resnet20_cifar": (20, 1, 16, False),
    "resnet32_cifar": (32, 1, 16, False),
    "resnet44_cifar": (44, 1, 16, False),
    "resnet56_cifar": (56, 1, 16, False),
    "resnet110_cifar": (110, 1, 16, False),
    "resnet8x4_cifar": (8, 4, 32, False),
    "resnet32x4_cifar": (32, 4, 32, False),
    "wrn_16_1_cifar": (16, 1, 16, True),
    "wrn_16_2_cifar": (16, 2, 16, True),
    "wrn_40_1_cifar": (40, 1, 16, True),
    "wrn_40_2_cifar": (40, 2, 16, True),
}
default_cfgs = cifar_cfgs(list(SHAPES), first_conv="features.0.0", pool_side=8)


def _entrypoint(name: str) -> Callable[..., ResNetCifar]:
    """Return what timm calls for a name; it registers functions under their own name and their module's."""

    def create(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
        return _create(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    return create


for _name in SHAPES:
    globals()[_name] = register_model(_entrypoint(_name))
