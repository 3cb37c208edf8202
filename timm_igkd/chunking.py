"""How many (image, step) pairs the engine computes at a time."""

import torch
from torch import Tensor, nn

_CPU_CACHE_BYTES = 24e6  # activations of one chunk; small enough to stay near the caches (measured: CHANGELOG)
_CUDA_BYTES = 6e9


@torch.no_grad()
def activation_bytes(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Return the bytes of all layers' outputs for one image of `input_shape`."""
    total = 0

    def count(module: nn.Module, args: tuple, output: object) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.numel() * output.element_size()

    handles = [module.register_forward_hook(count) for module in model.modules() if not list(module.children())]
    device = next(model.parameters()).device
    try:
        model(torch.zeros(1, *input_shape, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return total


def activation_chunk(model: nn.Module, input_shape: tuple[int, ...], device: torch.device) -> int:
    """Return a chunk size, a power of two, from the size of the model's activations.

    It is a rule and not a timing on the CPU, so that two builds of one store use the same chunks and give the same bytes.
    """
    budget = _CUDA_BYTES if device.type == "cuda" else _CPU_CACHE_BYTES
    chunk = max(1, int(budget / max(1, activation_bytes(model, input_shape))))
    return min(1 << (chunk.bit_length() - 1), 4096)
