"""timm-igkd: knowledge distillation with integrated gradients, as a timm plugin.

Importing the package registers the models `mobilenetv2_cifar` and `igkd_truncated` and the augmentation `IGOverlay`
(timm_ops.py) with timm.
"""

from timm_igkd.attribution.options import IGOptions
from timm_igkd.data.loading import load_labeled_images
from timm_igkd.distillation.task import IGDistillationTask
from timm_igkd.evaluation.metrics import evaluate
from timm_igkd.maps.build import compute_maps
from timm_igkd.maps.push import push_maps
from timm_igkd.maps.store import MapStore
from timm_igkd.models.loading import load_model, save_model
from timm_igkd.models.truncation import truncate
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.dataset import IGOverlayDataset
from timm_igkd.report.push import push_student
from timm_igkd.version import __version__

__all__ = [
    "IGDistillationTask",
    "IGOptions",
    "IGOverlay",
    "IGOverlayDataset",
    "MapStore",
    "__version__",
    "compute_maps",
    "evaluate",
    "load_labeled_images",
    "load_model",
    "push_maps",
    "push_student",
    "save_model",
    "truncate",
]
