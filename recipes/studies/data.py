"""What the runs of a study share: teacher, maps, training images on the device, test images and their corruptions."""

import copy
import io
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor, nn

from studies.cells import Cell, store_options
from studies.config import StudyConfig
from studies.latencies import Latencies
from studies.map_means import maps_means
from studies.prediction import Evaluated, predict
from timm_igkd import MapStore, compute_maps, load_labeled_images
from timm_igkd.data.items import read_item
from timm_igkd.data.labeled_images import LabeledImages
from timm_igkd.data.labels import stratified_indices
from timm_igkd.errors import InputError
from timm_igkd.evaluation.corruptions import corrupt
from timm_igkd.files import exclusive, hash_files, write_atomic
from timm_igkd.models.loading import count_macs, weights_hash
from timm_igkd.models.output_names import class_indices
from timm_igkd.overlay.controls import derangement
from timm_igkd.overlay.device_images import DeviceImages, StoredMaps, derange_logits, load_images
from timm_igkd.random_streams import derive_seed, seeded
from timm_igkd.runs.models import create_student, create_teacher

VALIDATION_SHARE = 0.1


class StudyData:
    """Data and teacher of one study on one device; each part is read when a run first needs it.

    Args:
        config: of the study.
        device: where images and models are kept.
    """

    def __init__(self, config: StudyConfig, device: torch.device):
        self.config, self.device = config, device
        self.work = Path(config.work_dir)
        self._corrupted: dict[tuple[str, int], Tensor] = {}
        self._training: dict[tuple[Any, ...], DeviceImages] = {}
        self._latencies = Latencies(self.work, device)
        self._stores: dict[str, MapStore] = {}
        self._identities: dict[str, dict[str, str]] = {}
        self._stored: dict[str, StoredMaps] = {}

    # ---- models ----

    @cached_property
    def teacher(self) -> nn.Module | None:
        """The trained teacher on the device, or None."""
        model = self._create_teacher(pretrained=True)
        return None if model is None else model.to(self.device).eval()

    def _create_teacher(self, pretrained: bool) -> nn.Module | None:
        return None if self.config.teacher is None else create_teacher(self.config, pretrained=pretrained)

    def create_student(self, cell: Cell, seed: int) -> nn.Module:
        """Return a student of random weights that only (cell's architecture, seed) decide."""

        def architecture() -> nn.Module:
            return create_teacher(self.config, pretrained=False)

        height, width = self._train_images.images.shape[-2:]
        return create_student(
            cell.student,
            cell.student_args,
            cell.drop,
            architecture,
            num_classes=self.train.num_classes,
            image_size=(height, width),
            seed=seed,
        )

    @cached_property
    def teacher_hash(self) -> str | None:
        """Short hash of the teacher's weights."""
        return None if self.teacher is None else weights_hash(self.teacher)[:12]

    def maps_identity(self, cell: Cell) -> dict[str, str]:
        """Return hash and means of the maps that a cell reads, as columns of a row; nothing where it reads none."""
        name = cell.store_read
        if name is None:
            return {}
        if name not in self._identities:
            store = self._maps(name)
            files = hash_files(sorted(store.path.glob("data/*.parquet")))[:12]
            self._identities[name] = {"maps_hash": files, "maps_means": maps_means(store)}
        return self._identities[name]

    @cached_property
    def teacher_macs(self) -> int:
        """Multiply-adds of the teacher for one image."""
        assert self.teacher is not None
        return count_macs(self.teacher)

    # ---- training images ----

    @cached_property
    def train(self) -> Any:
        """The training split as a dataset of PIL images."""
        return self._split(self.config.train_split, self.config.train_limit)

    def _split(self, split: str, limit: int | None) -> Any:
        images = load_labeled_images(self.config.dataset, split, revision=self.config.revision)
        return images.subset(range(min(limit, len(images)))) if limit else images

    def _ordered(self, images: LabeledImages) -> LabeledImages:
        """Return images whose labels count the training split's classes, brought to their order by name."""
        return images if self.train.class_names is None else images.in_class_order(self.train.class_names)

    @cached_property
    def _train_images(self) -> DeviceImages:
        return load_images(self.train)

    @cached_property
    def _held_out(self) -> Tensor:
        """Rows of the training split that hyperparameters are chosen by, the same for all seeds."""
        return stratified_indices(self._train_images.labels, VALIDATION_SHARE, seed=0)

    @cached_property
    def data_hash(self) -> str:
        """Hash of all training and test pixels and labels."""
        return _hash_images(self._train_images, self.test.images)

    @cached_property
    def transfer_hash(self) -> str | None:
        """Hash of the transfer pixels and labels, as they are evaluated on; None where there are none."""
        return None if self.transfer is None else _hash_images(self.transfer.images)

    def prepare(self) -> None:
        """Build the maps that the study's cells read; other processes of the study wait."""
        cells = self.config.cells.values()
        if self.config.evaluate_on == "test":
            self._test_split.content_hash()  # what is wrong with it is told before maps are built
        self._check_classes()
        with exclusive(self.work / "prepare.lock"):
            _ = self.test, self.transfer  # the teacher's logits are kept for all processes
            for name in ("corruption_images", "ig_images"):
                self._check_first_images(name)
            needed = {cell.store for cell in cells if cell.needs_maps}
            for name in sorted(needed | {"maps" for cell in cells if cell.needs_stored_logits}):
                self._maps(name)
            for cell in cells if self.config.latency else ():
                self.latency_ms(cell)
            if self.config.latency and self.teacher is not None:
                self.teacher_latency_ms()

    def _check_first_images(self, name: str) -> None:
        """Refuse first test images that lack classes where these come one after the other, as those of a folder do."""
        labels, number = self.test.images.labels, getattr(self.config, name)
        there, classes = len(labels[:number].unique()), len(labels.unique())
        is_sorted = int((labels[1:] != labels[:-1]).sum()) == classes - 1
        if is_sorted and number and there < min(number, classes):
            raise InputError(
                f"the first {number} test images ({name}) hold {there} of {classes} classes: they come class by class; "
                f"set {name} to {len(labels)} for all, or give images in mixed order"
            )

    def _maps(self, name: str) -> MapStore:
        """Return a store, built where it is missing or unfinished; checked once by each process."""
        if name not in self._stores:
            self._stores[name] = self._build_maps(name)
        return self._stores[name]

    def _build_maps(self, name: str) -> MapStore:
        teacher = self.teacher
        if name == "maps_random_teacher":
            with seeded(derive_seed(0, "random teacher")):
                teacher = self._create_teacher(pretrained=False)
        assert teacher is not None
        with exclusive(self.work / f"{name}.lock"):  # so that it is built once
            store = compute_maps(
                copy.deepcopy(teacher),
                self.train,
                self.work / name,
                options=store_options(name, self.config.n_steps),
                logits=True,
                teacher_name=self.config.teacher,
            )
        assert store is not None  # one process builds all shards
        return store

    def _check_classes(self) -> None:
        if self.teacher is not None and class_indices(self.teacher, self.train.class_names, self.train.num_classes):
            raise InputError(
                f"the teacher's classes must be the dataset's {self.train.num_classes}, in their order; "
                f"give a teacher of {self.config.dataset}"
            )

    def _stored_maps(self, name: str) -> StoredMaps:
        if name not in self._stored:
            self._stored[name] = StoredMaps(self._maps(name), self.train, self._train_images)
        return self._stored[name]

    def training_images(self, cell: Cell, seed: int) -> DeviceImages:
        """Return what one run trains on, on the device."""
        source = (cell.store, cell.overlay_source) if cell.needs_maps else None
        key = (source, cell.logits if cell.needs_stored_logits else None, cell.subset_fraction, seed)
        if key not in self._training:
            self._training = {key: self._assemble(cell, seed)}  # only the last: a study goes seed by seed
        return self._training[key]

    def _assemble(self, cell: Cell, seed: int) -> DeviceImages:
        data = self._train_images
        if cell.needs_maps:
            data = replace(data, maps=self._stored_maps(cell.store).maps(cell.control, seed))
        if cell.needs_stored_logits:
            data = replace(data, logits=self._stored_maps("maps").logits())
            if cell.logits == "shuffled":
                others = derangement(len(data), derive_seed(seed, "logits"))
                data = derange_logits(data, torch.from_numpy(others))
        kept = torch.arange(len(data))
        if self.config.evaluate_on == "validation":
            kept = kept[~torch.isin(kept, self._held_out)]
        if cell.subset_fraction < 1:
            kept = kept[stratified_indices(data.labels[kept], cell.subset_fraction, seed)]
        return data.subset(kept).to(self.device)

    # ---- images to evaluate on ----

    @cached_property
    def test(self) -> Evaluated:
        """The test split, or the validation images cut from the training split."""
        if self.config.evaluate_on == "validation":
            return self._evaluated(self._train_images.subset(self._held_out))
        return self._evaluated(load_images(self._test_split))

    @cached_property
    def _test_split(self) -> LabeledImages:
        return self._ordered(self._split(self.config.test_split, self.config.test_limit))

    @cached_property
    def transfer(self) -> Evaluated | None:
        """Other images of the same classes, resized to the training images' size; None where there are none."""
        if self.config.transfer_dataset is None:
            return None
        dataset = self._ordered(load_labeled_images(self.config.transfer_dataset, self.config.transfer_split))
        height, width = self._train_images.images.shape[-2:]
        pixels, labels = [], []
        for image, label in (read_item(dataset, index) for index in range(len(dataset))):
            pixels.append(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)))
            labels.append(label)
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        return self._evaluated(DeviceImages(images, torch.tensor(labels)))

    def _evaluated(self, images: DeviceImages) -> Evaluated:
        images = images.to(self.device)
        return Evaluated(images, None if self.teacher is None else self._teacher_logits(images.images))

    def _teacher_logits(self, images: Tensor) -> Tensor:
        """Return the teacher's logits, computed once for all processes of the study."""
        assert self.teacher is not None
        content = xxhash.xxh3_64_hexdigest(images.cpu().numpy().tobytes())
        path = self.work / "teacher_logits" / f"{self.teacher_hash}-{content}.npy"
        if not path.exists():
            buffer = io.BytesIO()
            np.save(buffer, predict(self.teacher, images).cpu().numpy())
            write_atomic(path, buffer.getvalue())
        return torch.from_numpy(np.load(path)).to(self.device)

    def latency_ms(self, cell: Cell) -> dict[str, float]:
        """Return a student's median latency at batch 1 and 64, as the columns of a row."""
        key = [cell.student, cell.student_args, cell.drop]
        return self._latencies.latency_ms(key, lambda: self.create_student(cell, 0))

    def teacher_latency_ms(self) -> dict[str, float]:
        """Return the teacher's median latency at batch 1 and 64, as the columns of a row."""
        assert self.teacher is not None
        teacher = self.teacher
        found = self._latencies.latency_ms(["teacher", self.teacher_hash], lambda: teacher)
        return {f"teacher_{name}": value for name, value in found.items() if name != "latency_threads"}

    def corrupted(self, kind: str, severity: int) -> Tensor:
        """Return the first test images under a corruption, [n, 3, H, W] uint8; the same for every run."""
        if (kind, severity) not in self._corrupted:
            clean = self.test.images.images[: self.config.corruption_images]
            self._corrupted[kind, severity] = corrupt(clean, kind, severity)
        return self._corrupted[kind, severity]


def _hash_images(*parts: DeviceImages) -> str:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part.images.cpu().numpy().tobytes())
        digest.update(part.labels.cpu().numpy().tobytes())
    return digest.hexdigest()
