"""Students that explain: their task, a batch with maps, and what a step leaves."""

from typing import Any

import torch
from tiny_parts import tiny_teacher
from torch import Tensor, nn

from timm_igkd.distillation.task import IGDistillationTask

CLASSES, BATCH, SIZE = 4, 4, 64
E: dict[str, Any] = {"explanation_loss_weight": 1.0}
KINDS = ["input_x_gradient", "grad_cam"]


def tiny(name: str = "test_resnet", seed: int = 0) -> nn.Module:
    return tiny_teacher(name, classes=CLASSES, size=SIZE, seed=seed)


def build(student: nn.Module, teacher: nn.Module | None = None, **kwargs: Any) -> IGDistillationTask:
    weight = {"distill_loss_weight": 0.0 if teacher is None else 0.5}
    return IGDistillationTask(student, teacher, verbose=False, **weight | kwargs).train()


def batch_with_maps() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    input, maps = torch.randn(BATCH, 3, SIZE, SIZE, generator=rng), torch.rand(BATCH, 1, SIZE, SIZE, generator=rng)
    return {"input": input, "target": torch.arange(BATCH) % CLASSES, "maps": maps}


def gradients(module: nn.Module) -> list[Tensor]:
    return [weight.grad for weight in module.parameters() if weight.grad is not None]
