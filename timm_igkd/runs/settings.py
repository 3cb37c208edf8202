"""The settings of a run: every field is a flag, and a key of the YAML given with --config.

A field says which stages its value changes; a stage that is complete is compared with those settings alone.
"""

import json
import os
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from timm_igkd.attribution.ig_options import Baseline, IGOptions, Method, Output, Reduction, Target
from timm_igkd.distillation.options import ExplanationMap, JoinedChannels, TeacherViewMode
from timm_igkd.export.budget import AUTO, Budget
from timm_igkd.overlay.blend import IGOverlay, OverlaySource
from timm_igkd.runs.checks import check_settings, plain_settings
from timm_igkd.runs.parsing import setting
from timm_igkd.runs.protocols import PerProtocol, Protocol, resolve_defaults
from timm_igkd.training.augmentation import TrainAugmentation
from timm_igkd.training.settings import TrainCrop, TrainingSettings

Trained = Literal["teacher", "student"]
Start = Literal["pretrained", "random"]
StageName = Literal["teacher", "maps", "student", "evaluate", "export", "report"]
STAGES: tuple[StageName, ...] = get_args(StageName)
BatchesChoice = Literal["auto", "workers", "device"]
ExportFormat = Literal["onnx", "onnx-int8"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]

# The first stage whose output a setting changes; what a later stage is made of changes with it.
_TEACHER, _MAPS, _STUDENT, _EVALUATE, _EXPORT, _REPORT = ((name,) for name in STAGES)
_TRAINING = ("teacher", "student")  # of the teacher only where it is trained
_NONE = ()  # names, places, speed: no output depends on it


def _setting(text: str, default: Any, stages: tuple[str, ...], bare: str | None = None) -> Any:
    return setting(text, default, stages=stages, bare=bare)  # bare: the value of a flag without one


def _preset(text: str, stages: tuple[str, ...], bare: str | None = None) -> Any:
    return _setting(text, PerProtocol(), stages, bare)


