"""Numbers of a model, and of a store's maps: accuracy, calibration, agreement, corruption, latency, faithfulness."""

from typing import TYPE_CHECKING

from timm_igkd.lazy import lazy_names

if TYPE_CHECKING:
    from timm_igkd.evaluation.faithfulness import score_maps
    from timm_igkd.evaluation.metrics import evaluate

__all__ = ["evaluate", "score_maps"]

__getattr__, __dir__ = lazy_names(__name__, {"evaluate": "metrics", "score_maps": "faithfulness"})
