"""Teachers and students in and out: architectures, loading, saving, truncation."""

from typing import TYPE_CHECKING

# timm first: its import registers the architectures below it (timm_igkd/__init__.py), and one of them half imported
# would find its sibling waiting for it.
import timm  # noqa: F401

from timm_igkd.lazy import lazy_names

if TYPE_CHECKING:
    from timm_igkd.models.loading import load_model, save_model
    from timm_igkd.models.truncation import truncate

__all__ = ["load_model", "save_model", "truncate"]

__getattr__, __dir__ = lazy_names(
    __name__, {"load_model": "loading", "save_model": "loading", "truncate": "truncation"}
)
