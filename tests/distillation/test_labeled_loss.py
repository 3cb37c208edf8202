"""Batches in which some images have no label: these are learnt from by the teacher's answers alone."""

import pytest
import torch
from tiny_parts import tiny_teacher
from torch import Tensor, nn

from timm_igkd import IGDistillationTask
from timm_igkd.distillation.labeled_loss import LabeledCrossEntropy

LABELS = torch.tensor([1, -1, 0, -1])


def logits(n: int = 4) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()


def input_gradient(labels: Tensor, **weights: float) -> Tensor:
    """Return the gradient of a task's loss for each image, [4, 3, 16, 16]; models in eval mode keep images apart."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    task = IGDistillationTask(
        tiny_teacher(size=16), tiny_teacher(size=16, seed=1), LabeledCrossEntropy(), verbose=False, **weights
    )
    task.eval()(images, labels)["loss"].backward()
    assert images.grad is not None
    return images.grad


def test_gradient_of_an_image_without_label_is_that_of_distillation_alone():
    both = input_gradient(LABELS, task_loss_weight=0.5, distill_loss_weight=0.5)
    alone = input_gradient(LABELS, task_loss_weight=0.0, distill_loss_weight=0.5)
    assert torch.equal(both[LABELS < 0], alone[LABELS < 0])
    assert not torch.allclose(both[LABELS >= 0], alone[LABELS >= 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_the_mean_over_the_images_with_labels(smoothing):
    output, known = logits(), LABELS >= 0
    wanted = nn.CrossEntropyLoss(label_smoothing=smoothing)(output[known], LABELS[known])
    assert torch.allclose(LabeledCrossEntropy(label_smoothing=smoothing)(output, LABELS), wanted)


def test_batch_without_any_label_has_cross_entropy_0_and_no_gradient():
    output = logits()
    loss = LabeledCrossEntropy(label_smoothing=0.1)(output, torch.full((4,), -1))
    loss.backward()
    assert loss.item() == 0
    assert output.grad is not None
    assert torch.equal(output.grad, torch.zeros_like(output))


def test_soft_targets_all_count():
    output, target = logits(), torch.full((4, 3), 1 / 3)
    assert torch.equal(LabeledCrossEntropy()(output, target), nn.CrossEntropyLoss()(output, target))
