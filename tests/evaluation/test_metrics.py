"""Numbers of metrics.json whose mistakes would look plausible."""

import pytest
import torch
from tiny_parts import ImageList, noise_image, tiny_teacher
from torchvision.transforms.functional import to_tensor

from timm_igkd.evaluation.calibration import reliability_bins
from timm_igkd.evaluation.metrics import evaluate
from timm_igkd.evaluation.robustness import _CorruptedViews
from timm_igkd.models.loading import count_parameters


def test_compression_is_how_often_the_student_fits_into_the_teacher():
    dataset = ImageList([noise_image(seed) for seed in range(2)], [0, 1])
    student, teacher = tiny_teacher("test_resnet", size=16), tiny_teacher("test_efficientnet", size=16)
    found = evaluate(student, dataset, teacher=teacher, measure_latency=False).metrics
    assert count_parameters(student) != count_parameters(teacher)
    assert found["compression"] == count_parameters(teacher) / count_parameters(student)


def test_calibration_error_weighs_a_bin_by_its_images():
    probabilities = torch.tensor([[0.9, 0.1]] * 3 + [[0.6, 0.4]])
    found = reliability_bins(probabilities, torch.tensor([0, 0, 0, 1])).expected_calibration_error
    assert found == pytest.approx((3 * 0.1 + 0.6) / 4, abs=1e-6)


def test_an_image_is_corrupted_alike_however_many_are():
    dataset = ImageList([noise_image(seed) for seed in range(4)], [0] * 4)
    few, all_ = (_CorruptedViews(dataset, limit, [to_tensor])[position][0][0] for limit, position in ((2, 1), (4, 2)))
    assert torch.equal(few, all_)
