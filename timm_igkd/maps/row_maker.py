"""Images to rows of a store: the teacher's view, the target, the engine, the quantised map."""

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from timm_igkd.attribution.chunk_gradient import Kernel
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.options import Attribution, CaptumEngine, IGOptions, TeacherView, reduce_channels
from timm_igkd.data.images import content_key
from timm_igkd.data.items import read_item, row_name
from timm_igkd.errors import InputError, RunError
from timm_igkd.maps.row_format import MapRow, quantize
from timm_igkd.random_streams import derive_seed

Item = tuple[Image.Image, int, Tensor]  # image, label, the teacher's view of it


class RowMaker:
    """Attributes images of one dataset as one manifest says.

    Args:
        teacher: in eval mode.
        dataset: map-style dataset of (PIL image, label).
        manifest: the store's settings.
        device: where to compute.
    """

    def __init__(self, teacher: nn.Module, dataset: Any, manifest: dict[str, Any], device: torch.device):
        self.dataset, self.manifest, self.device = dataset, manifest, device
        self.options = IGOptions(**manifest["options"])
        self.view = TeacherView(teacher)
        self.class_indices = manifest["teacher"]["class_indices"]
        self.num_outputs: int = teacher.num_classes  # type: ignore[assignment]
        chunk, kernel = manifest["chunk_size"], Kernel()
        if device.type == "cuda":
            kernel = Kernel(manifest["dtype"], manifest.get("compiled", False))
        self.fast = FastEngine(teacher, self.options, chunk, (3, *self.view.size), device, kernel=kernel)
        self.captum = CaptumEngine(teacher.to(device), self.options, chunk) if manifest["engine"] == "captum" else None

    def set_chunk_size(self, chunk: int) -> None:
        """Use another number of (image, step) pairs per pass from now on."""
        self.fast.chunk_size = chunk
        if self.captum is not None:
            self.captum.chunk_size = chunk

    def read(self, index: int) -> Item:
        """Decode an image, and resize and normalise it for the teacher; several threads may do so at once."""
        image, label = read_item(self.dataset, index)
        return image, label, self.view(image)

    def rows(self, indices: range | list[int], items: list[Item]) -> list[MapRow]:
        """Return the rows of some images, computed together."""
        images, labels, views = (list(column) for column in zip(*items, strict=True))
        attribution = self._attribute(images, labels, views, indices)
        maps = self._resize(reduce_channels(attribution.values, self.options.reduction)).cpu().numpy()
        logits = self._dataset_logits(attribution.logits).cpu().numpy()
        deltas = attribution.convergence_delta.cpu()  # at once: on a GPU each element read alone would wait for it
        rows = []
        for position, (image, label) in enumerate(zip(images, labels, strict=True)):
            levels, scale = quantize(
                maps[position], self.options.reduction == "sum", row_name(self.dataset, indices[position])
            )
            rows.append(
                MapRow(
                    key=content_key(image),
                    label=label,
                    map=levels,
                    scale=scale,
                    convergence_delta=float(deltas[position]),
                    n_steps=int(attribution.n_steps[position]),
                    converged=bool(attribution.converged[position]),
                    logits=logits[position] if self.manifest["logits"] else None,
                )
            )
        return rows

    def _attribute(
        self, images: list[Image.Image], labels: list[int], views: list[Tensor], indices: range | list[int]
    ) -> Attribution:
        inputs = torch.stack(views).to(self.device)
        logits = self.fast.forward(inputs)
        if not torch.isfinite(logits).all():
            raise RunError("the teacher's outputs are not finite; check its weights and normalisation")
        targets = self._targets(labels, logits, indices)
        seeds = (
            [derive_seed(0, "baseline:" + content_key(image)) for image in images]
            if self.options.baseline == "noise"
            else []
        )
        baselines = self.view.baseline(inputs, self.options.baseline, seeds)
        return (self.captum or self.fast).attribute(inputs, baselines, targets, logits)

    def _targets(self, labels: list[int], logits: Tensor, indices: range | list[int]) -> Tensor:
        if self.options.target == "predicted":
            return logits.argmax(1)
        classes = len(self.class_indices) if self.class_indices else self.num_outputs
        for label, index in zip(labels, indices, strict=True):
            if not 0 <= label < classes:
                raise InputError(
                    f"{row_name(self.dataset, index)} has label {label}, but the teacher knows classes 0 to "
                    f"{classes - 1}; "
                    "correct the label, or use --target predicted"
                )
        mapped = [self.class_indices[label] for label in labels] if self.class_indices else labels
        return torch.tensor(mapped, device=logits.device)

    def _dataset_logits(self, logits: Tensor) -> Tensor:
        return logits if self.class_indices is None else logits[:, self.class_indices]

    def _resize(self, maps: Tensor) -> Tensor:
        size = self.manifest["map_size"]
        if size is None or (size >= maps.shape[1] and size >= maps.shape[2]):
            return maps
        return F.interpolate(maps[:, None], size=(size, size), mode="area")[:, 0]
