"""The students of a run: the one it is for and, with compare, the arms that this one is held against."""

import math
from collections.abc import Sized
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from accelerate import Accelerator
from timm.data import create_transform
from torch import nn

from timm_igkd.distillation.task import IGDistillationTask
from timm_igkd.errors import InputError
from timm_igkd.evaluation.comparison import ArmName, ArmResult, Comparison, compare_arms, teaching_of
from timm_igkd.evaluation.metrics import evaluate, write_metrics
from timm_igkd.evaluation.onnx_latency import onnx_metrics
from timm_igkd.files import hash_files
from timm_igkd.maps.store import MapStore
from timm_igkd.models.arguments import model_data_config
from timm_igkd.models.loading import needs_plugin, save_model, weights_hash
from timm_igkd.report.licenses import tell_license_of_start
from timm_igkd.report.run_files import read_history, read_metrics, read_predictions, write_predictions
from timm_igkd.runs.batches import create_batches
from timm_igkd.runs.data import RunData
from timm_igkd.runs.folder import RunFolder, RunInputs
from timm_igkd.runs.models import RunModels
from timm_igkd.runs.settings import RunConfig, StageName, Trained
from timm_igkd.runs.stages import Stage, StageMarker, Stages
from timm_igkd.training.accelerator import launch_change, launch_of, use_channels_last
from timm_igkd.training.batch import steps_per_epoch
from timm_igkd.training.trainer import Trainer
from timm_igkd.training.validation import create_validation_loader


class StudentRun:
    """One student: its training and its evaluation, in its folder.

    Args:
        config: settings of this student.
        data: images of the run.
        folder: the run's, or an arm's.
        accelerator: of the run.
        label: of an arm; empty for the student of the run.
    """

    def __init__(self, config: RunConfig, data: RunData, folder: RunFolder, accelerator: Accelerator, label: str = ""):
        self.config, self.data, self.folder, self.accelerator, self.label = config, data, folder, accelerator, label
        self.models = RunModels(config, data, folder)

    def stages(self) -> list[Stage]:
        """Return what there is to do."""
        files = [*self.folder.model_files("student"), self.folder.history("student")]
        return [
            Stage("student", self.train, files, partial=self.folder.checkpoint("student")),
            Stage("evaluate", self.evaluate, [self.folder.metrics, self.folder.predictions]),
        ]

    def train(self) -> None:
        """Train the student, in most arms by distillation."""
        keeps_weights = self.config.student_init == "teacher"
        model = self.models.student(lambda: self.models.saved("teacher", pretrained=keeps_weights))
        task = self.models.task(model, self.models.saved("teacher"))
        store = MapStore(self.folder.maps) if self.config.needs_maps else None
        model = self.fit(task, store, "student")
        if self.accelerator.is_main_process:
            tell_license_of_start(model, asdict(self.config), "student")
            save_model(model, self.folder.model("student"), label_names=self.data.train.class_names)

    def evaluate(self) -> None:
        """Read the test split once: metrics.json and predictions.npz; of an arm without what all arms share."""
        if not self.accelerator.is_main_process:
            return
        Stages.forget(self.folder.path, "report")  # which adds arms and exports to metrics.json
        test, student = self.data.test, self.models.saved("student")
        teacher = None if self.label else self.models.saved("teacher")
        indices = None if teacher is None else self.models.teacher_indices(teacher)
        result = evaluate(
            student,
            test,
            teacher=teacher,
            teacher_class_indices=indices,
            num_workers=self.config.workers,
            device=self.accelerator.device,
            latency_device="cpu",  # the edge's
            corruptions=self.config.corruptions,
            measure_latency=not self.label,
        )
        more = {} if self.label else {"needs_plugin": needs_plugin(student)} | onnx_metrics(student)
        more |= {"weights_sha256": weights_hash(student), "is_part": test.is_part}
        if not self.label and (without := self.data.num_unlabeled):
            labeled = len(self.data.student_images) - without
            more |= {"training_images": {"labeled": labeled, "unlabeled": without}}
        write_metrics(self.folder.metrics, result.metrics | more)
        names = test.class_names or tuple(str(label) for label in range(self.data.num_classes))
        write_predictions(self.folder.predictions, result, names, teacher_class_indices=indices)

    def fit(self, task: IGDistillationTask, store: MapStore | None, name: Trained) -> nn.Module:
        """Train what a task trains, and return the model that is kept of it.

        Args:
            task: with a teacher to train, or a student.
            store: maps of the training split, or None.
            name: which of the two.
        """
        config, model = self.config, task.get_eval_model()
        with_unlabeled = name == "student" and config.unlabeled is not None
        memory_format = use_channels_last(task)
        transform = create_transform(**model_data_config(model))
        trainer = Trainer(
            task,
            create_batches(
                config, self.data, task, store, self.accelerator, memory_format, with_unlabeled=with_unlabeled
            ),
            config.training(name),
            self.accelerator,
            label=self.label or name,
            checkpoint=self.folder.checkpoint(name),
            history_path=self.folder.history(name),
            validation=create_validation_loader(
                self.data.validation, transform, config.batch_size, config.workers, self.accelerator
            ),
        )
        trainer.fit()
        trained = trainer.final_model()
        self.accelerator.free_memory()  # it keeps every optimizer, and with it every model
        return trained


