"""One run: its settings, stages and folder."""

from typing import TYPE_CHECKING

from timm_igkd.lazy import lazy_names

if TYPE_CHECKING:
    from timm_igkd.runs.job import distill
    from timm_igkd.runs.settings import RunConfig

__all__ = ["RunConfig", "distill"]

__getattr__, __dir__ = lazy_names(__name__, {"RunConfig": "settings", "distill": "job"})
