"""The gradient of one chunk of (image, step) pairs: eager float32, or in bfloat16, or compiled into CUDA graphs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_igkd.attribution.ig_options import Dtype, Output
from timm_igkd.attribution.options import selected_output
from timm_igkd.eval_mode import exact_arithmetic


@dataclass(frozen=True)
class Arithmetic:
    """How a chunk's gradient is computed.

    Attributes:
        dtype: of weights and activations. Points of the path and sums are float32 always.
        compiled: by torch.compile, on CUDA into CUDA graphs, for a few fixed chunk sizes.
    """

    dtype: Dtype = "float32"
    compiled: bool = False


class ChunkGradient:
    """The gradients of the target outputs of one chunk.

    Args:
        model: frozen, in eval mode, on its device, of the arithmetic's dtype.
        output: what is differentiated.
        arithmetic: how.
    """

    def __init__(self, model: nn.Module, output: Output, arithmetic: Arithmetic):
        self.output, self.arithmetic = output, arithmetic
        self.dtype = torch.bfloat16 if arithmetic.dtype == "bfloat16" else torch.float32
        self.model: Callable[[Tensor], Tensor] = model
        if arithmetic.compiled:
            on_cuda = next(model.parameters()).device.type == "cuda"
            self.model = torch.compile(model, mode="reduce-overhead" if on_cuda else "default", dynamic=False)

    def sizes(self, chunk_size: int) -> tuple[int, ...]:
        """Return the numbers of pairs that compiled code computes at a time, each compiled once, largest first."""
        return tuple(dict.fromkeys(max(1, chunk_size // share) for share in (1, 4, 16)))

    def parts(self, pairs: int, chunk_size: int) -> Iterator[slice]:
        """Cut pairs into chunks.

        Compiled code has a few sizes of its own: each is compiled once, and a CUDA graph has fixed shapes. Cutting
        the rest by its smaller sizes leaves less of the last chunk to padding.
        """
        start = 0
        for size in self.sizes(chunk_size) if self.arithmetic.compiled else (chunk_size,):
            while pairs - start >= size:
                yield slice(start, start + size)
                start += size
        if start < pairs:
            yield slice(start, pairs)

    def padded(self, count: int, chunk_size: int) -> int:
        """Return the size at which `count` pairs are computed."""
        sizes = self.sizes(chunk_size)[::-1] if self.arithmetic.compiled else ()
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
        if missing:  # filled up with copies of a point, whose gradients are dropped below
            points = torch.cat([points, points[:1].expand(missing, -1, -1, -1)])
            targets = torch.cat([targets, targets[:1].expand(missing)])
        # A chunk of one pair is right because it is channels last, as the kernels are: one contiguous image gives LeViT
        # a wrong gradient on the CPU with torch 2.14.
        points = points.to(self.dtype, memory_format=torch.channels_last).requires_grad_()
        if self.arithmetic.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.enable_grad(), exact_arithmetic(points.device):
            # One scalar for the whole chunk: in eval mode an output depends on its own image alone, so the sum's
            # gradient holds each pair's own, in one backward pass.
            output = selected_output(self.model(points).float(), targets, self.output).sum()
            gradient = torch.autograd.grad(output, points)[0][:count]
        if self.arithmetic.compiled:
            gradient = gradient.clone()  # a CUDA graph's next run writes into the same memory
        return gradient.float()
