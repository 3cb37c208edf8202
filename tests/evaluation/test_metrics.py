"""Numbers of metrics.json whose mistakes would look plausible."""

import pytest
import torch
from tiny_parts import ImageList, noise_image, tiny_teacher
from torch import nn
from torchvision.transforms.functional import to_tensor

from timm_igkd.errors import RunError
from timm_igkd.evaluation.calibration import reliability_bins
from timm_igkd.evaluation.evaluated_model import EvaluatedModel
from timm_igkd.evaluation.metrics import evaluate
from timm_igkd.evaluation.robustness import _CorruptedViews
from timm_igkd.models.loading import count_parameters


def test_compression_is_how_often_the_student_fits_into_the_teacher():
    dataset = ImageList([noise_image(seed) for seed in range(2)], [0, 1])
    student, teacher = tiny_teacher("test_resnet", size=16), tiny_teacher("test_efficientnet", size=16)
    found = evaluate(student, dataset, teacher=teacher, measure_latency=False).metrics
    assert count_parameters(student) != count_parameters(teacher)
    assert found["compression"] == count_parameters(teacher) / count_parameters(student)


def test_the_first_image_with_logits_that_are_not_finite_is_named():
    logits = torch.zeros(4, 3)
    logits[2, 1], logits[3] = torch.inf, torch.nan
    evaluated = EvaluatedModel("model", nn.Identity(), None, {})
    evaluated.check_batch(logits[:2], torch.zeros(2, dtype=torch.int64), 8)
    with pytest.raises(RunError, match="the model gives non-finite logits for image 10; its weights are damaged"):
        evaluated.check_batch(logits, torch.zeros(4, dtype=torch.int64), 8)


def test_calibration_error_weighs_a_bin_by_its_images():
    probabilities = torch.tensor([[0.9, 0.1]] * 3 + [[0.6, 0.4]])
    found = reliability_bins(probabilities, torch.tensor([0, 0, 0, 1])).expected_calibration_error
    assert found == pytest.approx((3 * 0.1 + 0.6) / 4, abs=1e-6)


def test_an_image_is_corrupted_alike_however_many_are():
    dataset = ImageList([noise_image(seed) for seed in range(4)], [0] * 4)
    few, all_ = (_CorruptedViews(dataset, limit, [to_tensor], 224)[at][0][0] for limit, at in ((2, 1), (4, 2)))
    assert torch.equal(few, all_)
