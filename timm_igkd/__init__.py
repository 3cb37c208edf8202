"""timm-igkd: knowledge distillation with integrated gradients, as a timm plugin.

Importing the package registers its models (`mobilenetv2_cifar`, `igkd_truncated`, …) and the augmentation `IGOverlay`
with timm: at once where timm is loaded, else when timm is imported. Everything else loads when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING

from timm_igkd.lazy import after_import, lazy_names
from timm_igkd.version import __version__

if TYPE_CHECKING:
    from timm_igkd.attribution.ig_options import IGOptions
    from timm_igkd.data.loading import load_labeled_images
    from timm_igkd.distillation.task import IGDistillationTask
    from timm_igkd.evaluation.faithfulness import score_maps
    from timm_igkd.evaluation.metrics import evaluate
    from timm_igkd.export.student import export_student
    from timm_igkd.maps.build import compute_maps
    from timm_igkd.maps.push import push_maps
    from timm_igkd.maps.store import MapStore
    from timm_igkd.models.loading import load_model, save_model
    from timm_igkd.models.truncation import truncate
    from timm_igkd.overlay.blend import IGOverlay
    from timm_igkd.overlay.dataset import IGOverlayDataset
    from timm_igkd.overlay.stream import IGOverlayStream
    from timm_igkd.report.push import push_student
    from timm_igkd.runs.job import distill
    from timm_igkd.runs.settings import RunConfig

__all__ = [
    "IGDistillationTask",
    "IGOptions",
    "IGOverlay",
    "IGOverlayDataset",
    "IGOverlayStream",
    "MapStore",
    "RunConfig",
    "__version__",
    "compute_maps",
    "distill",
    "evaluate",
    "export_student",
    "load_labeled_images",
    "load_model",
    "push_maps",
    "push_student",
    "save_model",
    "score_maps",
    "truncate",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "IGDistillationTask": "distillation",
        "IGOptions": "attribution",
        "IGOverlay": "overlay",
        "IGOverlayDataset": "overlay",
        "IGOverlayStream": "overlay",
        "MapStore": "maps",
        "RunConfig": "runs",
        "compute_maps": "maps",
        "distill": "runs",
        "evaluate": "evaluation",
        "export_student": "export",
        "load_labeled_images": "data",
        "load_model": "models",
        "push_maps": "maps",
        "push_student": "report",
        "save_model": "models",
        "score_maps": "evaluation",
        "truncate": "models",
    },
    submodules=(
        *("attribution", "data", "distillation", "environment", "errors", "evaluation", "export", "files"),
        *("hub", "maps", "models", "overlay", "random_streams", "report", "runs", "training", "with_plugin"),
    ),
)


def _register() -> None:
    """Add the architectures and the augmentation to timm's registries; each module does so when it is imported."""
    architectures = ("convnet_cifar", "mobilenetv2_cifar", "resnet_cifar", "truncated_model")
    for module in (*(f"models.{name}" for name in architectures), "overlay.timm_ops"):
        importlib.import_module(f"{__name__}.{module}")


after_import("timm", _register)
