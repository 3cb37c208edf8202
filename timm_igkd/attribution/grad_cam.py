"""Grad-CAM of any timm classifier: its last feature map (feature_maps.py), each channel weighted by its mean gradient.

Source: Selvaraju et al. 2017 (1610.02391), the ReLU before the map is enlarged as there.
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from timm_igkd.attribution.ig_options import IGOptions, Output
from timm_igkd.attribution.options import selected_output
from timm_igkd.feature_maps import last_norm, through_head, weighted_features
from timm_igkd.random_streams import fixed_noise


class GradCAM:
    """Coarse Grad-CAM maps of a classifier.

    Args:
        model: a frozen timm model in eval mode; `forward_head(forward_features(x))` is its output.
        output: what is differentiated.
        example: [1, C, H, W], an input that the layer is found with.

    Raises:
        InputError: a model without such a layer, or whose last feature map is a single pixel.
    """

    def __init__(self, model: nn.Module, output: Output, example: Tensor):
        self.model: Any = model
        self.output = output
        self._shape = example.shape[2:]
        self._norm = last_norm(self.model, example, self._shape)
        self._taken = threading.local()  # a chunk of each worker of the engine's pool
        if self._norm is not None:
            self._norm.register_forward_hook(self._take)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the signed maps of the targets' outputs for [B, C, H, W] inputs, [B, h, w] at the features' size."""
        with torch.enable_grad():
            features, logits = self._features_and_logits(inputs)
            value = selected_output(logits.float(), targets, self.output).sum()
            (gradient,) = torch.autograd.grad(value, features)
        return weighted_features(self.model, features.detach().float(), gradient.detach().float(), self._shape)[:, 0]

    def _features_and_logits(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        if self._norm is None:
            return through_head(self.model, inputs)
        logits = self.model(inputs)
        return self._taken.features, logits

    def _take(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        self._taken.features = output.detach().requires_grad_()
        return self._taken.features.clone()  # what follows may write into it


def check_method(model: nn.Module, options: IGOptions, input_shape: tuple[int, ...]) -> None:
    """Raise InputError where a teacher in eval mode, fed [C, H, W], has no map by the method that was asked for."""
    if options.method == "grad_cam":
        example = fixed_noise(1, *input_shape)
        own = next(model.parameters(), example)
        last_norm(model, example.to(own.device), input_shape[1:])
