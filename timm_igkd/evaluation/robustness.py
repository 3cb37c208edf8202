"""Accuracy under corruption: every kind at every severity, before any transform.

An image is corrupted as it is decoded, but for one that is larger than any model resizes it to: it is brought to that
size first, of 224 pixels at least. Else the transform would average away what was done to its pixels.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from timm_igkd.data.items import known_labels, read_item
from timm_igkd.data.labels import evenly_spread
from timm_igkd.evaluation.corruptions import CORRUPTIONS, LARGEST_SIDE, SEVERITIES, corrupt
from timm_igkd.evaluation.evaluated_model import EvaluatedModel, shared_transforms
from timm_igkd.progress import progress_bar

_SETTINGS = [(kind, severity) for kind in CORRUPTIONS for severity in SEVERITIES]


class _CorruptedViews(Dataset[tuple[list[Tensor], int]]):
    """Images evenly spread over a dataset; of each all corruptions, (K, 3, h, w) under each of several transforms.

    Args:
        dataset: map-style, of (PIL RGB image, label).
        limit: images, of it.
        transforms: see `shared_transforms`.
        largest: shorter side of an image, in pixels, that is corrupted; larger ones are brought to it.
    """

    def __init__(self, dataset: Any, limit: int, transforms: Sequence[Any], largest: int) -> None:
        self.dataset, self.largest = dataset, largest
        self.indices = evenly_spread(len(dataset), limit, known_labels(dataset))
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[list[Tensor], int]:
        index = self.indices[position]
        image, label = read_item(self.dataset, index)
        if min(image.size) > self.largest:
            image = F.resize(image, [self.largest])
        pixels = F.pil_to_tensor(image)[None]
        views = [F.to_pil_image(corrupt(pixels, kind, severity, start=index)[0]) for kind, severity in _SETTINGS]
        return [torch.stack([transform(view) for view in views]) for transform in self.transforms], label


@torch.inference_mode()
def measure_robustness(
    models: Sequence[EvaluatedModel],
    dataset: Any,
    limit: int,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    progress: bool,
) -> list[dict[str, Any]]:
    """Return the accuracy of models in eval mode on `device` under every corruption (seed 0).

    Args:
        models: in eval mode; each image is read and corrupted once for all.
        dataset: map-style dataset of (PIL RGB image, label), labels checked.
        limit: images per corruption, evenly spread over the dataset, in 1 to its length.
        batch_size: images per forward pass.
        num_workers: worker processes that corrupt and transform.
        device: where the models are.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        For each model `top1` (percent, the mean over kinds and severities), `n` (images per corruption) and `kinds`:
        of each kind of `CORRUPTIONS` top1 at severities 1 to 5.

    Raises:
        RunError: non-finite logits.
    """
    transforms, positions = shared_transforms(models)
    views = _CorruptedViews(dataset, limit, transforms, max(map(_resized_side, models)))
    at_once, own = max(1, batch_size // len(_SETTINGS)), torch.Generator()  # the host's draws go on as before
    loader = DataLoader(views, at_once, num_workers=num_workers, generator=own)
    correct = torch.zeros((len(models), len(_SETTINGS)), dtype=torch.int64)
    for images, labels in progress_bar(loader, desc="corruptions", unit="batch", show=progress):
        for count, position, evaluated in zip(correct, positions, models, strict=True):
            batches = images[position].flatten(0, 1).split(batch_size)
            logits = torch.cat([evaluated.logits(batch.to(device)).float().cpu() for batch in batches])
            evaluated.check_finite(logits, "a corrupted image")
            logits = evaluated.asked_logits(logits)
            count += (logits.argmax(dim=1).view(len(labels), -1) == evaluated.targets(labels)[:, None]).sum(dim=0)
    return [_summary(row, limit) for row in (100 * correct.double() / limit)]


def _resized_side(model: EvaluatedModel) -> int:
    """Return the shorter side that a model's transform resizes an image to, before it crops; at least ImageNet-C's."""
    config = model.data_config
    return max(LARGEST_SIDE, math.floor(max(config["input_size"][1:]) / config["crop_pct"]))


def _summary(top1: Tensor, limit: int) -> dict[str, Any]:
    by_kind = top1.view(len(CORRUPTIONS), len(SEVERITIES))
    return {"top1": top1.mean().item(), "n": limit, "kinds": dict(zip(CORRUPTIONS, by_kind.tolist(), strict=True))}
