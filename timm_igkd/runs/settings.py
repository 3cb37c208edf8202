"""The settings of a run: every field is a flag, and a key of the YAML given with --config.

A field says which stages its value changes; a stage that is complete is compared with those settings alone.
"""

import json
import sys
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from timm_igkd.attribution.ig_options import Baseline, IGOptions, Output, Reduction, Target
from timm_igkd.errors import InputError, check_range
from timm_igkd.overlay.blend import IGOverlay, OverlaySource
from timm_igkd.training.settings import TrainCrop, TrainingSettings

if TYPE_CHECKING:  # the command line reads the settings without torch and timm
    from timm_igkd.training.augmentation import TrainAugmentation

StageName = Literal["teacher", "maps", "student", "evaluate", "report"]
STAGES: tuple[StageName, ...] = get_args(StageName)
BatchesChoice = Literal["auto", "workers", "device"]

# The first stage whose output a setting changes; what a later stage is made of changes with it.
_TEACHER, _MAPS, _STUDENT, _EVALUATE = (("teacher",), ("maps",), ("student",), ("evaluate",))
_TRAINING = ("teacher", "student")  # of the teacher only where it is trained
_NONE = ()  # names, places, speed: no output depends on it


def _setting(text: str, default: Any, stages: tuple[str, ...]) -> Any:
    metadata = {"help": text, "stages": stages}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """One run: teacher, maps, student, evaluation, report. The defaults are the digits demo."""

    name: str = _setting("the run's folder under output_dir", "demo", _NONE)
    output_dir: str = _setting("where runs are kept", "runs", _NONE)
    resume: bool = _setting("go on from the last finished epoch of a killed stage", False, _NONE)
    seed: int = _setting("initialisation, order, crops, overlays and Mixup all derive from it", 0, _TEACHER)

    dataset: str = _setting("Hub id, folder of parquet or of class folders, or digits", "digits", _TEACHER)
    revision: str | None = _setting("branch, tag or commit of a Hub dataset", None, _TEACHER)
    image_column: str | None = _setting("default: the first image column", None, _TEACHER)
    label_column: str | None = _setting("default: the first class label column", None, _TEACHER)
    train_split: str = _setting("split to train on", "train", _TEACHER)
    validation_split: str | None = _setting(
        "split to choose by; none: cut validation_fraction from train", "validation", _TEACHER
    )
    validation_fraction: float = _setting(
        "share cut from train where there is no validation split; 0: none", 0.1, _TEACHER
    )
    test_split: str = _setting("split that is read once, at the end", "test", _EVALUATE)
    train_limit: int | None = _setting(
        "only so many images of the training split, drawn by the seed, every class in its share", None, _TEACHER
    )
    test_limit: int | None = _setting("only so many images of the test split, drawn alike", None, _EVALUATE)
    corruptions: int = _setting("test images under each of 40 corruptions; 0: none", 0, _EVALUATE)

    teacher: str = _setting("timm name, hf-hub:… or local-dir:…", "test_resnet", _TEACHER)
    teacher_args: dict[str, Any] = _setting("arguments of the teacher, k=v", {}, _TEACHER)
    teacher_checkpoint: str | None = _setting(".safetensors or timm .pth.tar", None, _TEACHER)
    teacher_mean: tuple[float, float, float] | None = _setting(
        "normalisation, where the model's own is not right", None, _TEACHER
    )
    teacher_std: tuple[float, float, float] | None = _setting(
        "normalisation, where the model's own is not right", None, _TEACHER
    )
    teacher_epochs: int = _setting(
        "epochs to train a teacher from random weights; 0: it is trained already", 12, _TEACHER
    )

    student: str | None = _setting("timm name, or none: the teacher truncated by student_drop", None, _STUDENT)
    student_args: dict[str, Any] = _setting("arguments of the student, k=v", {}, _STUDENT)
    student_drop: int = _setting("entries cut from the teacher's end where student is none", 2, _STUDENT)
    student_init: Literal["random", "teacher"] = _setting(
        "weights of a truncated student's kept layers", "random", _STUDENT
    )

    overlay_prob: float = _setting("share of training images overlaid with their map; 0: no overlay", 0.1, _STUDENT)
    overlay_weight: float = _setting("share of the map in the blend", 0.5, _STUDENT)
    overlay_max_power: float = _setting("the map's exponent is drawn from 1 to this", 2.0, _STUDENT)
    overlay_source: OverlaySource = _setting("aligned, or a control", "aligned", _STUDENT)
    teacher_view: Literal["clean", "same"] = _setting(
        "what the teacher in the loop sees of an overlaid image", "same", _STUDENT
    )
    engine: Literal["captum", "fast"] = _setting("attribution engine", "fast", _MAPS)
    n_steps: int | Literal["auto"] = _setting("integration steps", 50, _MAPS)
    max_steps: int = _setting("most steps per image with auto", IGOptions().max_steps, _MAPS)
    tolerance: float = _setting("least map correlation with auto", 0.99, _MAPS)
    map_baseline: Baseline = _setting("start of the integration path", "mean", _MAPS)
    map_target: Target = _setting("class whose output is attributed", "label", _MAPS)
    map_output: Output = _setting("logit or probability", "logit", _MAPS)
    map_reduction: Reduction = _setting("how colour channels are joined", "abs_sum", _MAPS)
    map_size: int | None = _setting("side of the stored maps", None, _MAPS)

    loss_type: Literal["kl", "dkd", "dist", "standardized", "mse"] = _setting("distillation loss", "kl", _STUDENT)
    distill_loss_weight: float = _setting(
        "weight of the distillation loss (paper: alpha 0.01); 0: none", 0.01, _STUDENT
    )
    task_loss_weight: float | None = _setting(
        "weight of the cross-entropy; none: 1 - distill_loss_weight", None, _STUDENT
    )
    temperature: float = _setting("distillation temperature", 2.5, _STUDENT)
    attention_loss_weight: float = _setting("weight of attention transfer (paper: 0.8); 0: none", 0.0, _STUDENT)
    stored_logits: bool = _setting("distil from logits stored with the maps instead of a live teacher", False, _MAPS)

    epochs: int = _setting("of the student", 20, _STUDENT)
    batch_size: int = _setting("per process", 64, _TRAINING)
    opt: str = _setting("timm optimiser", "adamw", _TRAINING)
    lr: float = _setting("learning rate", 2e-3, _TRAINING)
    weight_decay: float = _setting("weight decay", 0.01, _TRAINING)
    momentum: float = _setting("momentum of sgd", 0.9, _TRAINING)
    sched: Literal["cosine", "tanh", "poly", "none"] = _setting("timm scheduler; none: constant", "cosine", _TRAINING)
    warmup_epochs: int = _setting("linear warm-up", 1, _TRAINING)
    min_lr: float = _setting("last learning rate", 1e-5, _TRAINING)
    grad_accum_steps: int = _setting("batches per optimiser step", 1, _TRAINING)
    clip_grad: float | None = _setting("largest gradient norm", None, _TRAINING)
    model_ema: bool = _setting("evaluate and keep an exponential moving average of the weights", False, _TRAINING)
    model_ema_decay: float = _setting("its decay", 0.999, _TRAINING)
    compile: bool = _setting("torch.compile student and teacher", False, _NONE)

    train_crop: TrainCrop = _setting("none, pad (by 1/8, the paper's), or RandomResizedCrop", "pad", _TRAINING)
    scale_min: float = _setting("smallest area of RandomResizedCrop", 0.08, _TRAINING)
    hflip: float = _setting("probability of a horizontal flip", 0.0, _TRAINING)
    aa: str | None = _setting("timm auto-augment string", None, _TRAINING)
    color_jitter: float = _setting("strength, with RandomResizedCrop", 0.0, _TRAINING)
    reprob: float = _setting("probability of random erasing", 0.0, _TRAINING)
    mixup: float = _setting("Mixup alpha", 0.0, _TRAINING)
    cutmix: float = _setting("CutMix alpha", 0.0, _TRAINING)
    smoothing: float = _setting("label smoothing", 0.0, _TRAINING)
    batches: BatchesChoice = _setting(
        "made by DataLoader workers, on the device, or auto: on the device where images, augmentation and memory allow",
        "auto",
        _TRAINING,
    )
    workers: int = _setting("DataLoader processes; the results do not depend on it", 0, _NONE)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = _setting("Accelerate trackers beside the CSV", (), _NONE)
    max_steps_per_epoch: int | None = _setting("stop every epoch early, to try a configuration", None, _TRAINING)

    def __post_init__(self) -> None:
        """Check ranges and combinations before anything expensive starts."""
        self._check_ranges()
        self.overlay()
        self.ig_options()
        self.training(self.epochs)
        self.augmentation()
        if "/" in self.name or self.name in ("", ".", ".."):
            raise InputError(f"name is a folder under output_dir, not a path, got {self.name!r}")
        if self.engine == "captum" and self.n_steps == "auto":
            raise InputError("n_steps auto needs engine fast; captum takes a whole number")
        self._check_models()
        self._check_losses()
        if self.batches == "device" and self.only_by_workers is not None:
            raise InputError(f"batches device cannot do {self.only_by_workers}; leave it out, or use batches workers")

    def _check_ranges(self) -> None:
        check_range("batch_size", self.batch_size, 1)
        for name in ("train_limit", "test_limit", "map_size", "max_steps_per_epoch"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1)
        check_range("seed", self.seed, 0, 2**63 - 1)
        for name in (
            "corruptions teacher_epochs workers distill_loss_weight attention_loss_weight color_jitter mixup cutmix"
        ).split():
            check_range(name, getattr(self, name), 0, sys.float_info.max)
        for name in ("smoothing", "validation_fraction"):
            check_range(name, getattr(self, name), 0, 1)
        if not 0 < self.temperature <= sys.float_info.max:
            raise InputError(f"temperature must be above 0 and finite, got {self.temperature:g}")

    def _check_models(self) -> None:
        if self.teacher_epochs > 0 and self.teacher_checkpoint is not None:
            raise InputError("teacher_checkpoint holds a trained teacher; set teacher_epochs to 0, or drop it")
        if self.student is None and self.student_drop < 1:
            raise InputError(f"student_drop must be at least 1 where student is none, got {self.student_drop}")
        if self.student is None and self.student_args:
            raise InputError("student_args are for a student given by name; student is none: drop them")
        if self.student is not None and self.student_init == "teacher":
            raise InputError(
                "student_init teacher is for a truncated teacher; set student to none, or student_init to random"
            )

    def _check_losses(self) -> None:
        if self.mixes and self.batch_size % 2:
            raise InputError(f"Mixup and CutMix need an even batch_size, got {self.batch_size}")
        if self.stored_logits and (self.mixes or self.attention_loss_weight > 0):
            raise InputError(
                "stored_logits belong to the clean, uncropped image: with Mixup, CutMix or attention transfer use a "
                "live teacher (stored_logits: false)"
            )
        if self.stored_logits and self.distill_loss_weight == 0:
            raise InputError(
                "stored_logits without distillation do nothing; set distill_loss_weight above 0, or drop them"
            )

    def ig_options(self) -> IGOptions:
        """Return which maps are computed."""
        return IGOptions(
            n_steps=self.n_steps,
            max_steps=self.max_steps,
            tolerance=self.tolerance,
            baseline=self.map_baseline,
            target=self.map_target,
            output=self.map_output,
            reduction=self.map_reduction,
        )

    def overlay(self) -> IGOverlay:
        """Return probability and strength of the overlay."""
        return IGOverlay(self.overlay_prob, self.overlay_weight, self.overlay_max_power)

    def augmentation(self) -> "TrainAugmentation":
        """Return what happens to a training image after the overlay."""
        from timm_igkd.training.augmentation import TrainAugmentation

        return TrainAugmentation(**self._named(TrainAugmentation))

    def training(self, epochs: int) -> TrainingSettings:
        """Return how a teacher or student is trained for so many epochs."""
        mode = "default" if self.compile else "none"
        return TrainingSettings(**self._named(TrainingSettings) | {"epochs": epochs, "compile_mode": mode})

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
    def needs_maps(self) -> bool:
        """Whether the student trains with maps, or with the logits stored beside them."""
        return self.overlay_prob > 0 or self.stored_logits

    @property
    def needs_live_teacher(self) -> bool:
        """Whether the teacher runs in the training loop."""
        return (self.distill_loss_weight > 0 and not self.stored_logits) or self.attention_loss_weight > 0

    def settings_of(self, stage: StageName) -> dict[str, Any]:
        """Return the settings that the output of a stage depends on, by name, as JSON holds them."""
        before = STAGES[: STAGES.index(stage) + 1]
        names = [item.name for item in fields(self) if self._concerned(item.metadata["stages"]) & set(before)]
        values = asdict(self)
        return json.loads(json.dumps({name: values[name] for name in names}))

    def _concerned(self, stages: tuple[str, ...]) -> set[str]:
        return set(stages) - ({"teacher"} if stages == _TRAINING and self.teacher_epochs == 0 else set())
