"""Loss and accuracy on the images that the epochs are watched by."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.data
from accelerate import Accelerator
from torch import nn

from timm_igkd.eval_mode import eval_mode


def create_validation_loader(
    dataset: Any, transform: Callable, batch_size: int, workers: int, accelerator: Accelerator
) -> Any:
    """Return a prepared loader of (input, label), or None without images.

    Args:
        dataset: LabeledImages, or None; its transform is set.
        transform: the model's evaluation transform.
        batch_size: of training; there are at least 64 images in a batch here, which needs no gradients.
        workers: of the loader.
        accelerator: shares the images among its processes.
    """
    if dataset is None or len(dataset) == 0:
        return None
    dataset.transform = transform
    loader = torch.utils.data.DataLoader(dataset, batch_size=max(64, batch_size), num_workers=workers)
    return accelerator.prepare(loader)


@torch.no_grad()
def validate(model: nn.Module, loader: Any, accelerator: Accelerator) -> tuple[float, float]:
    """Return mean cross-entropy and top1 in percent over the images of a prepared loader."""
    loss, correct, n = 0.0, 0, 0
    with eval_mode(model):
        for images, labels in loader:
            with accelerator.autocast():
                logits = model(images).float()
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            losses, hits = accelerator.gather_for_metrics((losses, logits.argmax(1) == labels))
            loss, correct, n = loss + float(losses.sum()), correct + int(hits.sum()), n + len(hits)
    return loss / n, 100 * correct / n
