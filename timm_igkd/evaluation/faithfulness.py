"""How faithful maps are: the teacher's probability while pixels are deleted, or inserted, in the order of a map.

A map that ranks the pixels well makes the probability fall early when they are deleted and rise early when they are
inserted. Neither curve is a verdict alone: scattered pixels disturb a network by themselves, whatever they showed, so
random maps, edges and the centre of the same images stand beside.

Source: Petsiuk et al. 2018 (1806.07421). Deleted pixels get the teacher's mean colour, inserted ones come into the
blurred image, as there; deviations: the blur's sigma is a sixteenth of the longer side (there 11 taps of sigma 5 at
224 pixels), and pixels go in `steps` equal shares (there one row's worth at a time).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from timm_igkd.attribution.chunk_pool import one_thread
from timm_igkd.attribution.chunk_size import activation_chunk, images_per_batch
from timm_igkd.attribution.engine import FastEngine
from timm_igkd.attribution.ig_options import IGOptions
from timm_igkd.attribution.options import TeacherView, gaussian_blur
from timm_igkd.attribution.teacher_copy import teacher_copy
from timm_igkd.data.items import known_labels, read_item, refuse_overlaid, row_name
from timm_igkd.data.labels import evenly_spread
from timm_igkd.errors import check_count, check_images, check_range, check_whole
from timm_igkd.eval_mode import bare_model, check_model
from timm_igkd.intervals import Interval, mean_interval
from timm_igkd.maps.build import check_teacher, package_versions
from timm_igkd.maps.manifest import Provenance
from timm_igkd.maps.scores import CONTROLS, Faithfulness, MapScore, ScoredMaps
from timm_igkd.maps.store import MapStore
from timm_igkd.overlay.blend import OverlaySource
from timm_igkd.overlay.controls import control_map
from timm_igkd.overlay.overlaid_views import check_store
from timm_igkd.progress import progress_bar

Curves = tuple[Tensor, Tensor]
"""Deletion and insertion, [N, steps + 1] each."""

_SOURCES: dict[str, OverlaySource] = {"random": "noise", "sobel": "sobel"}
_CHUNKS = 4  # of the engine, made at a time: enough for its workers, few enough to stay in memory


def pixel_order(maps: Tensor) -> Tensor:
    """Return the pixels of maps [B, H, W] from the highest, [B, H * W] int64; equal ones in reading order."""
    return maps.flatten(1).argsort(dim=1, descending=True, stable=True)


def replacement_curve(
    logits: Callable[[Tensor], Tensor],
    before: Tensor,
    after: Tensor,
    targets: Tensor,
    order: Tensor,
    steps: int,
    batch_size: int = 64,
) -> Tensor:
    """Return the targets' probabilities while the pixels of `before` are replaced by those of `after`.

    Args:
        logits: a classifier, [P, C, H, W] to [P, classes].
        before: [B or 1, C, H, W].
        after: [B or 1, C, H, W].
        targets: [B] int64.
        order: [B, H * W], see `pixel_order`.
        steps: equal shares that the pixels are replaced in.
        batch_size: images per call of `logits`.

    Returns:
        [B, steps + 1]; the first of `before`, the last of `after`.
    """
    count, pixels = order.shape
    before, after = (images.expand(count, -1, -1, -1) for images in (before, after))
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(pixels, device=order.device).expand_as(order))
    replaced = (torch.arange(steps + 1, device=order.device) * pixels / steps).round()
    found = []
    for pairs in torch.arange(count * (steps + 1), device=order.device).split(batch_size):
        image, step = pairs // (steps + 1), pairs % (steps + 1)
        is_replaced = (rank[image] < replaced[step, None]).view(-1, 1, *before.shape[2:])
        probabilities = logits(torch.where(is_replaced, after[image], before[image])).softmax(-1)
        found.append(probabilities.gather(1, targets[image, None])[:, 0])
    return torch.cat(found).view(count, steps + 1)


def area_under(curves: Tensor) -> Tensor:
    """Return the area under curves [N, steps + 1] over the share of pixels from 0 to 1, [N]: the trapezoid rule."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


