"""The last feature map of any timm classifier, which Grad-CAM weights: a teacher's for maps, a student's for its loss.

captum's LayerGradCam averages over all axes but the first two. That is right for [B, C, H, W]; of a Swin's [B, H, W, C]
it averages over the width and the channels, of a ViT's [B, tokens, C] over the channels. Here features become
[B, C, h, w] first, without class and register tokens.

A classifier that reads the class token alone has no gradient at the patches after its last block: what they hold there
goes nowhere. Their last use is as keys and values of that block's attention, so the output of its `norm1` is taken.
"""

from typing import Any

import torch
from torch import Tensor, nn

from timm_igkd.errors import InputError

REMEDY = "take another method than grad_cam, such as input_x_gradient"


def through_head(model: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a model's last features, a leaf, and its outputs; only the head is differentiated."""
    with torch.no_grad():
        features = model.forward_features(inputs)
    if not isinstance(features, Tensor):
        raise InputError(
            f"grad_cam needs one last feature map, {type(model).__name__} has {len(features)} branches; {REMEDY}"
        )
    features = features.detach().requires_grad_()
    with torch.enable_grad():
        return features, model.forward_head(features.clone())


@torch.enable_grad()
def last_norm(model: Any, example: Tensor, shape: tuple[int, ...]) -> nn.Module | None:
    """Return the module whose output is weighted: of a class-token model its last `norm1`; None: its last features.

    Args:
        model: a timm model in eval mode.
        example: [1, C, H, W], an input that the layer is found with.
        shape: (H, W) of the input.

    Raises:
        InputError: a model without such a layer, whose last feature map is a single pixel, or whose forward is more
            than its features and head.
    """
    name = type(model).__name__
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise InputError(f"grad_cam needs timm's forward_features and forward_head, {name} has none; {REMEDY}")
    features, logits = through_head(model, example)
    pixels = as_map(model, features.detach(), shape)
    if pixels.shape[2:].numel() == 1:
        larger = "give it larger images, or " if features.ndim == 4 else ""  # one token is the class token alone
        raise InputError(
            f"grad_cam of {name} at {shape[1]}x{shape[0]} pixels is a map of a single pixel, expected at least 2; "
            f"{larger}{REMEDY}"
        )
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), features)
    if features.ndim != 3:
        reads_token = False
    elif gradient.any():
        reads_token = not as_map(model, gradient, shape).any()
    else:  # of a head that starts from zeros
        reads_token = getattr(model, "global_pool", "") == "token"
    if not reads_token:
        if not is_forward(model, example, logits):
            raise InputError(
                f"forward_features and forward_head of {name} must lead to the logits of its forward, got others; "
                f"{REMEDY}"
            )
        return None
    norm = getattr((getattr(model, "blocks", None) or [None])[-1], "norm1", None)
    if norm is None:
        raise InputError(
            f"grad_cam finds no layer in {name}: it reads a class token, but has no blocks[-1].norm1; {REMEDY}"
        )
    return norm


@torch.no_grad()
def is_forward(model: Any, example: Tensor, logits: Tensor) -> bool:
    """Return whether the logits that a model's parts lead to are those of its forward; else they are another model."""
    own = model(example)
    is_like = isinstance(own, Tensor) and (own.shape, own.dtype) == (logits.shape, logits.dtype)
    return is_like and torch.allclose(logits, own, rtol=1e-3, atol=1e-4)


def as_map(model: Any, features: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return features [B, C, h, w], [B, h, w, C] or [B, tokens, C] as [B, C, h, w].

    Args:
        model: whose features they are.
        features: of any of the three layouts.
        shape: (H, W) of its input.

    Raises:
        InputError: another layout, or tokens that fill no grid.
    """
    if features.ndim == 4:
        channels, last = features.shape[1], features.shape[3]
        is_last = last == model.num_features and (channels != last or getattr(model, "output_fmt", "") == "NHWC")
        return features.permute(0, 3, 1, 2) if is_last else features
    if features.ndim == 3:
        height, width = _grid(model, features.shape[1], shape)
        patches = features[:, features.shape[1] - height * width :]  # class and register tokens come first
        return patches.transpose(1, 2).unflatten(2, (height, width))
    raise InputError(
        f"grad_cam needs features as a map or as tokens, {type(model).__name__} gives {list(features.shape)}; {REMEDY}"
    )


def weighted_features(model: Any, features: Tensor, gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the sum of features' channels, each weighted by its mean gradient, (B, 1, h, w): Grad-CAM before its ReLU.

    Args:
        model: whose features they are.
        features: of any layout that `as_map` takes.
        gradient: of the same layout.
        shape: (H, W) of the input.
    """
    features, gradient = (as_map(model, each, shape) for each in (features, gradient))
    return (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True)


def _grid(model: Any, tokens: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of the patches among some tokens."""
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    for patches in (tokens - prefix, tokens):  # class attention's tokens join after the blocks
        height = round((patches * shape[0] / shape[1]) ** 0.5) if patches > 0 else 0
        if height and patches % height == 0 and round(patches / height * shape[0] / shape[1]) == height:
            return height, patches // height
    raise InputError(
        f"grad_cam cannot lay the {tokens} tokens of {type(model).__name__} "
        f"out as a grid of {shape[1]}x{shape[0]}; {REMEDY}"
    )