@dataclass(frozen=True)
class RunConfig:
    """One run: teacher, maps, student, evaluation, report.

    What is not given is the protocol's (protocols.py); without any argument the run is the digits demo. A value that is
    not of its field's type, or does not go with another, is an InputError; paths, and numbers of numpy, become plain.
    """

    name: str = _setting("the run's folder under output_dir; empty: demo, or the dataset's own name", "", _NONE)
    protocol: Protocol | None = _setting(
        "gives every setting that has no default of its own; none: demo for the digits, modern for others", None, _NONE
    )
    output_dir: str = _setting("where runs are kept", "runs", _NONE)
    resume: bool = _setting("go on from the last finished epoch of a killed stage", False, _NONE)
    seed: int = _setting("initialisation, order, crops, overlays and Mixup all derive from it", 0, _TEACHER)

    dataset: str = _setting("Hub id, folder of parquet, class folders or webdataset tars, or digits", "digits", _NONE)
    revision: str | None = _setting("branch, tag or commit of a Hub dataset", None, _TEACHER)
    image_column: str | None = _setting("default: the first image column", None, _TEACHER)
    label_column: str | None = _setting("default: the first class label column", None, _TEACHER)
    train_split: str = _setting("split to train on", "train", _TEACHER)
    validation_split: str | None = _preset("split to watch the epochs by; none: cut from train", _TEACHER)
    validation_fraction: float = _preset("share cut from train where there is no validation split; 0: none", _TEACHER)
    test_split: str = _setting("split that is read once, at the end", "test", _EVALUATE)
    train_limit: int | None = _setting(
        "only so many images of the training split, drawn by the seed, every class in its share", None, _TEACHER
    )
    unlabeled: str | None = _setting(
        "images without labels, for the distillation loss alone: folder, folder of parquet or Hub id", None, _MAPS
    )
    unlabeled_split: str | None = _setting("their split; none: train, or all of a folder of images", None, _MAPS)
    test_limit: int | None = _setting("only so many images of the test split, drawn alike", None, _EVALUATE)
    corruptions: int = _setting("test images under each of 40 corruptions; 0: none", 0, _EVALUATE)

    teacher: str = _preset("timm name, hf-hub:… or local-dir:…", _TEACHER)
    teacher_args: dict[str, Any] = _setting("arguments of the teacher, k=v", {}, _TEACHER)
    teacher_checkpoint: str | None = _setting(".safetensors or timm .pth.tar", None, _TEACHER)
    teacher_use_ema: bool = _setting("take the EMA weights of a .pth.tar", False, _TEACHER)
    teacher_mean: tuple[float, float, float] | None = _setting("normalisation, if its own is not right", None, _TEACHER)
    teacher_std: tuple[float, float, float] | None = _setting("normalisation, if its own is not right", None, _TEACHER)
    teacher_init: Start = _preset("weights it starts from", _TEACHER)
    teacher_epochs: int = _preset(
        "epochs to train the teacher on these images, pretrained weights getting a new head; 0: it is taken as it is",
        _TEACHER,
    )
    teacher_lr: float | None = _preset("learning rate of its training; none: lr", _TEACHER)
    freeze_teacher_bn: bool = _setting("its batch norms keep their statistics in fine-tuning", False, _TEACHER)
    student: str | None = _preset(
        "timm name, none: the teacher truncated by student_drop, or auto: the best that fits the limits below", _STUDENT
    )
    max_latency_ms: float | None = _setting("with student auto: of an image in onnxruntime, on one thread", None, _NONE)
    max_size_mb: float | None = _setting("with student auto: of its ONNX file, in 10^6 bytes", None, _NONE)
    student_checkpoint: str | None = _setting(".safetensors or timm .pth.tar", None, _STUDENT)
    student_use_ema: bool = _setting("take the EMA weights of a .pth.tar", False, _STUDENT)
    student_args: dict[str, Any] = _setting("arguments of the student, k=v", {}, _STUDENT)
    student_drop: int = _preset("entries cut from the teacher's end where student is none", _STUDENT)
    student_init: Literal["pretrained", "random", "teacher"] = _preset(
        "weights a student starts from; teacher: a truncated one's kept layers, as pretrained is there", _STUDENT
    )
    freeze_student_bn: bool = _setting("its batch norms keep their statistics in training", False, _STUDENT)
    img_size: int | None = _setting("side of both models' input; none: their own", None, _TEACHER)

    overlay_prob: float = _preset("share of training images overlaid with their map; 0: no overlay", _STUDENT)
    overlay_weight: float = _setting("share of the map in the blend", 0.5, _STUDENT)
    overlay_max_power: float = _setting("the map's exponent is drawn from 1 to this", 2.0, _STUDENT)
    overlay_source: OverlaySource = _setting(
        "maps that overlay and explanation loss take: aligned, or a control", "aligned", _STUDENT
    )
    teacher_view: TeacherViewMode = _preset("what the teacher in the loop sees of an overlaid image", _STUDENT)
    maps: str | None = _setting(
        "a finished store of this teacher and split, or user/name; none: build one", None, _MAPS
    )
    engine: Literal["captum", "fast"] = _setting("attribution engine", "fast", _MAPS)
    map_method: Method = _setting("attribution method of the maps, where any are read; only ig has a path", "ig", _MAPS)
    n_steps: int | Literal["auto"] = _preset("integration steps", _MAPS)
    max_steps: int = _setting("most steps per image with auto", IGOptions().max_steps, _MAPS)
    tolerance: float = _setting("least map correlation with auto", 0.99, _MAPS)
    map_baseline: Baseline = _setting("start of the integration path", "mean", _MAPS)
    map_target: Target = _setting("class whose output is attributed", "label", _MAPS)
    map_output: Output = _setting("logit or probability", "logit", _MAPS)
    map_reduction: Reduction | None = _setting(
        "how colour channels are joined; none: abs_sum, positive for grad_cam", None, _MAPS
    )
    map_size: int | None = _setting("side of the stored maps", None, _MAPS)

    loss_type: Literal["kl", "dkd", "dist", "standardized", "mse"] = _setting("distillation loss", "kl", _STUDENT)
    distill_loss_weight: float = _preset("weight of the distillation loss (paper: alpha 0.01); 0: none", _STUDENT)
    task_loss_weight: float | None = _setting("of the cross-entropy; none: 1 - distill_loss_weight", None, _STUDENT)
    temperature: float = _preset("distillation temperature", _STUDENT)
    attention_loss_weight: float = _setting("weight of attention transfer (paper: 0.8); 0: none", 0.0, _STUDENT)
    explanation_loss_weight: float = _setting(
        "weight of 1 - cosine of the student's map and the stored one (e2KD: 1); 0: none", 0.0, _STUDENT
    )
    explanation_map: ExplanationMap = _setting(
        "how the student explains the label, with explanation_loss_weight", "input_x_gradient", _STUDENT
    )
    stored_logits: bool = _preset("distil from stored logits, with the maps or alone, not from a live teacher", _MAPS)

    epochs: int = _preset("of the student", _STUDENT)
    batch_size: int = _preset("per process", _TRAINING)
    opt: str = _preset("timm optimiser", _TRAINING)
    lr: float = _preset("learning rate", _TRAINING)
    weight_decay: float = _preset("weight decay", _TRAINING)
    layer_decay: float | None = _setting(
        "timm's: lr of a layer is this share of the next one's, in teacher and student", None, _TRAINING
    )
    momentum: float = _setting("momentum of sgd", 0.9, _TRAINING)
    sched: Literal["cosine", "tanh", "poly", "triangular", "none"] = _preset(
        "timm scheduler; none: constant", _TRAINING
    )
    warmup_epochs: int = _preset("linear warm-up", _TRAINING)
    min_lr: float = _preset("last learning rate", _TRAINING)
    grad_accum_steps: int = _setting("batches per optimiser step", 1, _TRAINING)
    clip_grad: float | None = _setting("largest gradient norm", None, _TRAINING)
    model_ema: bool = _setting("evaluate and keep an exponential moving average of the weights", False, _TRAINING)
    model_ema_decay: float = _setting("its decay", 0.999, _TRAINING)
    model_ema_warmup: bool = _setting("the decay rises to that with the updates, as in timm", True, _TRAINING)
    compile: bool = _setting("torch.compile student and teacher", False, _NONE)

    train_crop: TrainCrop = _preset("none, pad (by 1/8, the paper's), or RandomResizedCrop", _TRAINING)
    scale_min: float = _preset("smallest area of RandomResizedCrop", _TRAINING)
    hflip: float = _preset("probability of a horizontal flip", _TRAINING)
    aa: str | None = _setting("timm auto-augment string", None, _TRAINING)
    color_jitter: float = _setting("strength, with RandomResizedCrop and no aa", 0.0, _TRAINING)
    reprob: float = _setting("probability of random erasing", 0.0, _TRAINING)
    mixup: float = _setting("Mixup alpha", 0.0, _TRAINING)
    cutmix: float = _setting("CutMix alpha", 0.0, _TRAINING)
    smoothing: float = _preset("label smoothing", _TRAINING)
    batches: BatchesChoice = _setting(
        "made by DataLoader workers, on the device, or auto: on the device where images, augmentation and memory allow",
        "auto",
        _TRAINING,
    )
    workers: int = _preset("DataLoader processes; the results do not depend on it", _NONE)
    trackers: tuple[TrackerName, ...] = _setting("Accelerate trackers beside the CSV", (), _NONE)
    compare: Literal["arms", "cost"] | None = _preset(
        "also train the same student alone and with KD without overlay, and say what each was worth; cost: and with KD "
        "for as many more epochs as the maps cost",
        _REPORT,
        bare="arms",
    )
    seeds: int = _setting(
        "of every arm of compare, from seed on; 1: the verdict is about these students, from 3 on about the method",
        1,
        _REPORT,
    )
    export: tuple[ExportFormat, ...] = _setting(
        "files of the student for onnxruntime, verified and timed; onnx-int8 is calibrated on training images and "
        "brings the float file along",
        (),
        _EXPORT,
    )
    max_steps_per_epoch: int | None = _setting("stop every epoch early, to try a configuration", None, _TRAINING)

    def __post_init__(self) -> None:
        """Fill in what was not given, then check it all before anything expensive starts."""
        given = plain_settings(RunConfig, vars(self))
        for name, value in (given | resolve_defaults(given)).items():
            object.__setattr__(self, name, value)
        check_settings(self)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(os.path.expanduser(self.output_dir)) / self.name

    def ig_options(self) -> IGOptions:
        """Return which maps are computed."""
        assert self.map_reduction is not None  # resolved
        return IGOptions(
            method=self.map_method,
            n_steps=self.n_steps,
            max_steps=self.max_steps,
            tolerance=self.tolerance,
            baseline=self.map_baseline,
            target=self.map_target,
            output=self.map_output,
            reduction=self.map_reduction,
        )

    def budget(self) -> Budget | None:
        """Return what the student may cost that is to be chosen, None where it is named; int8 counts where exported."""
        int8 = "onnx-int8" in self.export
        return Budget(self.max_latency_ms, self.max_size_mb, int8) if self.student == AUTO else None

    def overlay(self) -> IGOverlay:
        """Return probability and strength of the overlay."""
        return IGOverlay(self.overlay_prob, self.overlay_weight, self.overlay_max_power)

    def augmentation(self) -> TrainAugmentation:
        """Return what happens to a training image after the overlay."""
        return TrainAugmentation(**self._named(TrainAugmentation))

    def training(self, name: Trained) -> TrainingSettings:
        """Return how the teacher or the student is trained."""
        own: dict[str, Any] = {"compile_mode": "default" if self.compile else "none"}
        if name == "teacher":  # one that is given is not trained: any settings do
            lr = self.lr if self.teacher_lr is None else self.teacher_lr
            own |= {"epochs": max(1, self.teacher_epochs), "lr": lr, "min_lr": min(lr, self.min_lr)}
            own["freeze_bn"] = self.freeze_teacher_bn
        else:
            own["freeze_bn"] = self.freeze_student_bn
        return TrainingSettings(**self._named(TrainingSettings) | own)

    def _named(self, kind: type) -> dict[str, Any]:
        """Return the settings that are fields of another dataclass."""
        return {item.name: getattr(self, item.name) for item in fields(kind) if hasattr(self, item.name)}

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def only_by_workers(self) -> str | None:
        """The first setting that batches on the device cannot do, or None."""
        return self.augmentation().only_by_workers or ("mixup and cutmix" if self.mixes else None)

    @property
    def explains(self) -> bool:
        """Whether the student's own maps are held against the teacher's."""
        return self.explanation_loss_weight > 0

    @property
    def explanation_channels(self) -> JoinedChannels:
        """How the student's map joins colour channels: as the store did, whose signed maps are rectified."""
        return "abs_sum" if self.map_reduction == "abs_sum" else "positive"

    @property
    def reads_maps(self) -> bool:
        """Whether the student trains with maps."""
        return self.overlay_prob > 0 or self.explains

    @property
    def needs_maps(self) -> bool:
        """Whether the run has a store: of maps, of logits for the student to train with, or of both."""
        return self.reads_maps or self.stored_logits

    @property
    def needs_live_teacher(self) -> bool:
        """Whether the teacher runs in the training loop."""
        return (self.distill_loss_weight > 0 and not self.stored_logits) or self.attention_loss_weight > 0

    def settings_of(self, stage: StageName) -> dict[str, Any]:
        """Return the settings that the output of a stage depends on, by name, as JSON holds them."""
        before = STAGES[: STAGES.index(stage) + 1]
        names = [item.name for item in fields(self) if self._concerned(item) & set(before)]
        values = asdict(self)
        return json.loads(json.dumps({name: values[name] for name in names}))

    def _concerned(self, item: Field[Any]) -> set[str]:
        """Return the stages that a setting is for; the teacher may have a rate of its own, or not be trained."""
        stages = item.metadata["stages"]
        is_students = self.teacher_epochs == 0 or (item.name == "lr" and self.teacher_lr is not None)
        return set(stages) - ({"teacher"} if stages == _TRAINING and is_students else set())
