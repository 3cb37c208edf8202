"""One store of maps, from its manifest to the Hub."""

from typing import TYPE_CHECKING

from timm_igkd.lazy import lazy_names

if TYPE_CHECKING:
    from timm_igkd.maps.build import compute_maps
    from timm_igkd.maps.push import push_maps
    from timm_igkd.maps.store import MapStore

__all__ = ["MapStore", "compute_maps", "push_maps"]

__getattr__, __dir__ = lazy_names(__name__, {"MapStore": "store", "compute_maps": "build", "push_maps": "push"})
