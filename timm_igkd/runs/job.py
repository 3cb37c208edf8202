"""The whole job: teacher, maps, student, evaluate, arms, export, report; each stage is skipped where it is complete."""

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

from accelerate.utils import broadcast_object_list
from timm.models import get_model_input_config
from torch import nn

from timm_igkd.attribution.grad_cam import check_method
from timm_igkd.distillation.task import IGDistillationTask
from timm_igkd.environment import environment
from timm_igkd.errors import InputTypeError
from timm_igkd.eval_mode import copy_model, eval_mode
from timm_igkd.evaluation.onnx_file import require_onnx_packages
from timm_igkd.export.budget import AUTO
from timm_igkd.export.record import read_export_record
from timm_igkd.export.student import check_calibration, check_exportable, export_student
from timm_igkd.export.students import StudentsRecord
from timm_igkd.files import write_json
from timm_igkd.maps.store import MapStore
from timm_igkd.models.arguments import model_data_config
from timm_igkd.models.loading import save_model
from timm_igkd.overlay.preview import overlay_samples
from timm_igkd.records import write_record
from timm_igkd.report.figures import require_matplotlib
from timm_igkd.report.licenses import tell_license_of_start
from timm_igkd.report.page import write_report
from timm_igkd.report.run_files import read_metrics, update_metrics
from timm_igkd.report.sections import MOST_SHOWN, collect_disagreements
from timm_igkd.report.verdict import verdict
from timm_igkd.runs.batches import check_trainable, choose_batches
from timm_igkd.runs.data import RunData, build_maps, check_given_maps, check_own_maps
from timm_igkd.runs.folder import RunFolder, RunInputs, choose_student, with_student
from timm_igkd.runs.models import RunModels, check_processes, find_start
from timm_igkd.runs.parsing import save_config
from timm_igkd.runs.protocols import unused_settings
from timm_igkd.runs.settings import RunConfig, StageName, Trained
from timm_igkd.runs.stages import Stage, Stages
from timm_igkd.runs.students import Arms, StudentRun, arms_of
from timm_igkd.training.accelerator import command_line, create_accelerator, launch_of, on_main
from timm_igkd.training.batch import steps_per_epoch


def distill(config: RunConfig | None = None) -> Path:
    """Distil a teacher into a student and say what came of it, in one folder.

    Complete stages are skipped; with `resume` a stage that was killed goes on. In a program of several processes
    (`accelerate launch`) every process calls it.

    Args:
        config: the settings; default: the digits demo.

    Returns:
        The run's folder, with config.yaml, teacher/, student/, metrics.json and report/index.html; maps/ where the run
        uses maps or stored logits, with compare arms/, with export export/.

    Raises:
        InputError: settings, data and models that do not fit together, found before anything is written; a folder of
            another run; a damaged file.
        InputTypeError: the settings are no RunConfig. RunError: the run could not go on.
    """
    if not isinstance(config, RunConfig | None):
        raise InputTypeError(f"distill takes a RunConfig, got a {type(config).__name__}; give it RunConfig(…)")
    run = Run(RunConfig() if config is None else config)
    run.main()
    return run.folder.path


