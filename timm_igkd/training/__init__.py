"""One training loop over batches, whatever made them."""

from typing import TYPE_CHECKING

from timm_igkd.lazy import lazy_names

if TYPE_CHECKING:
    from timm_igkd.training.batch import Batch
    from timm_igkd.training.trainer import Trainer

__all__ = ["Batch", "Trainer"]

__getattr__, __dir__ = lazy_names(__name__, {"Batch": "batch", "Trainer": "trainer"})
