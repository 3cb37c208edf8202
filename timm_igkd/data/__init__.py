"""Images in: a dataset opened by name, each image with its label and content key."""

from typing import TYPE_CHECKING

from timm_igkd.lazy import lazy_names

if TYPE_CHECKING:
    from timm_igkd.data.loading import load_labeled_images

__all__ = ["load_labeled_images"]

__getattr__, __dir__ = lazy_names(__name__, {"load_labeled_images": "loading"})
