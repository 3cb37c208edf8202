"""ReLU6 without the copy that PyTorch's in-place version keeps for its backward pass."""

from typing import Any

import torch
from torch import Tensor, nn


class _ClampInPlace(torch.autograd.Function):
    """min(max(x, 0), 6) in place; the gradient passes where the output is strictly between, as PyTorch's does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.clamp_(0, 6)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, output, 0.0, 6.0)


class LeanReLU6(nn.Module):
    """ReLU6 for a model whose weights are frozen: the layer before it does not need its output again."""

    def forward(self, x: Tensor) -> Tensor:
        """Clamp `x`, which is overwritten where autograd watches it."""
        return _ClampInPlace.apply(x) if x.requires_grad and not x.is_leaf else x.clamp(0, 6)


def use_lean_relu6(model: nn.Module) -> nn.Module:
    """Replace in-place ReLU6 layers of `model`, and return it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU6) and module.inplace:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LeanReLU6())
    return model
