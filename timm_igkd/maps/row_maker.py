"""Images to rows of a store: the teacher's view, the target, the engine, the quantised map."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from timm_igkd.attribution.chunk_gradient import Arithmetic
from timm_igkd.attribution.correlation import map_correlation
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.options import Attribution, CaptumEngine, TeacherView, reduce_channels
from timm_igkd.data.images import content_key
from timm_igkd.data.items import (
    class_names,
    dataset_name,
    first_part,
    is_part,
    read_item,
    row_name,
    split_name,
)
from timm_igkd.data.unlabeled import content_hash_of
from timm_igkd.errors import InputError, RunError, first_line
from timm_igkd.eval_mode import bare_model
from timm_igkd.maps.manifest import Deviation, Manifest, SourceDataset, SourceTeacher
from timm_igkd.maps.row_format import MapRow, quantize, read_row
from timm_igkd.maps.store_files import rows_at
from timm_igkd.random_streams import derive_seed

if TYPE_CHECKING:
    from timm_igkd.maps.store import MapStore

_MEASURED_CHUNK = 32
Item = tuple[Image.Image, int, Tensor]  # image, label, the teacher's view of it


class RowMaker:
    """Attributes images of one dataset as one manifest says.

    Args:
        teacher: as `teacher_copy` gives it.
        dataset: map-style dataset of (PIL image, label).
        manifest: the store's settings.
        device: where to compute.
    """

    def __init__(self, teacher: nn.Module, dataset: Any, manifest: Manifest, device: torch.device):
        self.dataset, self.manifest, self.device = dataset, manifest, device
        self.options = manifest.options
        self.view = TeacherView(teacher)
        self.class_indices = manifest.teacher.class_indices
        self.num_outputs: int = teacher.num_classes  # type: ignore[assignment]
        chunk = manifest.chunk_size
        self.fast = FastEngine(teacher, self.options, chunk, self.view.shape, device, arithmetic=manifest.arithmetic)
        self.captum = CaptumEngine(teacher.to(device), self.options, chunk) if manifest.engine == "captum" else None

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
        maps = self._maps(attribution).numpy()
        logits = self._dataset_logits(attribution.logits).cpu().numpy()
        deltas = attribution.convergence_delta.cpu()  # at once: on a GPU each element read alone would wait for it
        if not torch.isfinite(deltas).all():
            raise RunError("the teacher's outputs for the baseline are not finite; check its weights, or take another")
        rows = []
        for position, (image, label) in enumerate(zip(images, labels, strict=True)):
            name = partial(row_name, self.dataset, indices[position])
            levels, scale = quantize(maps[position], self.options.signed, name)
            rows.append(
                MapRow(
                    key=content_key(image),
                    label=label,
                    map=levels,
                    scale=scale,
                    convergence_delta=float(deltas[position]),
                    n_steps=int(attribution.n_steps[position]),
                    converged=bool(attribution.converged[position]),
                    logits=logits[position] if self.manifest.logits else None,
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
        with _compiler_errors() if self.manifest.compiled else nullcontext():
            return (self.captum or self.fast).attribute(inputs, baselines, targets, logits)

    def _targets(self, labels: list[int], logits: Tensor, indices: range | list[int]) -> Tensor:
        if not self.options.needs_labels:
            return logits.argmax(1)
        classes = len(self.class_indices) if self.class_indices else self.num_outputs
        for label, index in zip(labels, indices, strict=True):
            if not 0 <= label < classes:
                raise InputError(
                    f"{row_name(self.dataset, index)} has label {label}, but the teacher knows "
                    f"classes 0 to {classes - 1}; correct the label, or use --target predicted"
                )
        mapped = [self.class_indices[label] for label in labels] if self.class_indices else labels
        return torch.tensor(mapped, device=logits.device)

    def _dataset_logits(self, logits: Tensor) -> Tensor:
        return logits if self.class_indices is None else logits[:, list(self.class_indices)]

    def maps(self, indices: range | list[int], items: list[Item]) -> Tensor:
        """Return the maps of some images before they are quantised, [B, H, W] float32 on the CPU."""
        images, labels, views = (list(column) for column in zip(*items, strict=True))
        return self._maps(self._attribute(images, labels, views, indices))

    def _maps(self, attribution: Attribution) -> Tensor:
        return self._resize(reduce_channels(attribution.values, self.options.reduction)).cpu()

    def _resize(self, maps: Tensor) -> Tensor:
        shape = self.manifest.map_shape
        return maps if maps.shape[1:] == shape else F.interpolate(maps[:, None], size=shape, mode="area")[:, 0]


def source_dataset(dataset: Any, limit: int | None) -> SourceDataset:
    """Return what a store says of the images that its maps are of.

    Raises:
        InputError: there are none, or the first cannot be read. InputTypeError: it gives no images.
    """
    if len(dataset) == 0:
        raise InputError(f"{dataset_name(dataset)!r} has no images, expected at least one")
    read_item(dataset, 0)  # what gives no images is refused before anything is written
    revision = getattr(dataset, "revision", None) or getattr(first_part(dataset), "revision", None)
    return SourceDataset(
        name=dataset_name(dataset),
        split=split_name(dataset),
        revision=None if revision is None else str(revision),
        num_images=len(dataset),
        class_names=class_names(dataset) or None,
        content_hash=content_hash_of(dataset, limit),
        is_part=is_part(dataset),
    )


def preprocessing(teacher: Any) -> dict[str, Any]:
    """Return how a teacher's inputs are made, by the names of `SourceTeacher`."""
    view = TeacherView(teacher)
    return {"input_size": view.shape, **view.statistics, "interpolation": view.interpolation_name}


