"""Integrated gradients of a teacher: its view of an image, and the reference engine.

`engine="captum"` is the reference; `engine="fast"` (engine.py) computes the same sums with less work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import str_to_pil_interp
from timm.models import get_model_input_config
from torch import Tensor, nn

from timm_igkd.attribution.ig_options import Baseline, IGOptions, Output, Reduction
from timm_igkd.errors import InputError
from timm_igkd.eval_mode import exact_arithmetic


@dataclass
class Attribution:
    """What an engine returns for B images.

    Attributes:
        values: [B, C, H, W] float32, attribution of each normalised input value; of Grad-CAM [B, 1, H, W]; zeros
            [B, 1, 1, 1] of method "none".
        convergence_delta: [B] float32, sum(values) - (f(x) - f(baseline)), captum's definition; 0 where the method
            promises no sum.
        n_steps: [B] int64, gradients spent on each image.
        converged: [B] bool; always true with a fixed number of steps.
        logits: [B, classes] float32, the teacher's output for the image itself.
    """

    values: Tensor
    convergence_delta: Tensor
    n_steps: Tensor
    converged: Tensor
    logits: Tensor


class TeacherView:
    """How the teacher sees a whole image: resized (not cropped) to its input size, in [0, 1], normalised.

    Args:
        model: a timm model; size, channels, interpolation, mean and std come from its `pretrained_cfg`. One of 1
            channel sees grey (Pillow's "L", as in timm), with the mean of a mean and std for colours.

    Raises:
        InputError: an interpolation that timm does not know.
    """

    def __init__(self, model: Any):
        config = model.pretrained_cfg
        self.shape: tuple[int, int, int] = tuple(get_model_input_config(model)["input_size"])
        self.size, channels = self.shape[1:], self.shape[0]
        self.statistics = {name: _by_channel(config[name], channels) for name in ("mean", "std")}
        self.mean, self.std = (
            torch.tensor(self.statistics[name], dtype=torch.float32).view(-1, 1, 1) for name in ("mean", "std")
        )
        self.interpolation_name = str(config.get("interpolation") or "bicubic")  # timm's default
        try:
            self.interpolation: Image.Resampling = str_to_pil_interp(self.interpolation_name)
        except KeyError as error:
            raise InputError(
                f"the teacher's pretrained_cfg has interpolation {self.interpolation_name!r}, expected one that timm "
                "knows, such as bicubic; correct it"
            ) from error

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the normalised input, [C, H, W] float32."""
        if self.shape[0] == 1:
            image = image.convert("L")
        if image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], self.interpolation)
        pixels = torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)
        return (pixels.float().div_(255) - self.mean) / self.std

    def baseline(self, inputs: Tensor, kind: Baseline, seeds: list[int]) -> Tensor:
        """Return the paths' starting points for inputs [B, C, H, W]: [B, C, H, W], or [1, C, H, W] where all share one.

        Args:
            seeds: one per image, used by "noise" alone.
        """
        mean, std = self.mean.to(inputs), self.std.to(inputs)
        if kind == "mean":
            return torch.zeros_like(inputs[:1])
        if kind == "black":
            return (torch.zeros_like(inputs[:1]) - mean) / std
        if kind == "blur":
            return gaussian_blur(inputs, sigma=max(self.size) / 16)
        noise = [
            torch.rand(inputs.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
            for seed in seeds
        ]
        return (torch.stack(noise).to(inputs) - mean) / std


def _by_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return one value per channel: the mean of all for another number of them, as timm takes it."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur [B, C, H, W] with a Gaussian of `sigma` pixels, edges replicated."""
    radius = max(1, int(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1).expand(images.shape[1], 1, -1, 1)
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    vertical = F.conv2d(padded, kernel, groups=images.shape[1])
    return F.conv2d(vertical, kernel.transpose(2, 3), groups=images.shape[1])


def selected_output(logits: Tensor, targets: Tensor, output: Output) -> Tensor:
    """Return the integrated function's value per row: the target's logit or probability, [B]."""
    values = logits.softmax(-1) if output == "probability" else logits
    return values.gather(1, targets[:, None]).squeeze(1)


def reduce_channels(values: Tensor, reduction: Reduction) -> Tensor:
    """Reduce attributions [B, C, H, W] to maps [B, H, W]; see IGOptions.reduction."""
    if reduction == "abs_sum":
        return values.abs().sum(1)
    summed = values.sum(1)
    return summed.clamp_min(0) if reduction == "positive" else summed


class CaptumEngine:
    """captum's IntegratedGradients, the reference.

    Args:
        model: the teacher, in eval mode.
        options: which gradients; `n_steps="auto"` and other methods need the fast engine.
        chunk_size: captum's `internal_batch_size`; None evaluates all steps of all images at once, captum's default.
    """

    def __init__(self, model: nn.Module, options: IGOptions, chunk_size: int | None = None):
        if options.n_steps == "auto":
            raise InputError("n_steps 'auto' needs engine 'fast'; captum takes a whole number")
        from captum.attr import IntegratedGradients  # here, as it brings matplotlib: 26 MiB for who trains alone

        self.model, self.options, self.chunk_size = model, options, chunk_size
        self.integrated_gradients = IntegratedGradients(self._output)

    def _output(self, inputs: Tensor) -> Tensor:
        is_alone = len(inputs) == 1 and inputs.requires_grad
        # twice: one contiguous image gives LeViT a wrong gradient on the CPU with torch 2.14
        logits = self.model(inputs.repeat(2, 1, 1, 1))[:1] if is_alone else self.model(inputs)
        return logits.softmax(-1) if self.options.output == "probability" else logits

    def attribute(self, inputs: Tensor, baselines: Tensor, targets: Tensor, logits: Tensor) -> Attribution:
        """Attribute the target outputs of inputs [B, C, H, W] along the paths from `baselines`."""
        batch = inputs.shape[0]
        internal = None if self.chunk_size is None else max(self.chunk_size, batch)
        with exact_arithmetic(inputs.device):
            values, delta = self.integrated_gradients.attribute(
                inputs,
                baselines=baselines.expand_as(inputs),
                target=targets,
                n_steps=self.options.n_steps,
                internal_batch_size=internal,
                return_convergence_delta=True,
            )
        steps = torch.full((batch,), int(self.options.n_steps))
        return Attribution(values.detach(), delta.detach(), steps, torch.ones(batch, dtype=torch.bool), logits)