@dataclass(frozen=True)
class Arm:
    """A student of a comparison: what it is trained with, and from which seed."""

    name: ArmName
    seed: int

    @property
    def label(self) -> str:
        """Its folder's name, and what lines about it begin with."""
        return f"{self.name}-{self.seed}"

    def settings(self, config: RunConfig, more_epochs: int = 0) -> RunConfig:
        """Return its settings, those of the run but for what the arm goes without.

        Args:
            config: of the run.
            more_epochs: of an arm that is trained for more of them.
        """
        own: dict[str, Any] = {"seed": self.seed, "corruptions": 0, "compare": None, "seeds": 1, "maps": None}
        if self.name != "kd_overlay":
            own |= {"overlay_prob": 0.0}
        if self.name == "alone":
            own |= {"distill_loss_weight": 0.0, "attention_loss_weight": 0.0, "stored_logits": False}
            own |= {
                "explanation_loss_weight": 0.0,
                "task_loss_weight": None,
                "unlabeled": None,
                "unlabeled_split": None,
            }
        return replace(config, **own, epochs=config.epochs + more_epochs)


def arms_of(config: RunConfig) -> tuple[Arm, list[Arm]]:
    """Return what a run's own student is in its comparison, and all arms; none without compare."""
    names: tuple[ArmName, ...] = ("alone", "kd", "kd_overlay") if config.overlay_prob > 0 else ("alone", "kd")
    longer: tuple[ArmName, ...] = ("kd_longer",) if config.compare == "cost" else ()
    seeds = range(config.seed, config.seed + config.seeds) if config.compare else ()
    return Arm(names[-1], config.seed), [Arm(name, seed) for seed in seeds for name in (*names, *longer)]


