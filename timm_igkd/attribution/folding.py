"""Batch norm folded into the convolutions before it, for any timm model, without tracing its code.

torch.fx cannot trace timm's same-padding nets, so the pairs are found by running the model once and watching which
batch norm receives which convolution's output. The folded copy is kept only if its outputs agree with the original's.
"""

import copy
from collections.abc import Callable

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from timm_igkd.errors import RunError


def conv_followers(model: nn.Module, example: Tensor, kinds: tuple[type[nn.Module], ...]) -> list[tuple[str, str]]:
    """Return (convolution, module of `kinds`) names where one feeds the other directly, each called once."""
    producer: dict[int, tuple[str, int]] = {}
    calls: dict[str, int] = {}
    pairs: list[tuple[str, str]] = []
    kept: list[Tensor] = []  # holds outputs alive, so that an id is never reused

    def watch_conv(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            kept.append(output)
            # A tensor's identity does not tell what happened to it between two layers: a ResNet adds its shortcut to
            # the output in place. Its version does.
            producer[id(output)] = name, output._version

        return hook

    def watch_follower(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            calls[name] = calls.get(name, 0) + 1
            conv, version = producer.get(id(args[0]), ("", 0))
            if conv and args[0]._version == version:
                pairs.append((conv, name))

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(watch_conv(name)))
        elif isinstance(module, kinds):
            handles.append(module.register_forward_pre_hook(watch_follower(name)))
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    # A layer that is called again, elsewhere, would need its old self there.
    return [(conv, follower) for conv, follower in pairs if calls[conv] == calls[follower] == 1]


def _after_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """Return what is left of a batch norm without its scale and shift: timm's drop and activation, or nothing."""
    if isinstance(norm, BatchNormAct2d):
        parts = [part for part in (norm.drop, norm.act) if not isinstance(part, nn.Identity)]
        return nn.Sequential(*parts) if len(parts) > 1 else (parts[0] if parts else nn.Identity())
    return nn.Identity()


@torch.no_grad()
def fold_batch_norm(model: nn.Module, example: Tensor, tolerance: float = 1e-3) -> tuple[nn.Module, int]:
    """Return a copy of `model` in eval mode with batch norms folded, and how many were.

    Args:
        model: in eval mode; not changed.
        example: [1, 3, H, W] input used to find the pairs and to check the result.
        tolerance: largest change of an output allowed, relative to the largest output. Beyond it (an output used twice,
            for example) an unfolded copy is returned, with 0.
    """
    folded = copy.deepcopy(model)
    pairs = conv_followers(folded, example, (nn.BatchNorm2d,))
    modules = dict(folded.named_modules())
    for conv_name, norm_name in pairs:
        conv, norm = modules[conv_name], modules[norm_name]
        if norm.running_mean is None:  # it normalises by its own batch, in eval mode too: not a fixed scale
            continue
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        parent, _, child = norm_name.rpartition(".")
        setattr(folded.get_submodule(parent), child, _after_norm(norm))
    # Watching modules cannot see a function of the same output, such as a shortcut around the batch norm: check.
    expected, found = model(example), folded(example)
    if not torch.isfinite(expected).all():
        raise RunError("the teacher's outputs are not finite; check its weights and normalisation")
    if not torch.allclose(found, expected, rtol=0, atol=tolerance * float(expected.abs().max())):
        return copy.deepcopy(model), 0
    return folded, len(pairs)
