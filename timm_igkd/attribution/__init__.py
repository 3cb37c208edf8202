"""Tensors in, attribution maps out; no dataset and no file is known here."""

from typing import TYPE_CHECKING

from timm_igkd.lazy import lazy_names

if TYPE_CHECKING:
    from timm_igkd.attribution.ig_options import IGOptions

__all__ = ["IGOptions"]

__getattr__, __dir__ = lazy_names(__name__, {"IGOptions": "ig_options"})
