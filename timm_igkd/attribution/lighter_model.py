"""The same function with less work: batch norm folded into the convolution before it, ReLU and ReLU6 without copies.

torch.fx cannot trace timm's same-padding nets, so the pairs are found by running the model once and watching which
batch norm receives which convolution's output. What a model does between its layers is not seen that way: it may use an
output twice, change it in place, or read a layer's weight. So a lighter copy is kept only where its outputs and its
gradient agree with the original's.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from timm_igkd.errors import RunError
from timm_igkd.eval_mode import copy_model, exact_arithmetic


def conv_followers(model: nn.Module, example: Tensor, kinds: tuple[type[nn.Module], ...]) -> list[tuple[str, str]]:
    """Return (convolution, module of `kinds`) names where one feeds the other directly, each called once."""
    producer: dict[int, tuple[str, int]] = {}
    calls: dict[str, int] = {}
    pairs: list[tuple[str, str]] = []
    kept: list[Tensor] = []  # holds outputs alive, so that an id is never reused

    def watch_conv(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if not isinstance(output, Tensor):
                return
            kept.append(output)
            # A tensor's identity does not tell what happened to it between two layers: a ResNet adds its shortcut to
            # the output in place. Its version does.
            producer[id(output)] = name, output._version

        return hook

    def watch_follower(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            calls[name] = calls.get(name, 0) + 1
            conv, version = producer.get(id(args[0]), ("", 0)) if args else ("", 0)
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
def fold_batch_norm(model: nn.Module, example: Tensor) -> int:
    """Fold a model's batch norms in place, and return how many; whether the model allows it is checked afterwards.

    Args:
        model: in eval mode.
        example: [1, C, H, W] input used to find the pairs.
    """
    count = 0
    modules = dict(model.named_modules())
    for conv_name, norm_name in conv_followers(model, example, (nn.BatchNorm2d,)):
        conv, norm = modules[conv_name], modules[norm_name]
        if norm.running_mean is None:  # it normalises by its own batch, in eval mode too: not a fixed scale
            continue
        if conv._forward_pre_hooks or not isinstance(conv.weight, nn.Parameter):  # a weight made anew in each pass
            continue
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        _replace(model, norm, _after_norm(norm))
        count += 1
    return count


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model holds `old`: a layer may have several names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children gives one name of each
            if child is old:
                setattr(parent, name, new)


class _ClampInPlace(torch.autograd.Function):
    """ReLU, or ReLU6 with a `high` of 6, in place forward and backward: a pass writes no memory but what it reads.

    The gradient passes where the output is strictly between, as PyTorch's does. It overwrites the output: whoever read
    that has gone backward before, as the gradient of an output comes from all its readers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, high: float | None) -> Tensor:
        ctx.mark_dirty(x)
        x.clamp_(0, high)
        ctx.save_for_backward(x)
        ctx.high = high
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (output,) = ctx.saved_tensors
        found = output.detach()
        if ctx.high is None:
            torch.ops.aten.threshold_backward.grad_input(gradient, found, 0.0, grad_input=found)
        else:
            torch.ops.aten.hardtanh_backward.grad_input(gradient, found, 0.0, ctx.high, grad_input=found)
        return found, None


class LeanReLU(nn.Module):
    """In-place ReLU or ReLU6 that keeps no copy of its input and makes no memory for its gradient.

    For a model whose weights are frozen: the layer before it does not need its output again.

    Args:
        high: upper limit; None: none.
    """

    def __init__(self, high: float | None):
        super().__init__()
        self.high = high

    def forward(self, x: Tensor) -> Tensor:
        """Clamp `x`, which is overwritten where autograd watches it."""
        in_place = x.requires_grad and not x.is_leaf
        return _ClampInPlace.apply(x, self.high) if in_place else x.clamp(0, self.high)


def use_lean_relu(model: nn.Module) -> int:
    """Replace a model's in-place ReLU and ReLU6 layers, and return how many."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.ReLU | nn.ReLU6) and layer.inplace]
    for layer in layers:
        _replace(model, layer, LeanReLU(6.0 if isinstance(layer, nn.ReLU6) else None))
    return len(layers)


_TOLERANCE = 1e-3
"""Largest change of an output allowed, relative to the largest output; the gradient may change a hundred times as much
in norm, as rounding can flip a ReLU's gate."""


def lighter_model(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a frozen copy in eval mode with as much less work as the model allows.

    Args:
        model: in eval mode; not changed.
        example: [1, C, H, W] input to find and check what can be left out.
    """
    # twice: one contiguous image gives LeViT a wrong gradient on the CPU with torch 2.14
    pair = example.repeat(2, 1, 1, 1)
    outputs, gradient = outputs_and_gradient(model, pair)
    if not torch.isfinite(outputs).all():
        raise RunError("the teacher's outputs are not finite; check its weights and normalisation")
    for fold, lean in ((True, True), (True, False), (False, True)):
        lighter = copy_model(model).requires_grad_(False)
        if (fold and not fold_batch_norm(lighter, example)) or (lean and not use_lean_relu(lighter)):
            continue  # then this is the same as a later one
        try:
            found, found_gradient = outputs_and_gradient(lighter, pair)
        except (RuntimeError, AttributeError, TypeError, ValueError, AssertionError):
            continue  # a layer's output is changed in place, or its attributes are read, which its stand-in lacks
        same = torch.allclose(found, outputs, rtol=0, atol=_TOLERANCE * float(outputs.abs().max()))
        if same and (found_gradient - gradient).norm() <= 100 * _TOLERANCE * gradient.norm():
            return lighter
    return copy_model(model).requires_grad_(False)


@torch.enable_grad()
def outputs_and_gradient(model: nn.Module, example: Tensor) -> tuple[Tensor, Tensor]:
    """Return a model's outputs [B, N] for inputs, and the inputs' gradient of a sum that weighs them differently."""
    example = example.detach().clone().requires_grad_()
    with exact_arithmetic(example.device):
        outputs = model(example)
    weights = torch.linspace(1, 2, outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
    return outputs.detach(), torch.autograd.grad((outputs * weights).sum(), example)[0]
