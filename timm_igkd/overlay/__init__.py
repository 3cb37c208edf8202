"""The paper's idea: a map blended into its image; controls, timm's ops, the device path, a preview."""

from typing import TYPE_CHECKING

from timm_igkd.lazy import lazy_names

if TYPE_CHECKING:
    from timm_igkd.overlay.blend import IGOverlay
    from timm_igkd.overlay.dataset import IGOverlayDataset
    from timm_igkd.overlay.stream import IGOverlayStream

__all__ = ["IGOverlay", "IGOverlayDataset", "IGOverlayStream"]

__getattr__, __dir__ = lazy_names(
    __name__, {"IGOverlay": "blend", "IGOverlayDataset": "dataset", "IGOverlayStream": "stream"}
)
