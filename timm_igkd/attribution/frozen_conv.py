"""Convolutions whose weights are frozen, on a CPU: activation fused, and only the gradient of the input.

torch sends a 1x1 convolution that one thread computes for fewer than 16 images to im2col and a matrix product, pads
same-padding nets in a pass of its own, and keeps separate passes for the activation. With frozen weights less is
needed: oneDNN applies the activation while it writes the output, the gradient of the input is itself a forward
convolution, with the kernel transposed, and the output's memory takes its gradient.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, get_same_padding
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from timm_igkd.attribution.activations import LeanReLU6
from timm_igkd.attribution.folding import conv_followers

_Activation = tuple[str, list[float]]  # name and limits for oneDNN
_NONE: _Activation = ("none", [])
_ACTIVATIONS: dict[type[nn.Module], _Activation] = {
    LeanReLU6: ("hardtanh", [0.0, 6.0]),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.ReLU: ("relu", []),
}


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
    activation: _Activation = _NONE,
) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, groups, *activation, "")


def _pack(weight: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int) -> Tensor:
    """Return a kernel in oneDNN's own layout, into which it would otherwise be copied at each call."""
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight.contiguous(memory_format=torch.channels_last), padding, stride, dilation, groups
    )


class _Plan:
    """How one convolution is computed for inputs of one height and width.

    Attributes:
        weight, padding: of the forward pass.
        packed: `weight` in oneDNN's layout.
        explicit: padding to add before it, in the order of `F.pad`, or None.
        transposed: kernel and padding of the input's gradient as one convolution, or None.
        phases: kernels of the input's gradient where the stride is larger than 1, each with its first row and column,
            or None.
    """

    def __init__(self, conv: "FrozenConv2d", size: tuple[int, int]):
        self.weight, self.padding, self.explicit = conv.weight, conv.padding, None
        kernel = list(conv.weight.shape[2:])
        if conv.same:
            total = [get_same_padding(*known) for known in zip(size, kernel, conv.stride, conv.dilation, strict=True)]
            before, after = [pad // 2 for pad in total], [pad - pad // 2 for pad in total]
            if conv.depthwise and conv.dilation == [1, 1]:  # a row of zeros before the kernel makes it symmetric
                extra = [last - first for first, last in zip(before, after, strict=True)]
                self.weight = F.pad(conv.weight, (extra[1], 0, extra[0], 0)).contiguous(
                    memory_format=torch.channels_last
                )
                self.padding = after
            else:
                self.padding, self.explicit = [0, 0], [before[1], after[1], before[0], after[0]]
                size = size[0] + total[0], size[1] + total[1]
        self.packed = _pack(self.weight, self.padding, conv.stride, conv.dilation, conv.groups)
        self.transposed = self.phases = None
        if conv.stride == [1, 1]:
            self.transposed = self._transpose(conv)
        elif conv.depthwise and conv.dilation == [1, 1]:
            self.phases = self._split(conv, size)

    def _transpose(self, conv: "FrozenConv2d") -> tuple[Tensor, list[int]] | None:
        outputs, inputs, *kernel = self.weight.shape
        groups = conv.groups
        padding = [d * (k - 1) - p for d, k, p in zip(conv.dilation, kernel, self.padding, strict=True)]
        if min(padding) < 0:
            return None
        weight = self.weight.view(groups, outputs // groups, inputs, *kernel).transpose(1, 2)
        weight = weight.reshape(groups * inputs, outputs // groups, *kernel).flip(2, 3)
        return _pack(weight, padding, [1, 1], conv.dilation, groups), padding

    def _split(self, conv: "FrozenConv2d", size: tuple[int, int]) -> list[tuple[int, int, Tensor]] | None:
        """Return per (row, column) modulo the stride the kernel that gives those pixels' gradient from the output's."""
        kernel, stride = list(self.weight.shape[2:]), conv.stride
        outputs = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, self.padding, kernel, stride, strict=True)]
        if any(-(-n // s) > found for n, s, found in zip(size, stride, outputs, strict=True)):
            return None
        reach = max(max(s - 1 + p, k - 1 - p) // s for p, k, s in zip(self.padding, kernel, stride, strict=True))
        taps = range(-reach, reach + 1)
        phases = []
        for row in range(stride[0]):
            for column in range(stride[1]):
                part = self.weight.new_zeros(len(self.weight), 1, len(taps), len(taps))
                for v, y in enumerate(row + self.padding[0] - stride[0] * tap for tap in taps):
                    for u, x in enumerate(column + self.padding[1] - stride[1] * tap for tap in taps):
                        if 0 <= y < kernel[0] and 0 <= x < kernel[1]:
                            part[:, :, v, u] = self.weight[:, :, y, x]
                phases.append((row, column, _pack(part, [reach, reach], [1, 1], [1, 1], conv.groups)))
        return phases


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: "FrozenConv2d", plan: _Plan) -> Tensor:
        output = conv.compute(x, plan)
        ctx.conv, ctx.plan, ctx.shape = conv, plan, x.shape
        if conv.activation[0] != "none":
            ctx.save_for_backward(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        conv, plan = ctx.conv, ctx.plan
        if conv.activation[0] != "none":  # the output is not needed again, so its memory takes the gradient
            (output,) = ctx.saved_tensors
            if conv.activation[0] == "relu":
                torch.ops.aten.threshold_backward.grad_input(gradient, output, 0.0, grad_input=output)
            else:
                torch.ops.aten.hardtanh_backward.grad_input(gradient, output, *conv.activation[1], grad_input=output)
            gradient = output
        return conv.input_gradient(gradient, ctx.shape, plan), None, None


class FrozenConv2d(nn.Module):
    """A convolution, and the ReLU or ReLU6 after it, for a model whose weights are frozen.

    Args:
        conv: Conv2d or timm's Conv2dSame, float32, on a CPU.
        activation: the layer after it.
    """

    def __init__(self, conv: nn.Conv2d, activation: _Activation):
        super().__init__()
        self.weight: Tensor = conv.weight.detach().contiguous(memory_format=torch.channels_last)
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.stride, self.dilation = list(conv.stride), list(conv.dilation)
        self.padding = [int(side) for side in conv.padding]
        self.groups, self.activation, self.same = conv.groups, activation, isinstance(conv, Conv2dSame)
        self.depthwise = conv.groups == conv.in_channels == conv.out_channels
        self._plans: dict[tuple[int, int], _Plan] = {}

    def plan(self, size: tuple[int, int]) -> _Plan:
        """Return the plan for inputs of `size`."""
        if size not in self._plans:
            self._plans[size] = _Plan(self, size)
        return self._plans[size]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [B, C, H, W] and apply the activation."""
        plan = self.plan((x.shape[2], x.shape[3]))
        if plan.explicit is not None:
            x = F.pad(x, plan.explicit)
        return _Convolution.apply(x, self, plan) if x.requires_grad else self.compute(x, plan)

    def compute(self, x: Tensor, plan: _Plan) -> Tensor:
        """Return the output for an input that is padded where the plan says so."""
        return _convolve(
            x, plan.packed, self.bias, plan.padding, self.stride, self.dilation, self.groups, self.activation
        )

    def input_gradient(self, gradient: Tensor, shape: torch.Size, plan: _Plan) -> Tensor:
        """Return the gradient of an input of `shape` from that of the convolution's output."""
        if plan.transposed is not None:
            weight, padding = plan.transposed
            return _convolve(gradient, weight, None, padding, [1, 1], self.dilation, self.groups)
        if plan.phases is not None:
            found = torch.empty(shape, dtype=gradient.dtype, memory_format=torch.channels_last)
            for row, column, weight in plan.phases:
                pixels = found[:, :, row :: self.stride[0], column :: self.stride[1]]
                reach = [weight.shape[-1] // 2] * 2
                part = _convolve(gradient, weight, None, reach, [1, 1], [1, 1], self.groups)
                pixels.copy_(part[:, :, : pixels.shape[2], : pixels.shape[3]])
            return found
        like = gradient.new_empty(1).expand(shape)  # of an input whose values are not needed
        return torch.ops.aten.convolution_backward(
            gradient, like, plan.weight, None, self.stride, plan.padding, self.dilation, False, [0, 0], self.groups,
            [True, False, False],
        )[0]  # fmt: skip


def _is_usable(module: nn.Module) -> bool:
    return (
        type(module) in (nn.Conv2d, Conv2dSame)
        and module.weight.dtype == torch.float32
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def freeze_convolutions(model: nn.Module, example: Tensor, tolerance: float = 1e-3) -> nn.Module:
    """Return a copy of `model`, on a CPU, whose convolutions keep only what the input's gradient needs.

    Args:
        model: frozen, in eval mode, batch norm folded; not changed.
        example: [1, 3, H, W] input used to find the activations to fuse and to check the result.
        tolerance: largest change of an output allowed, relative to the largest; beyond it `model` is returned, as it is
            where torch has no oneDNN.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return model
    frozen = copy.deepcopy(model)
    activations = dict(conv_followers(frozen, example, tuple(_ACTIVATIONS)))
    for name, module in dict(frozen.named_modules()).items():
        if not _is_usable(module):
            continue
        activation = _NONE
        follower = activations.get(name)
        if follower and type(frozen.get_submodule(follower)) in _ACTIVATIONS:
            activation = _ACTIVATIONS[type(frozen.get_submodule(follower))]
            frozen.set_submodule(follower, nn.Identity())
        frozen.set_submodule(name, FrozenConv2d(module, activation))
    with torch.no_grad():
        expected, found = model(example), frozen(example)
    agrees = torch.allclose(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    return frozen if agrees else model
