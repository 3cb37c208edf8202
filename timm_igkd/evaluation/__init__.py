"""Numbers of a model: accuracy, calibration, agreement, corruption, latency."""

from typing import TYPE_CHECKING

from timm_igkd.lazy import lazy_names

if TYPE_CHECKING:
    from timm_igkd.evaluation.metrics import evaluate

__all__ = ["evaluate"]

__getattr__, __dir__ = lazy_names(__name__, {"evaluate": "metrics"})
