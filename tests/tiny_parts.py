"""Small teachers, datasets and map stores that several test modules build on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from timm_igkd.data.images import content_key
from timm_igkd.files import write_json
from timm_igkd.maps.row_format import MapRow, to_table
from timm_igkd.maps.store import MapStore
from timm_igkd.maps.store_files import num_shards, shard_path, shard_rows, write_shard


def tiny_teacher(name: str = "test_resnet", classes: int = 2, size: int = 32, seed: int = 0) -> nn.Module:
    """Return a timm model with random weights and, so that batch norms are not the identity, random statistics."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {"img_size": size} if "vit" in name else {}
    overlay = {"input_size": (3, size, size)}
    model = timm.create_model(name, num_classes=classes, pretrained_cfg_overlay=overlay, **arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


class ImageList(Dataset):
    """The plainest dataset of (PIL image, label)."""

    def __init__(self, images: Sequence[Image.Image], labels: Sequence[int], name: str = "list"):
        self.images, self.labels, self.name = list(images), list(labels), name

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.labels[index]


def noise_image(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ramp(index: int, width: int = 32, height: int = 32) -> np.ndarray:
    """Return levels that rise from exactly 0 to exactly 255 in a direction of their own, [height, width] uint8."""
    angle = 0.3 + 2.4 * index
    y, x = np.mgrid[0:height, 0:width]
    plane = np.cos(angle) * x + np.sin(angle) * y
    return np.round(255 * (plane - plane.min()) / (plane.max() - plane.min())).astype(np.uint8)


def write_store(
    folder: Path,
    dataset: Any,
    maps: Sequence[np.ndarray],
    *,
    reduction: str = "abs_sum",
    target: str = "label",
    logits: Sequence[np.ndarray] | None = None,
    num_images: int | None = None,
    shard_size: int = 64,
) -> MapStore:
    """Write a finished store with chosen maps: row i holds the uint8 levels `maps[i]` of image i."""
    n = len(maps)
    manifest = {
        "format": 1,
        "dataset": {"name": "list", "split": "train", "num_images": num_images or len(dataset), "class_names": None},
        "teacher": {"name": "none", "weights_sha256": "0" * 64, "class_indices": None},
        "options": {"n_steps": 1, "reduction": reduction, "target": target, "baseline": "mean", "output": "logit"},
        "engine": "fast",
        "dtype": "float32",
        "n": n,
        "map_size": None,
        "logits": logits is not None,
        "shard_rows": shard_size,
        "versions": {"pillow": "1"},
    }
    write_json(folder / "manifest.json", manifest)
    rows = [
        MapRow(content_key(image), label, maps[i], 1.0, 0.0, 1, True, None if logits is None else logits[i])
        for i, (image, label) in ((i, dataset[i]) for i in range(n))
    ]
    for shard in range(num_shards(manifest)):
        part = shard_rows(manifest, shard)
        write_shard(shard_path(folder, manifest, shard), to_table(rows[part.start : part.stop]))
    write_json(folder / "provenance.json", manifest)
    return MapStore(folder)