class Arms:
    """The arms of a run's comparison, which share its data, teacher and maps; its own student is one of them.

    Args:
        config: of the run, `batches` resolved.
        data: its images; those that are drawn by the run's seed are the same for every seed.
        folder: its files.
        accelerator: of the run.
    """

    def __init__(self, config: RunConfig, data: RunData, folder: RunFolder, accelerator: Accelerator):
        self.config, self.data, self.folder, self.accelerator = config, data, folder, accelerator
        self.own, self.all = arms_of(config)
        self.others = [arm for arm in self.all if arm != self.own]

    def pending(self) -> set[StageName]:
        """Return what some of the other arms are left to do, writing nothing; errors as of `Stages.pending`.

        Raises:
            InputError: also where a student is left to train and another was trained by another launch: with other
                processes, of which each adds a batch to a step, or in another precision.
        """
        found = {name for arm in self.others for name in self._pending(arm)}
        if "student" in found:
            for arm in self.all:
                self._check_launch(arm)
        return found

    def _check_launch(self, arm: Arm) -> None:
        trained = Stages.finished(self._folder(arm).path, "student")
        change = trained and launch_change(trained.launch, launch_of(self.accelerator, self.config.compile))
        if change:
            raise InputError(
                f"arm {arm.label} of {self.folder.path} was trained with {change}; arms are compared that were trained "
                "alike: launch it as before, or choose another --name"
            )

    def _pending(self, arm: Arm) -> set[StageName]:
        more_epochs = self._more_epochs(arm)
        if more_epochs is None:
            return {"student", "evaluate"}
        return {stage.name for stage in self._stages(arm, more_epochs).pending()}

    def run(self) -> None:
        """Train and evaluate what is pending; all was checked before."""
        for arm in self.others:
            more_epochs = self._more_epochs(arm)
            assert more_epochs is not None  # the arm that it is measured by comes before
            stages = self._stages(arm, more_epochs)
            pending = {stage.name for stage in stages.pending()}
            self.accelerator.wait_for_everyone()
            if pending and self.accelerator.is_main_process:
                self._folder(arm).remove_unfinished(pending)
            stages.run()

    def _folder(self, arm: Arm) -> RunFolder:
        return self.folder if arm == self.own else self.folder.arm(arm.label)

    def _stages(self, arm: Arm, more_epochs: int) -> Stages:
        config, folder = arm.settings(self.config, more_epochs), self._folder(arm)
        student = StudentRun(config, self.data, folder, self.accelerator, arm.label)
        inputs = RunInputs(config, self.data, folder)
        stages = student.stages()
        return Stages(folder.path, config, self.accelerator, stages, inputs.of, folder.maps, label=f"{arm.label} ")

    def _more_epochs(self, arm: Arm) -> int | None:
        """Return the epochs that an arm has more than the run; None where they are not measured yet.

        Of KD for longer as many as the maps cost: seconds of the maps stage / mean seconds of an epoch of KD with the
        first seed, rounded up. Of the student alone, which goes without the images without labels, as many as give it
        the others' number of steps, or it would be held against students that were trained for longer. Once trained, an
        arm keeps them.
        """
        is_shorter = arm.name == "alone" and self.config.unlabeled is not None
        if arm.name != "kd_longer" and not is_shorter:
            return 0
        if (trained := Stages.finished(self._folder(arm).path, "student")) is not None:
            return int(trained.settings["epochs"]) - self.config.epochs
        if is_shorter:
            steps = self._steps_per_epoch(self.data.student_images) / self._steps_per_epoch(self.data.fitting)
            return round(self.config.epochs * steps) - self.config.epochs
        kd = self._folder(Arm("kd", self.config.seed))
        maps = Stages.finished(self.folder.path, "maps")
        if maps is None or maps.wall_time_s is None or Stages.finished(kd.path, "student") is None:
            return None
        seconds = float(np.mean(read_history(kd.history("student"))["seconds"]))
        return math.ceil(maps.wall_time_s / max(seconds, 1e-3))

    def _steps_per_epoch(self, images: Sized) -> int:
        processes, most = self.accelerator.num_processes, self.config.max_steps_per_epoch
        return steps_per_epoch(len(images), self.config.batch_size, processes, most)

    def inputs(self) -> dict[str, str]:
        """Return the hashes of what the comparison reads, by arm."""
        return {arm.label: hash_files([self._folder(arm).predictions]) for arm in self.all}

    def wall_time_s(self) -> float:
        """Return the seconds of all arms beside the run's own student."""
        paths = [self._folder(arm).path for arm in self.others]
        markers = [Stages.finished(path, name) for path in paths for name in ("student", "evaluate")]
        return round(sum(_seconds(marker) for marker in markers), 2)

    def comparison(self) -> Comparison:
        """Return all students and their differences, from what their evaluations left."""
        teacher = read_predictions(self.folder.predictions).teacher_logits
        assert teacher is not None
        right, results = {}, []
        for arm in self.all:
            folder = self._folder(arm)
            found, metrics = read_predictions(folder.predictions), read_metrics(folder.metrics)
            answers = found.student_logits.argmax(1)
            right[arm.name, arm.seed] = answers == found.labels
            marker = Stages.finished(folder.path, "student")
            results.append(
                ArmResult(
                    arm=arm.name,
                    seed=arm.seed,
                    epochs=marker.settings["epochs"] if marker else self.config.epochs,
                    **{name: getattr(metrics, name) for name in ("top1", "loss", "ece", "n")},
                    agreement=100 * float((answers == teacher.argmax(1)).mean()),
                    wall_time_s=_seconds(marker),
                )
            )
        return Comparison(
            tuple(results), compare_arms(right), teaching_of(vars(self.config)), len(self.data.unlabeled or ())
        )


def _seconds(marker: StageMarker | None) -> float:
    return marker.wall_time_s if marker is not None and marker.wall_time_s is not None else 0.0
