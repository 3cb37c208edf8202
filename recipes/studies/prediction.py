"""Images that a study evaluates on, and what a model answers to them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_igkd.eval_mode import eval_mode
from timm_igkd.models.arguments import model_data_config
from timm_igkd.overlay.device_images import DeviceImages


@dataclass(frozen=True)
class Evaluated:
    """Images to evaluate on, and what the teacher makes of them.

    Attributes:
        images: [N, 3, H, W] uint8 and labels, on the device.
        teacher_logits: [N, classes] float32, or None without a teacher.
    """

    images: DeviceImages
    teacher_logits: Tensor | None


def normalized(model: nn.Module, images: Tensor) -> Tensor:
    """Return uint8 images [N, 3, H, W] as a model expects them, float32."""
    config = model_data_config(model)
    mean, std = (torch.tensor(config[name], device=images.device).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (images.float() / 255 - mean) / std


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return a model's logits for uint8 images [N, 3, H, W] on its device, [N, classes] float32, in eval mode."""
    batch = 1000 if images.device.type == "cuda" else 100
    with eval_mode(model):
        return torch.cat([model(normalized(model, part)).float() for part in images.split(batch)])
