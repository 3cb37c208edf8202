"""The gradient of one chunk of (image, step) pairs: eager float32, or in bfloat16, or compiled into CUDA graphs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from timm_igkd.attribution import Output, selected_output


@dataclass(frozen=True)
class Kernel:
    """How a chunk's gradient is computed; kernel_choice.py chooses it on a CUDA device.

    Attributes:
        dtype: of weights and activations. Points of the path and sums are float32 always.
        compiled: by torch.compile, on CUDA into CUDA graphs, for a few fixed chunk sizes.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    compiled: bool = False


class ChunkGradient:
    """The gradients of the target outputs of one chunk.

    Args:
        model: frozen, in eval mode, on its device, of the kernel's dtype.
        output: what is differentiated.
        kernel: how.
    """

    def __init__(self, model: nn.Module, output: Output, kernel: Kernel):
        self.output, self.kernel = output, kernel
        self.dtype = torch.bfloat16 if kernel.dtype == "bfloat16" else torch.float32
        self.model: Callable[[Tensor], Tensor] = model
        if kernel.compiled:
            on_cuda = next(model.parameters()).device.type == "cuda"
            self.model = torch.compile(model, mode="reduce-overhead" if on_cuda else "default", dynamic=False)

    def padded(self, count: int, chunk_size: int) -> int:
        """Return the size at which `count` pairs are computed: a compiled kernel has three, each compiled once."""
        sizes = (chunk_size // 16, chunk_size // 4, chunk_size) if self.kernel.compiled else ()
        return next((size for size in sizes if size >= count), count)

    def __call__(self, points: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
        """Return the gradients at the points, [P, 3, H, W] float32.

        Args:
            points: [P, 3, H, W] float32.
            targets: [P] int64, the output to differentiate at each.
            chunk_size: of a full chunk.
        """
        count = len(points)
        missing = self.padded(count, chunk_size) - count
        if missing:
            points = torch.cat([points, points[:1].expand(missing, -1, -1, -1)])
            targets = torch.cat([targets, targets[:1].expand(missing)])
        points = points.to(self.dtype, memory_format=torch.channels_last).requires_grad_()
        if self.kernel.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        output = selected_output(self.model(points).float(), targets, self.output).sum()
        gradient = torch.autograd.grad(output, points)[0][:count]
        if self.kernel.compiled:
            gradient = gradient.clone()  # a CUDA graph's next run writes into the same memory
        return gradient.float()
