"""What the student learns from: losses, the live teacher, the task that joins them."""

from typing import TYPE_CHECKING

from timm_igkd.lazy import lazy_names

if TYPE_CHECKING:
    from timm_igkd.distillation.losses import KD_LOSSES
    from timm_igkd.distillation.task import IGDistillationTask

__all__ = ["KD_LOSSES", "IGDistillationTask"]

__getattr__, __dir__ = lazy_names(__name__, {"IGDistillationTask": "task", "KD_LOSSES": "losses"})
