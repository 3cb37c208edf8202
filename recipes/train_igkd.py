"""Distil a student with integrated-gradients overlays: teacher -> maps -> student -> evaluate -> report.

    accelerate launch recipes/train_igkd.py                                   # the digits demo, two CPU cores, minutes
    accelerate launch recipes/train_igkd.py --config recipes/configs/cifar10_cpu.yaml
    accelerate launch recipes/train_igkd.py --name mine --dataset user/images --teacher resnet50 --teacher_epochs 0 \
        --student resnet18 --overlay_prob 0.1

Everything is written under runs/<name>/. A stage whose output is complete is skipped; --resume goes on after a kill.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.utils.data
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from stages import Stages
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision import transforms
from train_config import EVALUATE_FIELDS, MAPS_FIELDS, STUDENT_FIELDS, TEACHER_FIELDS, TRAINING_FIELDS, TrainConfig
from training import Trainer, create_validation_loader

from timm_igkd import IGDistillationTask, IGOverlay, IGOverlayDataset, MapStore, compute_maps, evaluate, truncate
from timm_igkd.cli import run_reporting_errors
from timm_igkd.commands import overlay_samples
from timm_igkd.config import parse_config, save_config
from timm_igkd.data import LabeledImages, class_names, load_labeled_images
from timm_igkd.environment import environment
from timm_igkd.errors import InputError
from timm_igkd.evaluation import write_metrics
from timm_igkd.model_loading import class_indices, load_model, needs_plugin, save_model
from timm_igkd.random_streams import derive_seed, generator, seeded
from timm_igkd.report import write_report
from timm_igkd.report_sections import collect_disagreements
from timm_igkd.run_files import write_predictions
from timm_igkd.store_files import read_json, write_json


class Run:
    """One run: its settings, its folder, and what its stages share."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = Path(config.output_dir) / config.name
        self.accelerator = Accelerator(
            gradient_accumulation_steps=config.grad_accum_steps,
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(self.folder)),
            cpu=not torch.cuda.is_available(),
        )
        self.train = self._images(config.train_split, config.train_limit)
        self.num_classes = self.train.num_classes
        self.fitting, self.validation = self._cut_validation()
        self.stages = Stages(self.folder, config, self.accelerator)

    def _images(self, split: str, limit: int | None) -> LabeledImages:
        c = self.config
        images = load_labeled_images(c.dataset, split, c.image_column, c.label_column, c.revision, c.data_dir)
        return images.subset(range(min(limit, len(images)))) if limit else images

    def _cut_validation(self) -> tuple[LabeledImages, LabeledImages | None]:
        """Return the images to fit and those to choose by: a split of its own, or a stratified part of the training images."""
        config = self.config
        if config.validation_split is not None:
            return self.train, self._images(config.validation_split, None)
        if config.validation_fraction == 0:
            return self.train, None
        labels, held_out = self.train.labels, []
        for label in np.unique(labels):
            rows = np.flatnonzero(labels == label)
            count = round(config.validation_fraction * len(rows))
            held_out += generator(config.seed, "validation", int(label)).permutation(rows)[:count].tolist()
        fitting = np.setdiff1d(np.arange(len(labels)), held_out)
        return self.train.subset(fitting), self.train.subset(sorted(held_out))

    def main(self) -> None:
        """Run all stages in order."""
        config, stages = self.config, self.stages
        if self.accelerator.is_main_process:
            save_config(config, self.folder / "config.yaml")
            write_json(self.folder / "environment.json", environment() | {"command": " ".join(sys.argv)})
        if config.trackers:
            self.accelerator.init_trackers(config.name)
        self._remove_unfinished()
        teacher_fields = TEACHER_FIELDS + (TRAINING_FIELDS if config.teacher_epochs else ())
        stages.run("teacher", teacher_fields, self.teacher, partial=self.folder / "teacher_training" / "last.pt")
        maps_fields = teacher_fields + MAPS_FIELDS
        if config.needs_maps:
            stages.run("maps", maps_fields, self.maps)
        student_fields = tuple(dict.fromkeys(maps_fields + TRAINING_FIELDS + STUDENT_FIELDS))
        stages.run("student", student_fields, self.student, partial=self.folder / "student_training" / "last.pt")
        stages.run("evaluate", student_fields + EVALUATE_FIELDS, self.evaluate)
        stages.run("report", student_fields + EVALUATE_FIELDS, self.report)
        if config.trackers:
            self.accelerator.end_training()
        self._print_usage()

    def _remove_unfinished(self) -> None:
        """Drop model folders of stages without a marker, so that nothing unfinished looks complete."""
        if not self.accelerator.is_main_process:
            return
        for stage in ("teacher", "student"):
            if not (self.folder / ".stages" / f"{stage}.json").exists():
                shutil.rmtree(self.folder / stage, ignore_errors=True)

    # ---- stages ----

    def teacher(self) -> None:
        """Take the given teacher, or train one from random weights."""
        config = self.config
        options: dict[str, Any] = dict(model_args=config.teacher_args, mean=config.teacher_mean, std=config.teacher_std)
        if config.teacher_epochs == 0:
            model = load_model(config.teacher, checkpoint=config.teacher_checkpoint, role="teacher", **options)
            class_indices(model, self.train.class_names, self.num_classes)
        else:
            with seeded(derive_seed(config.seed, "init teacher")):
                model = load_model(
                    config.teacher, pretrained=False, num_classes=self.num_classes, role="teacher", **options
                )
            self._set_input_size(model)
            task = IGDistillationTask(model, task_loss_weight=1.0, distill_loss_weight=0, criterion=self._criterion())
            model = self._fit(task, IGOverlayDataset(self.fitting, None, seed=config.seed), config.teacher_epochs, "teacher")
        if self.accelerator.is_main_process:
            names = self.train.class_names if model.num_classes == self.num_classes else None
            save_model(model, self.folder / "teacher", label_names=names)

    def maps(self) -> None:
        """Compute the teacher's maps of the training split."""
        compute_maps(
            self._saved("teacher"),
            self.train,
            self.folder / "maps",
            options=self.config.ig_options(),
            engine=self.config.engine,
            map_size=self.config.map_size,
            logits=self.config.stored_logits,
            teacher_name=self.config.teacher,
        )

    def student(self) -> None:
        """Distil the student."""
        config, teacher = self.config, self._saved("teacher")
        model = self._create_student(teacher)
        view = config.teacher_view if config.needs_live_teacher and config.overlay_prob > 0 else "same"
        overlay = IGOverlay(config.overlay_prob, config.overlay_weight, config.overlay_max_power)
        dataset = IGOverlayDataset(
            self.fitting,
            MapStore(self.folder / "maps") if config.needs_maps else None,
            overlay,
            teacher_view=view,
            overlay_source=config.overlay_source,
            seed=config.seed,
            with_logits=config.stored_logits,
        )
        task = IGDistillationTask(
            model,
            teacher if config.needs_live_teacher else None,
            self._criterion(),
            loss_type=config.loss_type,
            distill_loss_weight=config.distill_loss_weight,
            task_loss_weight=config.task_loss_weight,
            temperature=config.temperature,
            attention_loss_weight=config.attention_loss_weight,
            teacher_class_indices=self._indices(teacher) if config.needs_live_teacher else None,
            teacher_view=view,
        )
        model = self._fit(task, dataset, config.epochs, "student")
        if self.accelerator.is_main_process:
            save_model(model, self.folder / "student", label_names=self.train.class_names)

    def evaluate(self) -> None:
        """Read the test split once: metrics.json and predictions.npz."""
        if not self.accelerator.is_main_process:
            return
        config, test = self.config, self._images(self.config.test_split, self.config.test_limit)
        student, teacher = self._saved("student"), self._saved("teacher")
        indices = self._indices(teacher)
        result = evaluate(student, test, teacher=teacher, teacher_class_indices=indices, num_workers=config.workers)
        metrics = result.metrics | {"needs_plugin": needs_plugin(student)}
        write_metrics(self.folder / "metrics.json", metrics)
        names = test.class_names or tuple(str(label) for label in range(self.num_classes))
        write_predictions(self.folder / "predictions.npz", result, names, teacher_class_indices=indices)

    def report(self) -> None:
        """Write the page of the run."""
        if not self.accelerator.is_main_process:
            return
        self._add_wall_times()
        test = self._images(self.config.test_split, self.config.test_limit)
        has_overlay = self.config.overlay_prob > 0
        samples = overlay_samples(MapStore(self.folder / "maps"), self.train, 12) if has_overlay else []
        write_report(self.folder, samples=samples, disagreements=collect_disagreements(self.folder, test))

    # ---- parts of the stages ----

    def _fit(self, task: IGDistillationTask, dataset: IGOverlayDataset, epochs: int, stage: str) -> nn.Module:
        model = task.get_eval_model()
        data_config = resolve_model_data_config(model)
        dataset.transform = train_transform(self.config, data_config)
        validation = create_validation_loader(
            self.validation, create_transform(**data_config), self.config, self.accelerator
        )
        folder, history = self.folder / f"{stage}_training", self.folder / f"{stage}_history.csv"
        trainer = Trainer(task, dataset, validation, self.config, epochs, self.accelerator, folder, history)
        trainer.fit()
        return trainer.final_model()

    def _create_student(self, teacher: nn.Module) -> nn.Module:
        config = self.config
        with seeded(derive_seed(config.seed, "init student")):
            if config.student is not None:
                model = load_model(
                    config.student, pretrained=False, model_args=config.student_args, num_classes=self.num_classes
                )
                self._set_input_size(model)
                return model
            if config.student_init == "teacher":
                return truncate(teacher, config.student_drop, num_classes=self.num_classes)
            shell = timm.create_model(f"local-dir:{self.folder / 'teacher'}", pretrained=False)
            return truncate(shell, config.student_drop, num_classes=self.num_classes)

    def _set_input_size(self, model: nn.Module) -> None:
        """Train a model of random weights at the images' own size where it takes any size."""
        config, (width, height) = model.pretrained_cfg, self.train.read(0)[0].size
        if not config.get("fixed_input_size") and max(width, height) < config["input_size"][1]:
            config.update(input_size=(3, height, width), crop_pct=1.0, test_input_size=None)

    def _criterion(self) -> nn.Module | None:
        if self.config.mixup > 0 or self.config.cutmix > 0:
            return None
        return nn.CrossEntropyLoss(label_smoothing=self.config.smoothing)

    def _indices(self, teacher: nn.Module) -> list[int] | None:
        return class_indices(teacher, self.train.class_names, self.num_classes)

    def _saved(self, name: str) -> nn.Module:
        return load_model(f"local-dir:{self.folder / name}", role=name)

    def _add_wall_times(self) -> None:
        metrics = read_json(self.folder / "metrics.json")
        write_metrics(self.folder / "metrics.json", metrics | {"wall_time_s": self.stages.wall_times()})

    def _print_usage(self) -> None:
        self._add_wall_times()
        student = self.folder / "student"
        self.accelerator.print(f"report: {self.folder / 'report' / 'index.html'}")
        self.accelerator.print("use the student:\n    import timm")
        if needs_plugin(self._saved("student")):
            self.accelerator.print("    import timm_igkd")
        self.accelerator.print(f'    model = timm.create_model("local-dir:{student}", pretrained=True)')


