"""A dense 3x3 network for 32x32 images that trains fast, as a timm model: fixed whitening stem, three groups, GELU.

Source: K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498 (airbench94). Deviations: the
stem whitens with a fixed basis instead of the training images' own eigenvectors, batch norm has torch's momentum and a
trained scale, the logits are not scaled.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from timm_igkd.errors import InputError
from timm_igkd.models.cifar_network import CifarNetwork, cifar_cfgs, kept_blocks, stage_features

WIDTHS = (64, 256, 256)

_HAAR = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))
"""Mean, horizontal, vertical and diagonal difference of a 2x2 patch."""
_OPPONENT = ((1, 1, 1), (1, 0, -1), (1, -2, 1))
"""Luminance, red against blue, green against magenta."""
_VARIANCES = (9.97, 0.331, 0.393, 0.055, 0.828, 0.0142, 0.0170, 0.0021, 0.191, 0.0047, 0.0053, 0.0008)
"""Of normalised CIFAR-10 training patches along colour x Haar (10,000 images)."""


def whitening_filters(in_chans: int = 3) -> Tensor:
    """Return filters whose outputs are nearly uncorrelated and of variance 1 on natural images.

    The eigenvectors of 2x2 patches of natural images are, nearly, Haar wavelets times opponent colours: on CIFAR-10 no
    two outputs correlate by more than 0.28. So no training image is needed to make them.

    Args:
        in_chans: image channels; other than 3 are not mixed.

    Returns:
        (4 * in_chans, in_chans, 2, 2) float32.
    """
    colours = torch.tensor(_OPPONENT, dtype=torch.float32) if in_chans == 3 else torch.eye(in_chans)
    colours = colours / colours.norm(dim=1, keepdim=True)
    filters = torch.einsum("ac,hp->ahcp", colours, torch.tensor(_HAAR) / 2).reshape(-1, in_chans, 2, 2)
    variances = torch.tensor(_VARIANCES if in_chans == 3 else _VARIANCES[:4] * in_chans)
    return filters / (variances + 5e-4).sqrt().view(-1, 1, 1, 1)


class _Stem(nn.Sequential):
    """Whitened 2x2 patches and their negatives, which only a bias is trained of; the side shrinks by one.

    The filters are a parameter that takes no gradient, so that they count and are saved as those of any convolution.
    """

    def __init__(self, in_chans: int) -> None:
        filters = whitening_filters(in_chans)
        conv = nn.Conv2d(in_chans, 2 * len(filters), kernel_size=2)
        conv.weight = nn.Parameter(torch.cat([filters, -filters]), requires_grad=False)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        super().__init__(conv, nn.GELU())


def _pooled_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Return the first half of a group; max-pooling before norm and GELU spares these three quarters of their work."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.GELU())


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.GELU())


def _create_blocks(widths: Sequence[int], kept: int, in_chans: int) -> tuple[list[nn.Module], list[int], list[int]]:
    """Return the first `kept` feature blocks, and the channels and reduction of each."""
    blocks: list[nn.Module] = [_Stem(in_chans)]
    channels, reductions = [8 * in_chans], [1]
    for index in range(kept - 1):
        width, create = widths[index // 2], _conv if index % 2 else _pooled_conv
        blocks.append(create(channels[-1], width))
        channels.append(width)
        reductions.append(2 ** (index // 2 + 1))
    return blocks, channels, reductions


def _check_widths(widths: Any) -> tuple[int, ...]:
    good = isinstance(widths, list | tuple) and len(widths) > 0
    if not good or not all(isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in widths):
        raise InputError(f"widths must be the channels of each group such as (64, 256, 256), got {widths!r}")
    return tuple(widths)


class ConvNetCifar(CifarNetwork):
    """Stem and groups of two 3x3 convolutions: seven feature blocks less `drop_blocks`, global max-pool, linear.

    Args:
        widths: channels of each group.
        drop_blocks: feature blocks cut from the end, 0 to 2 * groups - 1.
        in_chans: image channels.
        global_pool: a pooling of timm's, "" for none.
        options: of `CifarNetwork`.

    Raises:
        InputError: `drop_blocks` or `widths` out of range.
    """

    def __init__(
        self,
        widths: Sequence[int] = WIDTHS,
        drop_blocks: int = 0,
        *,
        in_chans: int = 3,
        global_pool: str = "max",
        **options: Any,
    ) -> None:
        self_widths = _check_widths(widths)
        blocks = _create_blocks(
            self_widths, kept_blocks("convnet_cifar", drop_blocks, 1 + 2 * len(self_widths)), in_chans
        )
        super().__init__(*blocks, drop_blocks, False, in_chans=in_chans, global_pool=global_pool, **options)
        self.shape_args = {"widths": self_widths}

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as torch does, but the first outputs of a 3x3 convolution copy its inputs (airbench's dirac)."""
        if isinstance(module, nn.Linear):
            super()._init_weights(module)
        elif isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            nn.init.dirac_(module.weight[: module.in_channels])


def checkpoint_filter_fn(state_dict: dict[str, Any], model: ConvNetCifar) -> dict[str, Any]:
    """Return a checkpoint as it is.

    Raises:
        InputError: it is of another number of channels, which timm cannot adapt: the stem's width depends on them.
    """
    stem = state_dict.get("features.0.0.weight")
    if stem is not None and stem.shape[1] != model.in_chans:
        raise InputError(
            f"weights of convnet_cifar for {stem.shape[1]} channels do not fit one of in_chans={model.in_chans}, whose "
            "stem has eight filters a channel; give images of as many channels, or train it from random weights"
        )
    return state_dict


default_cfgs = cifar_cfgs(["convnet_cifar"], first_conv="features.0.0", pool_side=3)


@register_model
def convnet_cifar(pretrained: bool = False, **kwargs: Any) -> ConvNetCifar:
    """Dense network for 32x32 images after airbench94; `widths` and `drop_blocks` make it smaller."""
    widths = _check_widths(kwargs.get("widths", WIDTHS))
    kept = kept_blocks("convnet_cifar", kwargs.get("drop_blocks", 0), 1 + 2 * len(widths))
    return build_model_with_cfg(
        ConvNetCifar,
        "convnet_cifar",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=stage_features(range(0, kept, 2), kept),
        **kwargs,
    )
