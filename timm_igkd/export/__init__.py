"""Students in the formats of the edge: ONNX and int8, verified against PyTorch."""

from typing import TYPE_CHECKING

from timm_igkd.lazy import lazy_names

if TYPE_CHECKING:
    from timm_igkd.export.student import export_student

__all__ = ["export_student"]

__getattr__, __dir__ = lazy_names(__name__, {"export_student": "student"})
