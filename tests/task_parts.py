"""Tasks of tiny models, for tests of what they compute."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_igkd.distillation.task import IGDistillationTask

CLASSES, BATCH = 10, 4

AT: dict[str, Any] = {"attention_loss_weight": 0.8}


def tiny(name: str = "test_resnet", seed: int = 0, size: int = 32, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    if "vit" in name:
        kwargs["img_size"] = size
    overlay = {"input_size": (3, size, size), **kwargs.pop("cfg", {})}
    return timm.create_model(name, num_classes=kwargs.pop("classes", CLASSES), pretrained_cfg_overlay=overlay, **kwargs)


def build(student: nn.Module | None = None, teacher: nn.Module | None = None, **kwargs: Any) -> IGDistillationTask:
    kwargs.setdefault("teacher_view", "same")
    return IGDistillationTask(student or tiny(), teacher, **kwargs)


def spied(task: IGDistillationTask) -> list[Tensor]:
    """Return the list that collects what the teacher's own model is fed."""
    seen: list[Tensor] = []
    assert task.teacher is not None
    task.teacher.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


class Plain(nn.Module):
    """A model that is not timm's."""

    num_classes, in_chans = CLASSES, 3
    pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 32, 32)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))