_SAME_VIEW = {  # by the names of `SourceTeacher`: what to do
    "input_size": "give the same --teacher-args (in a run, the same --img-size)",
    "mean": "give the same --teacher-mean and --teacher-std",
    "std": "give the same --teacher-mean and --teacher-std",
    "interpolation": "name it in the pretrained_cfg of the teacher's config.json, or build the maps again",
}


def view_difference(made: SourceTeacher, teacher: Any) -> str | None:
    """Return in what a teacher sees images otherwise than the one that made maps, in words; None where it does not."""
    for name, sees in preprocessing(bare_model(teacher)).items():
        if (seen := getattr(made, name)) != sees:
            return f"its {name} is {_list(seen)} there, {_list(sees)} here; {_SAME_VIEW[name]}"
    return None


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def _compiler_errors() -> Iterator[None]:
    """Tell in one line that torch.compile found no compiler, or does not compile this model."""
    from torch._dynamo.exc import TorchDynamoException  # here, as it takes a second that eager work does without

    try:
        yield
    except TorchDynamoException as error:
        raise RunError(f"--compile failed ({first_line(error)}); leave it out, or install a compiler") from error


def free_memory(arithmetic: Arithmetic) -> None:
    """Free what torch keeps of the last runs: cached memory; compiled code and its CUDA graphs."""
    if arithmetic.compiled:
        torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def measure_deviation(
    teacher: nn.Module, dataset: Any, manifest: Manifest, device: torch.device, indices: list[int]
) -> Deviation:
    """Measure what a manifest's dtype and compiling change in the maps of some images, in chunks that surely fit.

    Raises:
        RunError: maps that are not finite, or no compiler.
    """
    manifest = replace(manifest, chunk_size=min(_MEASURED_CHUNK, manifest.chunk_size))
    exact = RowMaker(teacher, dataset, replace(manifest, dtype="float32", compiled=False), device)
    items = [exact.read(index) for index in indices]
    wanted = exact.maps(indices, items).double().numpy()
    found = RowMaker(teacher, dataset, manifest, device).maps(indices, items).double().numpy()
    free_memory(manifest.arithmetic)
    if not np.isfinite(found).all():
        raise RunError(f"maps in {manifest.dtype} are not finite; leave --dtype and --compile out")
    norms = np.maximum(np.linalg.norm(wanted, axis=(1, 2)), 1e-30)
    return Deviation(
        images=len(indices),
        relative=float((np.linalg.norm(found - wanted, axis=(1, 2)) / norms).max()),
        correlation=float(map_correlation(torch.from_numpy(found), torch.from_numpy(wanted)).min()),
    )


class Recomputed(NamedTuple):
    """How near rows that were computed again are to the stored ones.

    Attributes:
        levels: largest difference of the maps, of 255 levels; 0 where the store has none.
        correlation: the least of a map with its stored one; 1 where the store has none.
        logits: largest difference of a logit, as a share of the image's largest; None where the store has none.
        scale: largest difference of a map's scale, as a share of the larger; 0 where the store has no maps.
        delta: largest difference of a convergence delta, as a share of the larger of 1 and the stored one.
    """

    levels: int
    correlation: float
    logits: float | None
    scale: float
    delta: float


def compare_rows(store: "MapStore", maker: RowMaker, indices: list[int]) -> Recomputed:
    """Compute rows of a store again and hold them against the stored ones.

    Args:
        store: whose rows.
        maker: of the store's settings, and of a teacher and images that are to be those of the store.
        indices: of the rows, ascending.

    Returns:
        The largest difference of each kind among all rows.

    Raises:
        InputError: a stored row is damaged. RunError: a row that cannot be computed.
    """
    levels, correlation, logits = 0, 1.0, 0.0 if store.has_logits else None
    scale, delta = 0.0, 0.0
    size = store.provenance.batch_images
    for batch in [indices[start : start + size] for start in range(0, len(indices), size)]:
        rows = maker.rows(batch, [maker.read(index) for index in batch])
        kept = rows_at(store.path, store.provenance, batch)  # from the shards: the cache would copy all of the store
        for index, row, cells in zip(batch, rows, kept, strict=True):
            there = read_row(cells, store.provenance, f"row {index} of map store {str(store.path)!r}")
            if row.logits is not None and there.logits is not None and logits is not None:
                largest = max(np.abs(there.logits).max(), 1e-30)
                logits = max(logits, float(np.abs(row.logits - there.logits).max() / largest))
            if store.provenance.options.has_maps:
                stored, found = there.map.astype(int), row.map.astype(int)
                levels = max(levels, int(np.abs(stored - found).max()))
                pair = (torch.from_numpy(each)[None] for each in (stored, found))
                correlation = min(correlation, float(map_correlation(*pair)))
                scale = max(scale, abs(there.scale - row.scale) / max(there.scale, row.scale, 1e-30))
                gap = abs(there.convergence_delta - row.convergence_delta)
                delta = max(delta, gap / max(1.0, abs(there.convergence_delta)))
    return Recomputed(levels, correlation, logits, scale, delta)