def centre_map(height: int, width: int) -> Tensor:
    """Return a Gaussian of a quarter of each side around the centre, [height, width] float32."""
    y, x = ((torch.arange(side) + 0.5) / side - 0.5 for side in (height, width))
    return torch.exp(-8 * (y[:, None] ** 2 + x[None] ** 2))


def score_maps(
    store: MapStore,
    teacher: nn.Module,
    dataset: Any,
    *,
    limit: int | None = None,
    steps: int = 24,
    seed: int = 0,
    progress: bool = True,
) -> Faithfulness:
    """Score a store's maps by deletion and insertion, beside random, Sobel and centre maps of the same images.

    Args:
        store: of this teacher and data set.
        teacher: whose probability is followed, of each image's label or, as the store has it, of the predicted class.
        dataset: map-style dataset of (PIL image, label).
        limit: images, at least 2, evenly spread over those that have a map; None: all.
        steps: equal shares that the pixels are replaced in.
        seed: of the random maps.
        progress: show a progress bar.

    Returns:
        The areas under both curves, for the maps and each control, with their paired differences.

    Raises:
        InputError: another teacher than the one that made the maps, images without a map, or fewer than 2.
    """
    curves = measure_curves({"own": store}, teacher, dataset, limit=limit, steps=steps, seed=seed, progress=progress)
    return summarize(curves, "own", store.provenance, seed)


def measure_curves(
    stores: Mapping[str, MapStore],
    teacher: nn.Module,
    dataset: Any,
    *,
    limit: int | None = None,
    steps: int = 24,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Curves]:
    """Return the curves of each store by its name and of each control, all of the same images; see `score_maps`."""
    check_model("teacher", bare_model(teacher))
    check_images("dataset", dataset)
    refuse_overlaid(dataset)
    steps = check_count("steps", steps, most=10_000)
    limit = None if limit is None else check_whole("limit", limit)
    for store in stores.values():
        check_store("store", store)
        store.require_maps()
        check_teacher(store.provenance, teacher)
    total = min(len(dataset), *(len(store) for store in stores.values()))
    count = total if limit is None else min(limit, total)
    check_range("images to score", count, 2)
    labels = known_labels(dataset)
    indices = evenly_spread(total, count, None if labels is None else labels[:total])
    scorer = _Scorer(stores, teacher, dataset, steps, seed)
    parts = []
    # The engine has its own threads; of the small work between its calls a busy machine makes more wait than work.
    with one_thread(), progress_bar(total=count, desc="score", unit="img", show=progress) as bar:
        for start in range(0, count, scorer.batch_images):
            parts.append(scorer.curves(indices[start : start + scorer.batch_images]))
            bar.update(min(scorer.batch_images, count - start))
    return {
        name: (torch.cat([part[name][0] for part in parts]), torch.cat([part[name][1] for part in parts]))
        for name in parts[0]
    }


