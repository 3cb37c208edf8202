"""How many (image, step) pairs the engine computes at a time, and how many images share them."""

import math

import torch
from torch import Tensor, nn

_CPU_ACTIVATIONS = 600e6  # bytes of one chunk's activations; beyond it the caches no longer help (CHANGELOG)
_CPU_SMALLEST, _CPU_LARGEST = 8, 128
# torch computes a 1x1 convolution of fewer images on one thread by im2col and a matrix product instead of oneDNN
# (use_mkldnn in aten/src/ATen/native/Convolution.cpp); benchmarks/results/frozen_convolutions_epyc.json has the cost.
_CPU_SMALLEST_POINTWISE = 16
_CUDA_SHARE = 0.25  # of the device's memory
_PATH_BYTES = 384e6  # gradients kept for the images of one batch on a CPU
_CUDA_PATH_SHARE = 0.05  # the same, of the device's memory
_TYPICAL_NODES = 24


@torch.no_grad()
def activation_bytes(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Return the bytes of all layers' outputs for one image of `input_shape`."""
    total = 0

    def count(module: nn.Module, args: tuple, output: object) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.numel() * output.element_size()

    handles = [module.register_forward_hook(count) for module in model.modules() if not list(module.children())]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        model(torch.zeros(1, *input_shape, dtype=torch.float32, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return max(1, total)


def _has_pointwise(model: nn.Module) -> bool:
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return any(conv.kernel_size == (1, 1) and conv.stride == (1, 1) for conv in convolutions)


def _power_of_two(value: float) -> int:
    return 1 << max(0, int(value).bit_length() - 1)


def activation_chunk(
    model: nn.Module, input_shape: tuple[int, ...], device: torch.device, has_paths: bool = True
) -> int:
    """Return a chunk size, a power of two, from the measured size of the model's activations and its kinds of layers.

    It is not a timing, so that two builds of one store on the CPU use the same chunks and give the same bytes. Images
    that have one pair each (`has_paths` false) fill few chunks, of which every CPU thread is to get one.
    """
    per_image = activation_bytes(model, input_shape)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return min(4096, _power_of_two(_CUDA_SHARE * memory / per_image))
    smallest = _CPU_SMALLEST_POINTWISE if _has_pointwise(model) else _CPU_SMALLEST
    largest = _CPU_LARGEST if has_paths else _CPU_SMALLEST_POINTWISE
    return min(largest, max(smallest, _power_of_two(_CPU_ACTIVATIONS / per_image)))


def images_per_batch(input_shape: tuple[int, ...], device: torch.device) -> int:
    """Return how many images are attributed together: many for full chunks, few enough to keep their gradients."""
    kept = 4 * math.prod(input_shape) * _TYPICAL_NODES
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return min(1024, max(4, _power_of_two(_CUDA_PATH_SHARE * memory / kept)))
    return min(64, max(4, _power_of_two(_PATH_BYTES / kept)))
