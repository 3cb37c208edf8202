"""What the networks for 32x32 images share: a sequence of feature blocks, whole or with its tail cut off, and a head.

Each network gives its blocks; timm's contract (`forward_intermediates`, pruning, a new classifier) is here once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import checkpoint, checkpoint_seq, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from timm_igkd.errors import InputError

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class SingleTrunk(nn.Module):
    """A network whose intermediate features come one after the other, as timm asks for them."""

    feature_info: list[dict[str, Any]]
    _intermediates: Callable[..., Any]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the chosen intermediate features, and the final features unless `intermediates_only`.

        Args:
            x: (B, C, H, W) images.
            indices: features to return; the last n if an int, all if None.
            norm: apply the norm behind the last feature to it, where the network has one.
            stop_early: stop at the last chosen feature; needs `intermediates_only`.
            output_fmt: "NCHW".
            intermediates_only: leave the final features out.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        assert intermediates_only or not stop_early, "Must use intermediates_only for early stopping."
        take_indices, _ = feature_take_indices(len(self.feature_info), indices)
        return self._intermediates(x, take_indices, norm, stop_early, intermediates_only)


class CifarNetwork(SingleTrunk):
    """Feature blocks less `drop_blocks`, then norm (where the blocks leave it to the network), pool, dropout, linear.

    `forward_intermediates` has one entry per block.

    Args:
        blocks: the feature blocks that stay, stem first.
        channels: of each block's output.
        reductions: of each block's output, the input's side over its own.
        drop_blocks: feature blocks that were cut from the end.
        has_norm: whether a batch norm and ReLU follow the last block, as behind pre-activation blocks.
        num_classes: outputs of the classifier, 0 for none.
        in_chans: image channels.
        drop_rate: dropout before the classifier.
        global_pool: a pooling of timm's, "" for none.
    """

    shape_args: dict[str, Any]
    """Arguments of `timm.create_model`, beyond the common ones, that give a network of this shape."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        channels: Sequence[int],
        reductions: Sequence[int],
        drop_blocks: int,
        has_norm: bool,
        /,  # what follows is the user's, who is told of any other
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.drop_blocks, self.drop_rate = drop_blocks, drop_rate
        self.num_classes, self.in_chans = num_classes, in_chans
        self.grad_checkpointing, self.shape_args = False, {}
        self.feature_info = [
            {"num_chs": c, "reduction": r, "module": f"features.{i}"}
            for i, (c, r) in enumerate(zip(channels, reductions, strict=True))
        ]
        self.features = nn.Sequential(*blocks)
        self.num_features: int = channels[-1]
        self.norm = _norm(self.num_features) if has_norm else nn.Identity()
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.classifier = nn.Sequential(
            nn.Dropout(drop_rate), nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        )
        for module in self.modules():
            self._init_weights(module)
        self.to(device=device, dtype=dtype)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module: convolutions as He et al. do, fan out, the classifier near 0."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns that group parameters by depth."""
        return {"stem": r"^features\.0\.", "blocks": [(r"^features\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.classifier[1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place; the pooling stays unless given."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        reference = next(self.features.parameters())
        linear: nn.Module = nn.Identity()
        if num_classes > 0:
            linear = nn.Linear(self.head_hidden_size, num_classes, device=reference.device, dtype=reference.dtype)
            self._init_weights(linear)
        self.classifier[1] = linear.train(self.training)

    def _intermediates(self, x: Tensor, indices: list[int], norm: bool, stop_early: bool, only: bool) -> Any:
        last, found = len(self.features) - 1, []
        for i, block in enumerate(self.features[: max(indices) + 1] if stop_early else self.features):
            x = checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)
            if i in indices:
                found.append(self.norm(x) if norm and i == last else x)
        return found if only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut the blocks behind the last chosen one, and the classifier; return the chosen indices.

        A norm behind the last block is made anew for the block that is last then, unless `prune_norm`.
        """
        take_indices, max_index = feature_take_indices(len(self.features), indices)
        prune_end = max_index < len(self.features) - 1
        self.features = self.features[: max_index + 1]
        self.feature_info = self.feature_info[: max_index + 1]
        self.num_features = self.feature_info[-1]["num_chs"]
        if prune_norm:
            self.norm = nn.Identity()
        elif prune_end and not isinstance(self.norm, nn.Identity):
            reference = next(self.features.parameters())
            self.norm = _norm(self.num_features).to(device=reference.device, dtype=reference.dtype)
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the (B, C, H, W) features of the last block, behind its norm."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self.norm(checkpoint_seq(self.features, x))
        return self.norm(self.features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of features, or what the linear layer would see."""
        x = self.classifier[0](self.global_pool(x))
        return x if pre_logits else self.classifier[1](x)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, num_classes) logits of (B, C, H, W) images."""
        return self.forward_head(self.forward_features(x))


def _norm(channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def check_drop(argument: str, drop: Any, highest: int, found: str) -> None:
    """Raise InputError unless `drop` is a whole number from 0 to `highest`.

    Args:
        argument: what the message calls it.
        drop: entries to cut from a model's end.
        highest: that leaves enough of it.
        found: what the model has, in words.
    """
    if isinstance(drop, bool) or not isinstance(drop, int) or not 0 <= drop <= highest:
        raise InputError(f"{argument} must be a whole number from 0 to {highest} ({found}), got {drop!r}")


def kept_blocks(architecture: str, drop_blocks: Any, num_blocks: int) -> int:
    """Return how many feature blocks stay.

    Raises:
        InputError: `drop_blocks` is no number of blocks that leaves the stem and one more.
    """
    check_drop("drop_blocks", drop_blocks, num_blocks - 2, f"{architecture} has {num_blocks} feature blocks")
    return num_blocks - drop_blocks


def stage_features(ends: Sequence[int], kept: int) -> dict[str, Any]:
    """Return timm's `feature_cfg`: the stages' last blocks, of the stage that was cut the last one kept.

    Args:
        ends: index of the last block of each stage of the whole network.
        kept: feature blocks that stay.
    """
    return {"out_indices": (*(end for end in ends if end < kept - 1), kept - 1), "feature_cls": "getter"}


def cifar_cfgs(
    names: Sequence[str],
    first_conv: str,
    pool_side: int,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
) -> dict[str, Any]:
    """Return timm's default configurations for networks of 32x32 images and ten classes.

    Args:
        names: of the architectures.
        first_conv: name of the first convolution.
        pool_side: side of the last features, without `drop_blocks`.
        mean: of the normalised images.
        std: likewise.
    """
    settings = {
        "input_size": (3, 32, 32),
        "pool_size": (pool_side, pool_side),
        "mean": tuple(mean),
        "std": tuple(std),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "num_classes": 10,
        "first_conv": first_conv,
        "classifier": "classifier.1",
        "license": "apache-2.0",
    }
    return generate_default_cfgs({name: dict(settings) for name in names})