def train_transform(config: TrainConfig, data_config: dict[str, Any]) -> Any:
    """Return the training transform; it ends with a normalised tensor, random erasing included."""
    size = data_config["input_size"][1:]
    if config.train_crop == "rrc":
        return create_transform(
            input_size=data_config["input_size"],
            is_training=True,
            scale=(config.scale_min, 1.0),
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.aa,
            interpolation=data_config["interpolation"],
            mean=data_config["mean"],
            std=data_config["std"],
            re_prob=config.reprob,
            re_mode="pixel",
        )
    steps: list[Any] = [transforms.Resize(size)]
    if config.train_crop == "pad":
        steps.append(transforms.RandomCrop(size, padding=max(1, size[0] // 8)))
    if config.hflip > 0:
        steps.append(transforms.RandomHorizontalFlip(config.hflip))
    if config.aa:
        from timm.data.auto_augment import rand_augment_transform

        steps.append(rand_augment_transform(config.aa, {"img_mean": tuple(round(255 * m) for m in data_config["mean"])}))
    steps += [transforms.ToTensor(), transforms.Normalize(data_config["mean"], data_config["std"])]
    if config.reprob > 0:
        from timm.data.random_erasing import RandomErasing

        steps.append(RandomErasing(config.reprob, mode="pixel", device="cpu"))
    return transforms.Compose(steps)


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; bad input is one line and exit code 2."""

    def run() -> None:
        config = parse_config(TrainConfig, sys.argv[1:] if argv is None else argv, description=__doc__)
        if "/" in config.name or not config.name:
            raise InputError(f"name is a folder under output_dir, not a path, got {config.name!r}")
        Run(config).main()

    return run_reporting_errors(run, "train_igkd")


if __name__ == "__main__":
    raise SystemExit(main())