class Run:
    """One run: its settings, its folder, and what its stages share.

    Args:
        config: the settings.
    """

    def __init__(self, config: RunConfig):
        require_matplotlib()
        if config.export:
            require_onnx_packages("export")
        self.folder = RunFolder(config.run_dir)
        self.accelerator = create_accelerator(config.trackers, self.folder.trackers)
        self.config, self.notes = self._find_starts(config)  # before all images are opened
        self.data = RunData(self.config)
        self.choice = self._choose_student() if config.student == AUTO else None
        if config.batches == "auto":
            (chosen,) = broadcast_object_list([self._choose_batches()])  # each device has its own memory
            self.config = replace(self.config, batches=chosen)
        parts = (self.config, self.data, self.folder, self.accelerator)
        self.kept, self.arms = StudentRun(*parts), Arms(*parts)
        inputs = RunInputs(self.config, self.data, self.folder)
        self.stages = self._create_stages(self._stages(), inputs)
        last = [Stage("report", self.report, [self.folder.page], is_redone=True)]
        if config.export:
            last.insert(0, Stage("export", self.export, self.folder.exported(config.export), is_redone=True))
        self.last = self._create_stages(last, inputs)

    @property
    def models(self) -> RunModels:
        """Its teacher and student, by the settings as they are by now."""
        return RunModels(self.config, self.data, self.folder)

    def _create_stages(self, stages: list[Stage], inputs: RunInputs) -> Stages:
        def read(name: StageName) -> dict[str, str]:
            return inputs.of(name) | (self.arms.inputs() if name == "report" else {})

        return Stages(self.folder.path, self.config, self.accelerator, stages, read, self.folder.maps)

    def _is_done(self, name: Trained) -> bool:
        files = self.folder.model_files(name)
        return Stages.finished(self.folder.path, name) is not None and all(path.exists() for path in files)

    def _needs_start(self, config: RunConfig, name: Trained) -> bool:
        own, arms = arms_of(config)
        others = [self.folder.arm(arm.label).path for arm in arms if name == "student" and arm != own]
        return not all(Stages.finished(path, name) for path in (self.folder.path, *others))

    def _find_starts(self, config: RunConfig) -> tuple[RunConfig, list[str]]:
        """Have the weights at hand that the models start from, and return the settings with what was found."""
        notes = []
        for name in get_args(Trained):
            config, note = find_start(config, name, fetch=self._needs_start(config, name))
            notes += [note] if note and not self._is_done(name) else []
        return config, notes

    def _choose_student(self) -> StudentsRecord:
        """Put the best student for the budget into the settings, and return what it was chosen from."""
        parts = (self.data.num_classes, self.folder, self.accelerator)
        record = choose_student(self.config, self._teacher_architecture, *parts)
        self.config, notes = self._find_starts(with_student(self.config, record))
        self.notes += [record.choice(), *notes]
        return record

    def _choose_batches(self) -> Literal["workers", "device"]:
        """Return what `auto` is: what a finished student was trained by, else what choose_batches finds."""
        found = Stages.finished(self.folder.path, "student")
        if found is not None and found.settings.get("batches") in ("workers", "device"):
            return found.settings["batches"]

        def trained() -> Iterator[nn.Module]:
            teacher = self._teacher_architecture()
            if self.config.teacher_epochs > 0:
                yield teacher
            yield self.models.student(lambda: teacher, weights=False)

        return choose_batches(self.config, self.data, trained(), self.accelerator)

    def _teacher_architecture(self) -> nn.Module:
        """Return the teacher with random weights; of a finished stage without asking for what it came from."""
        if self._is_done("teacher"):
            return self.models.saved("teacher", pretrained=False)
        return self.models.teacher(weights=False)

    def _stages(self) -> list[Stage]:
        files, checkpoint = self.folder.model_files("teacher"), self.folder.checkpoint("teacher")
        if self.config.teacher_epochs > 0:
            files.append(self.folder.history("teacher"))
        stages = [Stage("teacher", self.teacher, files, partial=checkpoint)]
        if self.config.needs_maps:
            stages.append(Stage("maps", self.maps, [self.folder.maps / "provenance.json"], shards="data/*.parquet"))
        return [*stages, *self.kept.stages()]

    def main(self) -> None:
        """Check everything, then run all stages in order."""
        self.folder.refuse_foreign()
        self.data.refuse_output(self.folder.path)
        with self.folder.telling_of_others() if self.accelerator.is_main_process else nullcontext():
            pending, arms = self._pending(), self.arms.pending()
        if "student" in pending | arms:
            self._check_models(pending)
        self.notes += unused_settings(self.config) if pending else []
        if self.config.resume and not self.folder.has_begun():
            self.notes.append(f"resume: no stage of {self.folder.path} has begun, so there is nothing to go on from")
        for note in self.notes:
            self.accelerator.print(note)
        self.accelerator.wait_for_everyone()
        with ExitStack() as held:
            if (pending or arms) and self.accelerator.is_main_process:
                held.enter_context(self.folder.held())
                self._begin(self._pending())  # another may have done some of it since
            if (pending or arms) and self.config.trackers:
                self.accelerator.init_trackers(self.config.name, init_kwargs={"wandb": {"dir": str(self.folder.path)}})
            for part in (self.stages, self.arms, self.last):
                part.run()
            if self.accelerator.is_main_process:
                self._print_usage()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _pending(self) -> set[StageName]:
        return {stage.name for part in (self.stages, self.last) for stage in part.pending()}

    def _begin(self, pending: set[StageName]) -> None:
        """Write what the run is, and take away what a killed process left of it."""
        self.folder.claim()
        self.folder.remove_unfinished(pending)
        save_config(self.config, self.folder.config)
        if self.choice is not None:
            write_record(self.folder.students, self.choice)
        # a run that only redraws its page keeps the environment it was trained in
        if pending & {"teacher", "student"} or not self.folder.environment.exists():
            launch = launch_of(self.accelerator, self.config.compile)
            write_json(self.folder.environment, environment() | {"command": command_line(launch)} | launch)

    def _check_models(self, pending: set[StageName]) -> None:
        """Load or build all that the stages need, so that what does not fit ends the run before anything is written."""
        teacher = self._teacher_architecture() if "teacher" not in pending else self.models.teacher()
        student = self.models.student(lambda: teacher)
        if self.config.export and self.accelerator.is_main_process:
            check_exportable(student, "onnx-int8" in self.config.export)
            check_calibration(self.data.fitting, self.data.test if "onnx-int8" in self.config.export else None)
        self.config.augmentation().transform(model_data_config(student))
        trains_teacher = "teacher" in pending and self.config.teacher_epochs > 0
        fewest = self.data.fitting if self.config.compare or trains_teacher else self.data.student_images
        steps_per_epoch(len(fewest), self.config.batch_size, self.accelerator.num_processes)
        if "maps" in pending and self.config.reads_maps:
            with eval_mode(teacher):
                check_method(teacher, self.config.ig_options(), get_model_input_config(teacher)["input_size"])
        check_own_maps(self.config, self.folder.maps)
        if self.config.maps is not None:  # after the maps stage too: somebody else's store, rebuilt since it was linked
            store = MapStore(self.config.maps if "maps" in pending else self.folder.maps)
            given = teacher if "teacher" in pending else self.models.saved("teacher")
            check_given_maps(self.config, store, given, self.data)
        tasks: dict[Trained, IGDistillationTask] = {}
        if trains_teacher:  # a copy: the student's teacher is frozen
            tasks["teacher"] = self.models.teacher_task(copy_model(teacher))
        tasks["student"] = self.models.task(student, teacher)
        check_processes(tasks["student"], self.accelerator.num_processes)
        for name, task in tasks.items():
            check_trainable(self.config, self.data, name, task, self.accelerator)
        on_main(self.accelerator, lambda: self.data.check_images("maps" in pending and not trains_teacher))

    def teacher(self) -> None:
        """Take the given teacher, or train one: from pretrained weights, or from random ones."""
        model = self.models.teacher()
        if self.config.teacher_epochs > 0:
            model = self.kept.fit(self.models.teacher_task(model), None, "teacher")
        if self.accelerator.is_main_process:
            names = self.data.train.class_names if self.models.teacher_indices(model) is None else None
            tell_license_of_start(model, asdict(self.config), "teacher")
            save_model(model, self.folder.model("teacher"), label_names=names)

    def maps(self) -> None:
        """Compute the teacher's maps or logits of the training split, or hold a given store against it and link it."""
        if self.config.maps is not None:  # every row is checked; then it is neither built again nor copied
            if self.accelerator.is_main_process:
                store = MapStore(self.config.maps)
                store.verify(self.data.mapped)
                self.folder.link_maps(store.path)
            return
        if self.accelerator.is_main_process and self.folder.maps.is_symlink():
            self.folder.maps.unlink()  # to somebody's store: nothing is ever built into it
        self.accelerator.wait_for_everyone()
        build_maps(self.config, self.models.saved("teacher"), self.data, self.folder.maps)

    def export(self) -> None:
        """Write the student's files for the edge, calibrated on training images and verified on the test split."""
        if not self.accelerator.is_main_process:
            return
        record = export_student(
            self.models.saved("student"),
            self.folder.export,
            int8="onnx-int8" in self.config.export,
            calibration=self.data.fitting,
            evaluation=self.data.test,
            name="student",
            budget=self.folder.budget(),
        )
        self.accelerator.print(*record.sentences(self.folder.export), sep="\n")

    def report(self) -> None:
        """Write the page of the run."""
        if not self.accelerator.is_main_process:
            return
        has_overlay = self.config.overlay_prob > 0
        samples = overlay_samples(MapStore(self.folder.maps), self.data.mapped, MOST_SHOWN) if has_overlay else []
        shown = collect_disagreements(self.folder.path, self.data.test)  # a damaged file is found before any is written
        self._add_to_metrics(
            arms=asdict(self.arms.comparison()) if self.config.compare else None,
            exports=read_export_record(self.folder.export).metrics() if self.config.export else None,
        )
        write_report(self.folder.path, samples=samples, disagreements=shown)

    def _add_to_metrics(self, **more: Any) -> None:
        """Add the seconds of all stages to metrics.json, and what else is given; None takes it away."""
        times = self.stages.wall_times() | ({"arms": self.arms.wall_time_s()} if self.arms.all else {})
        update_metrics(self.folder.metrics, more | {"wall_time_s": times | self.last.wall_times()})

    def _print_usage(self) -> None:
        self._add_to_metrics()
        metrics, student = read_metrics(self.folder.metrics), self.folder.model("student")
        plugin = "\n    import timm_igkd" if metrics.needs_plugin else ""
        self.accelerator.print(*verdict(metrics.arms), f"report: {self.folder.page}", sep="\n")
        self.accelerator.print(f"use the student:\n    import timm{plugin}")
        self.accelerator.print(f'    model = timm.create_model("local-dir:{student}", pretrained=True)')
