"""The cross-entropy of batches in which some images have no label."""

import torch.nn.functional as F
from torch import Tensor, nn

from timm_igkd.distillation.losses import is_soft


class LabeledCrossEntropy(nn.Module):
    """Cross-entropy over the images of a batch that have a label, their mean; 0, without gradient, where none has.

    A criterion of `IGDistillationTask`: the other terms of its loss still take every image. Nothing here waits for the
    device, so the number of labelled images is not known outside of it. Of several processes each averages over its own
    labelled images, so that where their shares are unequal these weigh slightly differently.

    Args:
        unlabeled: the label of an image without one.
        label_smoothing: as torch's.
    """

    def __init__(self, unlabeled: int = -1, label_smoothing: float = 0.0):
        super().__init__()
        self.unlabeled, self.label_smoothing = unlabeled, label_smoothing

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of (B, classes) logits, given (B,) class indices or (B, classes) class probabilities."""
        if is_soft(target):
            return F.cross_entropy(output, target, label_smoothing=self.label_smoothing)
        total = F.cross_entropy(
            output, target, ignore_index=self.unlabeled, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return total / (target != self.unlabeled).sum().clamp(min=1)
