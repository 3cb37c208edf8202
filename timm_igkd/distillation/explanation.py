"""The explanation loss: a student pays where its own map of an image is not the one that its teacher's store holds.

Source: e2KD, Parchami-Araghi et al., ECCV 2024, arXiv 2402.03119, with maps of the teacher that were computed once and
go through the image's own geometry (the authors' "frozen" explanations). Deviations: the label's output is explained,
not the teacher's answer, as the stored maps are the label's; the maps meet at the size of the student's, where the
authors enlarge Grad-CAM to the image; the student's map may be another kind than the teacher's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from timm_igkd.distillation.losses import at_least_float32, resized
from timm_igkd.feature_maps import weighted_features

_EPSILON = 1e-8  # of F.cosine_similarity, which the authors call
_NORMS = (F.batch_norm, F.layer_norm)


def explanation_loss(student_maps: Tensor, teacher_maps: Tensor, target: Tensor | None = None) -> Tensor:
    """1 - the cosine of the student's and the teacher's map, mean over the images that have one of the teacher.

    Nothing is centred, as in the authors' code. An image whose map shows nothing (a constant one, or one that the crop
    left out) does not count, nor does one without a label; 0 where none counts. A student's map of zeros costs 1.

    Args:
        student_maps: (B, 1, H, W) non-negative, any scale.
        teacher_maps: (B, 1, H', W') of the same views, any scale; brought to the student's size by `resized`.
        target: (B,) class indices; below 0 where there is no label. None: all have one.

    Returns:
        A scalar in [0, 1], in float32 at least.
    """
    student = at_least_float32(student_maps).flatten(1)
    teacher = F.normalize(resized(teacher_maps.to(student.dtype), student_maps).flatten(1), dim=1)
    counted = (teacher > 0).any(dim=1)
    if target is not None:
        counted = counted & (target >= 0)
    # under the root, so that its slope is finite for a map of zeros
    cosine = (student * teacher).sum(dim=1) / (student.square().sum(dim=1) + _EPSILON**2).sqrt()
    return (1 - cosine).clamp_min(0).where(counted, 0).sum() / counted.sum().clamp(min=1)


def target_sum(logits: Tensor, target: Tensor) -> Tensor:
    """Return the sum over images of the target's logit, whose gradient holds that of each image."""
    return at_least_float32(logits).gather(1, target.clamp(min=0)[:, None]).sum()


def input_x_gradient(image: Tensor, gradient: Tensor, channels: str) -> Tensor:
    """Return the maps (B, 1, H, W) of images and gradients (B, C, H, W), `channels` joined as JoinedChannels says."""
    product = at_least_float32(image) * at_least_float32(gradient)
    return product.abs().sum(1, keepdim=True) if channels == "abs_sum" else product.sum(1, keepdim=True).relu()


def grad_cam(model: Any, features: Tensor, gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the maps (B, 1, h, w) of a model's last features and their gradient, for inputs of (H, W) `shape`.

    Source: Selvaraju et al. 2017 (1610.02391), with its ReLU, as published and as in the authors' code.
    """
    return weighted_features(model, at_least_float32(features), at_least_float32(gradient), shape).relu()


def differentiable_gradient(value: Tensor, source: Tensor) -> Tensor:
    """Return the gradient of a sum, itself differentiable; in the precision that the forward pass had at each place."""
    with torch.autocast(value.device.type, enabled=False):
        return torch.autograd.grad(value, source, create_graph=True)[0]


class _OtherForms(TorchFunctionMode):
    """Compute what torch cannot differentiate twice by what it can: hard-sigmoid as relu6(x + 3) / 6, norms in float32.

    For a batch or layer norm of float16 torch rounds the inverse deviation to float16 and takes its third power there,
    infinite from 41 on: one dead channel made every gradient NaN, at any scale of a gradient scaler.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        if func in _NORMS and args[0].dtype == torch.float16 and torch.is_autocast_enabled(args[0].device.type):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Let a forward pass be differentiated twice: attention by its mathematical kernel, the rest by _OtherForms.

    Both are undone on exit; only last bits of the result change.
    """
    with _OtherForms(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def captured(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that gets what a module returns meanwhile."""
    taken: list[Tensor] = []

    def take(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
        taken.append(output)
        return output.clone()  # what follows may write into it

    handle = module.register_forward_hook(take)
    try:
        yield taken
    finally:
        handle.remove()
