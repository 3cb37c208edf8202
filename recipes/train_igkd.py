"""Distil a student with integrated-gradients overlays: teacher -> maps -> student -> evaluate -> report.

    accelerate launch recipes/train_igkd.py                                   # the digits demo, two CPU cores, minutes
    accelerate launch recipes/train_igkd.py --config recipes/configs/cifar10_cpu.yaml
    accelerate launch recipes/train_igkd.py --name mine --dataset user/images \\
        --teacher resnet50 --teacher-epochs 0 --student resnet18 --train-crop rrc

Everything is written under runs/<name>/. A stage whose output is complete is skipped; --resume goes on after a kill.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.utils.data
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from augmentation import train_transform
from splits import cut_validation, load_split
from stages import Stage, Stages
from timm_igkd import IGDistillationTask, IGOverlay, IGOverlayDataset, MapStore, compute_maps, evaluate, truncate
from timm_igkd.attribution.freed_memory import keep_freed_memory
from timm_igkd.cli.commands import overlay_samples
from timm_igkd.cli.exit_codes import run_reporting_errors
from timm_igkd.environment import environment
from timm_igkd.errors import InputError
from timm_igkd.evaluation.metrics import write_metrics
from timm_igkd.evaluation.onnx_latency import onnx_metrics
from timm_igkd.files import read_json, remove_abandoned, write_json
from timm_igkd.models.loading import class_indices, load_model, needs_plugin, save_model, use_image_size
from timm_igkd.random_streams import derive_seed, seeded
from timm_igkd.report.page import write_report
from timm_igkd.report.run_files import write_predictions
from timm_igkd.report.sections import collect_disagreements
from timm_igkd.runs.parsing import parse_config, save_config
from train_config import EVALUATE_FIELDS, MAPS_FIELDS, STUDENT_FIELDS, TEACHER_FIELDS, TRAINING_FIELDS, TrainConfig
from training import Trainer, create_train_loader, create_validation_loader


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
        if len(self.accelerator.log_with) < len(config.trackers):
            raise InputError(
                f"trackers {' '.join(config.trackers)} are not all installed; pip install them, or leave them out"
            )
        self.train = load_split(config, config.train_split, config.train_limit)
        self.num_classes = self.train.num_classes
        self.fitting, self.validation = cut_validation(config, self.train)
        self.stages = Stages(self.folder, config, self.accelerator, self._stages())

    def _stages(self) -> list[Stage]:
        config = self.config
        teacher_fields = TEACHER_FIELDS + (TRAINING_FIELDS if config.teacher_epochs else ())
        maps_fields = teacher_fields + MAPS_FIELDS
        student_fields = tuple(dict.fromkeys(maps_fields + TRAINING_FIELDS + STUDENT_FIELDS))
        test_fields = student_fields + EVALUATE_FIELDS
        maps = [Stage("maps", maps_fields, self.maps)] if config.needs_maps else []
        return [
            Stage("teacher", teacher_fields, self.teacher, partial=self.folder / "teacher_training" / "last.pt"),
            *maps,
            Stage("student", student_fields, self.student, partial=self.folder / "student_training" / "last.pt"),
            Stage("evaluate", test_fields, self.evaluate),
            Stage("report", test_fields, self.report),
        ]

    def main(self) -> None:
        """Check everything, then run all stages in order."""
        pending = {stage.name for stage in self.stages.pending()}
        if "student" in pending:
            self._check_models()
        self.accelerator.wait_for_everyone()
        if pending and self.accelerator.is_main_process:
            self._remove_unfinished(pending)
            save_config(self.config, self.folder / "config.yaml")
            launch = {"command": " ".join(sys.argv)} | self.stages.launch()
            write_json(self.folder / "environment.json", environment() | launch)
        if pending and self.config.trackers:
            wandb = {"dir": str(self.folder)}  # tensorboard's files go there too
            self.accelerator.init_trackers(self.config.name, init_kwargs={"wandb": wandb})
        self.stages.run()
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            self._print_usage()

    def _check_models(self) -> None:
        """Build everything with random weights, so that what does not fit ends the run before anything is written."""
        teacher = self._create_teacher(pretrained=False)
        student = self._create_student(lambda: teacher)
        self._create_task(student, teacher)
        train_transform(self.config, resolve_model_data_config(student))
        create_train_loader(self.fitting, self.config, self.accelerator.num_processes)

    def _remove_unfinished(self, pending: set[str]) -> None:
        """Drop what a killed process left of stages without a marker, so that nothing unfinished looks complete."""
        for stage in pending & {"teacher", "student"}:
            for path in (self.folder / stage, *self.folder.glob(f".{stage}-*")):
                shutil.rmtree(path, ignore_errors=True)
        remove_abandoned(self.folder)

    # ---- stages ----

    def teacher(self) -> None:
        """Take the given teacher, or train one from random weights."""
        config = self.config
        model = self._create_teacher(pretrained=config.teacher_epochs == 0)
        if config.teacher_epochs > 0:
            task = IGDistillationTask(model, task_loss_weight=1.0, distill_loss_weight=0, criterion=self._criterion())
            model = self._fit(
                task, IGOverlayDataset(self.fitting, None, seed=config.seed), config.teacher_epochs, "teacher"
            )
        if self.accelerator.is_main_process:
            names = self.train.class_names if self._indices(model) is None else None
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
        keeps_weights = config.student_init == "teacher"
        model = self._create_student(lambda: self._saved("teacher", pretrained=keeps_weights))
        task = self._create_task(model, teacher)
        dataset = IGOverlayDataset(
            self.fitting,
            MapStore(self.folder / "maps") if config.needs_maps else None,
            IGOverlay(config.overlay_prob, config.overlay_weight, config.overlay_max_power),
            teacher_view=config.teacher_view if task.two_view_batches else "same",
            overlay_source=config.overlay_source,
            seed=config.seed,
            with_logits=config.stored_logits,
        )
        model = self._fit(task, dataset, config.epochs, "student")
        if self.accelerator.is_main_process:
            save_model(model, self.folder / "student", label_names=self.train.class_names)

    def evaluate(self) -> None:
        """Read the test split once: metrics.json and predictions.npz."""
        if not self.accelerator.is_main_process:
            return
        config, test = self.config, load_split(self.config, self.config.test_split, self.config.test_limit)
        student, teacher = self._saved("student"), self._saved("teacher")
        indices = self._indices(teacher)
        result = evaluate(
            student,
            test,
            teacher=teacher,
            teacher_class_indices=indices,
            num_workers=config.workers,
            corruptions=config.corruptions,
        )
        metrics = result.metrics | {"needs_plugin": needs_plugin(student)} | onnx_metrics(student)
        write_metrics(self.folder / "metrics.json", metrics)
        names = test.class_names or tuple(str(label) for label in range(self.num_classes))
        write_predictions(self.folder / "predictions.npz", result, names, teacher_class_indices=indices)

    def report(self) -> None:
        """Write the page of the run."""
        if not self.accelerator.is_main_process:
            return
        self._add_wall_times()
        test = load_split(self.config, self.config.test_split, self.config.test_limit)
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

    def _create_teacher(self, pretrained: bool) -> nn.Module:
        """Return the teacher, checked against the dataset's classes, or one of random weights."""
        config, is_given = self.config, self.config.teacher_epochs == 0
        with seeded(derive_seed(config.seed, "init teacher")):
            model = load_model(
                config.teacher,
                model_args=config.teacher_args,
                checkpoint=config.teacher_checkpoint if pretrained else None,
                mean=config.teacher_mean,
                std=config.teacher_std,
                num_classes=None if is_given else self.num_classes,
                role="teacher",
                pretrained=pretrained,
            )
        if not is_given:
            self._set_input_size(model)
        self._indices(model)
        return model

    def _create_student(self, create_teacher: Callable[[], nn.Module]) -> nn.Module:
        """Return the student before training; `create_teacher` makes the teacher that is truncated."""
        config = self.config
        with seeded(derive_seed(config.seed, "init student")):
            if config.student is None:
                return truncate(create_teacher(), config.student_drop, num_classes=self.num_classes)
            model = load_model(
                config.student, pretrained=False, model_args=config.student_args, num_classes=self.num_classes
            )
        self._set_input_size(model)
        return model

    def _create_task(self, student: nn.Module, teacher: nn.Module) -> IGDistillationTask:
        config, live = self.config, self.config.needs_live_teacher
        return IGDistillationTask(
            student,
            teacher if live else None,
            self._criterion(),
            loss_type=config.loss_type,
            distill_loss_weight=config.distill_loss_weight,
            task_loss_weight=config.task_loss_weight,
            temperature=config.temperature,
            attention_loss_weight=config.attention_loss_weight,
            teacher_class_indices=self._indices(teacher) if live else None,
            teacher_view=config.teacher_view if live and config.overlay_prob > 0 else "same",
        )

    def _set_input_size(self, model: nn.Module) -> None:
        width, height = self.train.read(0)[0].size
        use_image_size(model, height, width)

    def _criterion(self) -> nn.Module | None:
        if self.config.mixup > 0 or self.config.cutmix > 0:
            return None
        return nn.CrossEntropyLoss(label_smoothing=self.config.smoothing)

    def _indices(self, teacher: nn.Module) -> list[int] | None:
        return class_indices(teacher, self.train.class_names, self.num_classes)

    def _saved(self, name: str, pretrained: bool = True) -> nn.Module:
        return load_model(f"local-dir:{self.folder / name}", role=name, pretrained=pretrained)

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


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; bad input is one line and exit code 2."""

    def run() -> None:
        keep_freed_memory()
        Run(parse_config(TrainConfig, sys.argv[1:] if argv is None else argv, description=__doc__)).main()

    return run_reporting_errors(run, "train_igkd")


if __name__ == "__main__":
    raise SystemExit(main())
