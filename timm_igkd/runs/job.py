"""The whole job: teacher -> maps -> student -> evaluate -> report, each stage skipped where it is complete."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from timm_igkd.distillation.task import IGDistillationTask
from timm_igkd.environment import environment
from timm_igkd.errors import InputError
from timm_igkd.evaluation.metrics import evaluate, write_metrics
from timm_igkd.evaluation.onnx_latency import onnx_metrics
from timm_igkd.files import read_json, write_json
from timm_igkd.maps.build import compute_maps
from timm_igkd.maps.store import MapStore
from timm_igkd.models.loading import class_indices, load_model, needs_plugin, save_model, use_image_size
from timm_igkd.overlay.preview import overlay_samples
from timm_igkd.random_streams import derive_seed, seeded
from timm_igkd.report.page import write_report
from timm_igkd.report.run_files import write_predictions
from timm_igkd.report.sections import collect_disagreements
from timm_igkd.runs.batches import choose_batches, create_batches
from timm_igkd.runs.data import RunData
from timm_igkd.runs.folder import RunFolder
from timm_igkd.runs.inputs import RunInputs
from timm_igkd.runs.models import create_student, create_task, create_teacher
from timm_igkd.runs.parsing import save_config
from timm_igkd.runs.settings import RunConfig
from timm_igkd.runs.stages import Stage, Stages
from timm_igkd.training.batch import steps_per_epoch
from timm_igkd.training.trainer import Trainer
from timm_igkd.training.validation import create_validation_loader


def distill(config: RunConfig | None = None) -> Path:
    """Distil a teacher into a student and say what came of it, in one folder.

    Complete stages are skipped; with `resume` a stage that was killed goes on. In a program of several processes
    (`accelerate launch`) every process calls it.

    Args:
        config: the settings; default: the digits demo.

    Returns:
        The run's folder: config.yaml, teacher/, maps/, student/, metrics.json, report/index.html.

    Raises:
        InputError: settings, data and models that do not fit together, found before anything is written; a folder of
            another run; a damaged file.
        RunError: the run could not go on.
    """
    run = Run(config or RunConfig())
    run.main()
    return run.folder.path


class Run:
    """One run: its settings, its folder, and what its stages share.

    Args:
        config: the settings.
    """

    def __init__(self, config: RunConfig):
        self.folder = RunFolder(Path(config.output_dir) / config.name)
        self.accelerator = Accelerator(
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(self.folder.path)),
            cpu=not torch.cuda.is_available(),
        )
        if len(self.accelerator.log_with) < len(config.trackers):
            raise InputError(
                f"trackers {' '.join(config.trackers)} are not all installed; pip install them, or leave them out"
            )
        self.data = RunData(config)
        self.config = config
        if config.batches == "auto":
            self.config = replace(config, batches=self._choose_batches())
        inputs = RunInputs(self.config, self.data, self.folder)
        self.stages = Stages(self.folder.path, self.config, self.accelerator, self._stages(), inputs.of)

    def _choose_batches(self) -> Literal["workers", "device"]:
        """Return what `auto` is: what a finished student was trained by, else what choose_batches finds."""
        found = Stages.finished(self.folder.path, "student")
        if found is not None and found.settings.get("batches") in ("workers", "device"):
            return found.settings["batches"]
        trains_teacher = self.config.teacher_epochs > 0

        def trained() -> Iterator[nn.Module]:
            teacher = self._create_teacher(pretrained=False)
            yield from [teacher] * trains_teacher
            yield self._create_student(lambda: teacher)

        return choose_batches(self.config, self.data, trained(), self.accelerator)

    def _stages(self) -> list[Stage]:
        maps = [Stage("maps", self.maps)] if self.config.needs_maps else []
        return [
            Stage("teacher", self.teacher, partial=self.folder.checkpoint("teacher")),
            *maps,
            Stage("student", self.student, partial=self.folder.checkpoint("student")),
            Stage("evaluate", self.evaluate),
            Stage("report", self.report),
        ]

    def main(self) -> None:
        """Check everything, then run all stages in order."""
        pending = {stage.name for stage in self.stages.pending()}
        if "student" in pending:
            self._check_models()
        self.accelerator.wait_for_everyone()
        if pending and self.accelerator.is_main_process:
            self.folder.remove_unfinished(pending)
            save_config(self.config, self.folder.config)
            launch = {"command": " ".join(sys.argv)} | self.stages.launch()
            write_json(self.folder.environment, environment() | launch)
        if pending and self.config.trackers:
            wandb = {"dir": str(self.folder.path)}  # tensorboard's files go there too
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
        self.config.augmentation().transform(resolve_model_data_config(student))
        steps_per_epoch(len(self.data.fitting), self.config.batch_size, self.accelerator.num_processes)

    # ---- stages ----

    def teacher(self) -> None:
        """Take the given teacher, or train one from random weights."""
        config = self.config
        model = self._create_teacher(pretrained=config.teacher_epochs == 0)
        if config.teacher_epochs > 0:
            task = IGDistillationTask(model, task_loss_weight=1.0, distill_loss_weight=0, criterion=self._criterion())
            model = self._fit(task, None, config.teacher_epochs, "teacher")
        if self.accelerator.is_main_process:
            names = self.data.train.class_names if self._indices(model) is None else None
            save_model(model, self.folder.model("teacher"), label_names=names)

    def maps(self) -> None:
        """Compute the teacher's maps of the training split."""
        compute_maps(
            self._saved("teacher"),
            self.data.train,
            self.folder.maps,
            options=self.config.ig_options(),
            engine=self.config.engine,
            map_size=self.config.map_size,
            logits=self.config.stored_logits,
            teacher_name=self.config.teacher,
        )

    def student(self) -> None:
        """Distil the student."""
        keeps_weights = self.config.student_init == "teacher"
        model = self._create_student(lambda: self._saved("teacher", pretrained=keeps_weights))
        task = self._create_task(model, self._saved("teacher"))
        store = MapStore(self.folder.maps) if self.config.needs_maps else None
        model = self._fit(task, store, self.config.epochs, "student")
        if self.accelerator.is_main_process:
            save_model(model, self.folder.model("student"), label_names=self.data.train.class_names)

    def evaluate(self) -> None:
        """Read the test split once: metrics.json and predictions.npz."""
        if not self.accelerator.is_main_process:
            return
        test, student, teacher = self.data.test, self._saved("student"), self._saved("teacher")
        indices = self._indices(teacher)
        result = evaluate(
            student,
            test,
            teacher=teacher,
            teacher_class_indices=indices,
            num_workers=self.config.workers,
            corruptions=self.config.corruptions,
        )
        metrics = result.metrics | {"needs_plugin": needs_plugin(student)} | onnx_metrics(student)
        write_metrics(self.folder.metrics, metrics)
        names = test.class_names or tuple(str(label) for label in range(self.data.num_classes))
        write_predictions(self.folder.predictions, result, names, teacher_class_indices=indices)

    def report(self) -> None:
        """Write the page of the run."""
        if not self.accelerator.is_main_process:
            return
        self._add_wall_times()
        has_overlay = self.config.overlay_prob > 0
        samples = overlay_samples(MapStore(self.folder.maps), self.data.train, 12) if has_overlay else []
        shown = collect_disagreements(self.folder.path, self.data.test)
        write_report(self.folder.path, samples=samples, disagreements=shown)

    # ---- parts of the stages ----

    def _fit(self, task: IGDistillationTask, store: MapStore | None, epochs: int, name: str) -> nn.Module:
        config, model = self.config, task.get_eval_model()
        if config.batches == "device":
            task.to(memory_format=torch.channels_last)  # as the batches are
        transform = create_transform(**resolve_model_data_config(model))
        trainer = Trainer(
            task,
            create_batches(config, self.data, task, store, self.accelerator),
            config.training(epochs),
            self.accelerator,
            label=name,
            checkpoint=self.folder.checkpoint(name),
            history_path=self.folder.history(name),
            validation=create_validation_loader(
                self.data.validation, transform, config.batch_size, config.workers, self.accelerator
            ),
        )
        trainer.fit()
        return trainer.final_model()

    def _create_teacher(self, pretrained: bool) -> nn.Module:
        """Return the teacher, checked against the dataset's classes, or one of random weights."""
        is_given = self.config.teacher_epochs == 0
        with seeded(derive_seed(self.config.seed, "init teacher")):
            num_classes = None if is_given else self.data.num_classes
            model = create_teacher(self.config, pretrained=pretrained, num_classes=num_classes)
        if not is_given:
            use_image_size(model, *self.data.image_size)
        self._indices(model)
        return model

    def _create_student(self, create_whole: Callable[[], nn.Module]) -> nn.Module:
        """Return the student before training; `create_whole` makes the teacher that is truncated."""
        config = self.config
        return create_student(
            config.student,
            config.student_args,
            config.student_drop,
            create_whole,
            num_classes=self.data.num_classes,
            image_size=self.data.image_size,
            seed=config.seed,
        )

    def _create_task(self, student: nn.Module, teacher: nn.Module) -> IGDistillationTask:
        weight = self.config.task_loss_weight
        live = self.config.needs_live_teacher
        return create_task(
            self.config,
            student,
            teacher,
            self._criterion(),
            task_loss_weight=weight,
            teacher_class_indices=self._indices(teacher) if live else None,
        )

    def _criterion(self) -> nn.Module | None:
        return None if self.config.mixes else nn.CrossEntropyLoss(label_smoothing=self.config.smoothing)

    def _indices(self, teacher: nn.Module) -> list[int] | None:
        return class_indices(teacher, self.data.train.class_names, self.data.num_classes)

    def _saved(self, name: str, pretrained: bool = True) -> nn.Module:
        return load_model(f"local-dir:{self.folder.model(name)}", role=name, pretrained=pretrained)

    def _add_wall_times(self) -> None:
        metrics = read_json(self.folder.metrics)
        write_metrics(self.folder.metrics, metrics | {"wall_time_s": self.stages.wall_times()})

    def _print_usage(self) -> None:
        self._add_wall_times()
        student = self.folder.model("student")
        self.accelerator.print(f"report: {self.folder.page}")
        self.accelerator.print("use the student:\n    import timm")
        if needs_plugin(self._saved("student")):
            self.accelerator.print("    import timm_igkd")
        self.accelerator.print(f'    model = timm.create_model("local-dir:{student}", pretrained=True)')
