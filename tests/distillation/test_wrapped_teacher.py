"""A live teacher may be wrapped or of another precision: the same losses; what gives no logits is one line."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.task.distillation import DistillationTeacher
from tiny_parts import tiny_teacher
from torch import nn
from torch.nn.utils import parametrizations

from timm_igkd import IGDistillationTask
from timm_igkd.errors import InputTypeError


def losses(teacher: Any, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    input, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    student = tiny_teacher(seed=3)
    task = IGDistillationTask(student, teacher, distill_loss_weight=0.5, verbose=False, **options).train()
    found = task(input, target)
    found["loss"].backward()
    return found


def normed() -> nn.Module:
    model = tiny_teacher()
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            parametrizations.weight_norm(module)
    return model


TEACHERS: dict[str, tuple[Callable[[], Any], float]] = {
    "DataParallel": (lambda: nn.DataParallel(tiny_teacher()), 1e-6),
    "compiled": (lambda: torch.compile(tiny_teacher(), backend="eager"), 1e-6),
    "DistillationTeacher": (lambda: DistillationTeacher(tiny_teacher()), 1e-6),
    "weight norm": (normed, 1e-5),
    "float64": (lambda: tiny_teacher().double(), 1e-5),
    "float16": (lambda: tiny_teacher().half(), 1e-2),
    "bfloat16": (lambda: tiny_teacher().bfloat16(), 1e-2),
}


@pytest.mark.parametrize("attention", [0.0, 1.0])
@pytest.mark.parametrize("name", TEACHERS)
def test_losses_are_those_of_the_plain_teacher(name, attention):
    create, tolerance = TEACHERS[name]
    expected, found = (losses(teacher, attention_loss_weight=attention) for teacher in (tiny_teacher(), create()))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key].float(), value, rtol=tolerance, atol=tolerance)


class Pair(nn.Module):
    """A model that returns two tensors, as a DeiT trained with a distillation token does."""

    num_classes, pretrained_cfg = 2, {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head(x.mean((2, 3))), self.head(x.amax((2, 3)))


def test_teacher_of_two_outputs_is_one_line():
    with pytest.raises(InputTypeError, match="the teacher must return one tensor of logits, got tuple; wrap it"):
        losses(Pair())


def test_student_in_distilled_training_is_one_line():
    student: Any = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2, img_size=32, depth=1)
    student.set_distilled_training(True)
    task = IGDistillationTask(student, tiny_teacher(), verbose=False).train()
    with pytest.raises(InputTypeError, match=r"the student must return one tensor .* set_distilled_training\(False\)"):
        task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
