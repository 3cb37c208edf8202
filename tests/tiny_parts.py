"""Small teachers, datasets and map stores that several test modules build on."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from timm_igkd.attribution.options import IGOptions
from timm_igkd.data.images import content_key
from timm_igkd.intervals import Interval
from timm_igkd.maps.manifest import Manifest, Provenance, SourceDataset, SourceTeacher, Statistics
from timm_igkd.maps.row_format import MapRow, statistics, to_table
from timm_igkd.maps.scores import Faithfulness, MapScore
from timm_igkd.maps.store import MapStore
from timm_igkd.maps.store_files import keys_hash, shard_paths, write_shard
from timm_igkd.records import write_record

NUMBERS: dict[str, Any] = {
    "top1": 90.0,
    "top5": 99.0,
    "loss": 0.4,
    "ece": 0.02,
    "num_parameters": 1,
    "macs": 1,
    "n": 10,
}
"""What every metrics.json holds."""


def tiny_teacher(
    name: str = "test_resnet", classes: int = 2, size: int = 32, seed: int = 0, **arguments: Any
) -> nn.Module:
    """Return a timm model with random weights and, so that batch norms are not the identity, random statistics."""
    torch.manual_seed(seed)
    arguments |= {"img_size": size} if "vit" in name else {}
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


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[bytes, bytes | str]], first: int = 0, suffix: str = "png") -> Path:
    """Write a webdataset shard of (encoded image, content of .cls) with keys counted from `first`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, (image, label) in enumerate(members, first):
            for name, data in ((suffix, image), ("cls", label.encode() if isinstance(label, str) else label)):
                info = tarfile.TarInfo(f"{index:04d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


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
    reduction: Any = "abs_sum",
    target: Any = "label",
    logits: Sequence[np.ndarray] | None = None,
    num_images: int | None = None,
    shard_size: int = 64,
) -> MapStore:
    """Write a finished store with chosen maps: row i holds the uint8 levels `maps[i]` of image i."""
    manifest = tiny_manifest(
        len(maps),
        num_images=num_images or len(dataset),
        options=IGOptions(n_steps=1, reduction=reduction, target=target),
        logits=logits is not None,
        shard_rows=shard_size,
    )
    classes = 2 if logits is None else len(logits[0])
    teacher = replace(manifest.teacher, input_size=(3, *maps[0].shape), num_classes=classes)
    manifest = replace(manifest, teacher=teacher)
    write_record(folder / "manifest.json", manifest)
    rows = [
        MapRow(content_key(image), label, maps[i], 1.0, 0.0, 1, True, None if logits is None else logits[i])
        for i, (image, label) in ((i, dataset[i]) for i in range(len(maps)))
    ]
    tables = [to_table([rows[i] for i in manifest.rows_of(shard)]) for shard in range(manifest.num_shards)]
    for path, table in zip(shard_paths(folder, manifest), tables, strict=True):
        write_shard(path, table)
    write_record(folder / "provenance.json", finished(manifest, tables))
    return MapStore(folder)


def tiny_manifest(n: int, *, num_images: int | None = None, **settings: Any) -> Manifest:
    """Return the manifest of a store that no teacher made."""
    teacher = SourceTeacher(
        name="none",
        architecture=None,
        weights_sha256="0" * 64,
        input_size=(3, 32, 32),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation=None,
        num_classes=2,
        class_indices=None,
    )
    defaults = {
        "dataset": SourceDataset(name="list", split="train", num_images=num_images or n),
        "teacher": teacher,
        "options": IGOptions(n_steps=1),
        "engine": "fast",
        "n": n,
        "map_size": None,
        "logits": False,
        "shard_rows": 64,
        "versions": {"pillow": "1"},
        "chunk_size": 1,
        "batch_images": 1,
    }
    return Manifest(**defaults | settings)


def finished(manifest: Manifest, tables: Sequence[pa.Table]) -> Provenance:
    """Return the provenance of a store with these rows."""
    keys = [key for table in tables for key in table.column("key").to_pylist()]
    return Provenance(**vars(manifest), keys_hash=keys_hash(keys), statistics=statistics(list(tables)))


def provenance_of(n: int, **options: Any) -> Provenance:
    """Return the provenance of a store of n maps that were never computed."""
    numbers = Statistics(mean_steps=1.0, converged=n, abs_delta_median=0.0, abs_delta_p90=0.0, constant_maps=0)
    manifest = tiny_manifest(n, options=IGOptions(**options))
    return Provenance(**vars(manifest), keys_hash="0" * 32, statistics=numbers)


def tiny_score(maps: Provenance) -> Faithfulness:
    """Return a score of maps that nobody measured."""
    area, curve = Interval(0.25, 0.125, 0.375), (1.0, 0.5, 0.0)
    curves: dict[str, Any] = {"deletion": area, "insertion": area, "deletion_curve": curve, "insertion_curve": curve}
    own = MapScore(maps="own", deletion_gap=None, insertion_gap=None, **curves)
    return Faithfulness(
        options=maps.options,
        weights_sha256=maps.teacher.weights_sha256,
        keys_hash=maps.keys_hash,
        n=7,
        steps=2,
        deleted="grey",
        inserted_into="blur",
        seed=0,
        scores=(own, MapScore(maps="random", deletion_gap=area, insertion_gap=area, **curves)),
        versions={},
    )