class _Scorer:
    """Measures the curves of some images, see `measure_curves`."""

    def __init__(self, stores: Mapping[str, MapStore], teacher: nn.Module, dataset: Any, steps: int, seed: int):
        self.stores, self.dataset, self.steps, self.seed = stores, dataset, steps, seed
        self.first = next(iter(stores.values()))
        model = teacher_copy(teacher)
        self.view = TeacherView(model)
        self.device = PartialState(cpu=not torch.cuda.is_available()).device
        shape = self.view.shape
        self.chunk = activation_chunk(model, shape, torch.device("cpu"))
        self.batch_images = images_per_batch(shape, torch.device("cpu"))
        self.engine = FastEngine(model, IGOptions(), self.chunk, shape, self.device)

    def curves(self, indices: list[int]) -> dict[str, Curves]:
        """Return the curves of the images of these indices, by the maps' name."""
        inputs, labels, maps = self._read(indices)
        targets = self._targets(inputs, labels)
        deleted, blurred = torch.zeros_like(inputs[:1]), gaussian_blur(inputs, max(self.view.size) / 16)
        found = {}
        for name, values in maps.items():
            order = pixel_order(values.to(self.device))
            sides = ((inputs, deleted), (blurred, inputs))
            deletion, insertion = (
                replacement_curve(self.engine.forward, *side, targets, order, self.steps, _CHUNKS * self.chunk).cpu()
                for side in sides
            )
            found[name] = deletion, insertion
        return found

    def _read(self, indices: list[int]) -> tuple[Tensor, list[int], dict[str, Tensor]]:
        """Return the teacher's views [B, C, H, W], the labels, and maps of each kind [B, H, W]."""
        size, views, labels = self.view.size, [], []
        maps: dict[str, list[Tensor]] = {name: [] for name in (*self.stores, *CONTROLS)}
        for index in indices:
            image, label = read_item(self.dataset, index)
            for name, store in self.stores.items():
                row = store.find(image, label, index, partial(row_name, self.dataset, index))
                maps[name].append(_enlarged(torch.from_numpy(store.levels(row).copy()).float(), size))
            if image.size != size[::-1]:  # controls are of what the teacher sees
                image = image.resize(size[::-1], self.view.interpolation)
            for name, source in _SOURCES.items():
                control = control_map(self.first, index, image, source, self.seed)
                maps[name].append(torch.from_numpy(np.array(control)).float())
            maps["centre"].append(centre_map(*size))
            views.append(self.view(image))
            labels.append(label)
        return torch.stack(views).to(self.device), labels, {name: torch.stack(each) for name, each in maps.items()}

    def _targets(self, inputs: Tensor, labels: list[int]) -> Tensor:
        provenance = self.first.provenance
        if provenance.options.target == "predicted":
            return self.engine.forward(inputs).argmax(1)
        outputs = provenance.teacher.class_indices
        return torch.tensor([outputs[label] for label in labels] if outputs else labels, device=self.device)


def _enlarged(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a map [h, w] at the size of the teacher's input."""
    same = values.shape == torch.Size(size)
    return values if same else F.interpolate(values[None, None], size=size, mode="bilinear")[0, 0]


def summarize(curves: Mapping[str, Curves], own: str, provenance: Provenance, seed: int) -> Faithfulness:
    """Return the record of the store called `own` among curves of the same images, beside the controls."""
    areas = {name: [area_under(each.double()) for each in both] for name, both in curves.items()}
    names: dict[ScoredMaps, str] = {"own": own, **{name: name for name in CONTROLS}}

    def gaps(name: str) -> list[Interval | None]:
        pairs = zip(areas[own], areas[name], strict=True)
        return [None if name == own else mean_interval((mine - other).tolist()) for mine, other in pairs]

    def score(kind: ScoredMaps, name: str) -> MapScore:
        deletion, insertion = (tuple(each.double().mean(0).tolist()) for each in curves[name])
        both, (deletion_gap, insertion_gap) = [mean_interval(area.tolist()) for area in areas[name]], gaps(name)
        return MapScore(
            maps=kind,
            deletion=both[0],
            insertion=both[1],
            deletion_gap=deletion_gap,
            insertion_gap=insertion_gap,
            deletion_curve=deletion,
            insertion_curve=insertion,
        )

    count, points = curves[own][0].shape
    return Faithfulness(
        options=provenance.options,
        weights_sha256=provenance.teacher.weights_sha256,
        keys_hash=provenance.keys_hash,
        n=count,
        steps=points - 1,
        deleted="the teacher's mean colour",
        inserted_into="the image blurred, sigma a sixteenth of its longer side",
        seed=seed,
        scores=tuple(score(kind, name) for kind, name in names.items()),
        versions=package_versions(),
    )
