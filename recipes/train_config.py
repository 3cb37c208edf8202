"""The settings of recipes/train_igkd.py: every field is a flag, and a key of the YAML given with --config."""

import math
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from timm.optim import list_optimizers

from timm_igkd.attribution.ig_options import Baseline, IGOptions, Output, Reduction, Target
from timm_igkd.errors import InputError, check_range, nearest
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.controls import OverlaySource


def _help(text: str, default: Any) -> Any:
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """One run: teacher, maps, student, evaluation, report. The defaults are the digits demo."""

    name: str = _help("the run's folder under output_dir", "demo")
    output_dir: str = _help("where runs are kept", "runs")
    resume: bool = _help("go on from the last finished epoch of a killed stage", False)
    seed: int = _help("initialisation, order, crops, overlays and Mixup all derive from it", 0)

    dataset: str = _help("Hub id, folder of parquet or of class folders, or digits", "digits")
    revision: str | None = _help("branch, tag or commit of a Hub dataset", None)
    image_column: str | None = _help("default: the first image column", None)
    label_column: str | None = _help("default: the first class label column", None)
    train_split: str = _help("split to train on", "train")
    validation_split: str | None = _help("split to choose by; none: cut validation_fraction from train", "validation")
    validation_fraction: float = _help("share cut from train where there is no validation split; 0: none", 0.1)
    test_split: str = _help("split that is read once, at the end", "test")
    train_limit: int | None = _help("only the first images of the training split", None)
    test_limit: int | None = _help("only the first images of the test split", None)
    corruptions: int = _help("test images under each of 40 corruptions; 0: none", 0)

    teacher: str = _help("timm name, hf-hub:… or local-dir:…", "test_resnet")
    teacher_args: dict[str, Any] = _help("arguments of the teacher, k=v", {})
    teacher_checkpoint: str | None = _help(".safetensors or timm .pth.tar", None)
    teacher_mean: tuple[float, float, float] | None = _help("normalisation, where the model's own is not right", None)
    teacher_std: tuple[float, float, float] | None = _help("normalisation, where the model's own is not right", None)
    teacher_epochs: int = _help("epochs to train a teacher from random weights; 0: it is trained already", 12)

    student: str | None = _help("timm name, or none: the teacher truncated by student_drop", None)
    student_args: dict[str, Any] = _help("arguments of the student, k=v", {})
    student_drop: int = _help("entries cut from the teacher's end where student is none", 2)
    student_init: Literal["random", "teacher"] = _help("weights of a truncated student's kept layers", "random")

    overlay_prob: float = _help("share of training images overlaid with their map; 0: no overlay", 0.1)
    overlay_weight: float = _help("share of the map in the blend", 0.5)
    overlay_max_power: float = _help("the map's exponent is drawn from 1 to this", 2.0)
    overlay_source: OverlaySource = _help("aligned, or a control", "aligned")
    teacher_view: Literal["clean", "same"] = _help("what the teacher in the loop sees of an overlaid image", "clean")
    engine: Literal["captum", "fast"] = _help("attribution engine", "fast")
    n_steps: int | Literal["auto"] = _help("integration steps", 50)
    max_steps: int = _help("most steps per image with auto", IGOptions().max_steps)
    tolerance: float = _help("least map correlation with auto", 0.99)
    map_baseline: Baseline = _help("start of the integration path", "mean")
    map_target: Target = _help("class whose output is attributed", "label")
    map_output: Output = _help("logit or probability", "logit")
    map_reduction: Reduction = _help("how colour channels are joined", "abs_sum")
    map_size: int | None = _help("side of the stored maps", None)

    loss_type: Literal["kl", "dkd", "dist", "standardized", "mse"] = _help("distillation loss", "kl")
    distill_loss_weight: float = _help("weight of the distillation loss (paper: alpha 0.01); 0: none", 0.01)
    task_loss_weight: float | None = _help("weight of the cross-entropy; none: 1 - distill_loss_weight", None)
    temperature: float = _help("distillation temperature", 2.5)
    attention_loss_weight: float = _help("weight of attention transfer (paper: 0.8); 0: none", 0.0)
    stored_logits: bool = _help("distil from logits stored with the maps instead of a live teacher", False)

    epochs: int = _help("of the student", 20)
    batch_size: int = _help("per process", 64)
    opt: str = _help("timm optimiser", "adamw")
    lr: float = _help("learning rate", 2e-3)
    weight_decay: float = _help("weight decay", 0.01)
    momentum: float = _help("momentum of sgd", 0.9)
    sched: Literal["cosine", "tanh", "poly", "none"] = _help("timm scheduler; none: constant", "cosine")
    warmup_epochs: int = _help("linear warm-up", 1)
    min_lr: float = _help("last learning rate", 1e-5)
    grad_accum_steps: int = _help("batches per optimiser step", 1)
    clip_grad: float | None = _help("largest gradient norm", None)
    model_ema: bool = _help("evaluate and keep an exponential moving average of the weights", False)
    model_ema_decay: float = _help("its decay", 0.999)
    compile: bool = _help("torch.compile student and teacher", False)

    train_crop: Literal["none", "pad", "rrc"] = _help("none, pad (by 1/8, the paper's), or RandomResizedCrop", "pad")
    scale_min: float = _help("smallest area of RandomResizedCrop", 0.08)
    hflip: float = _help("probability of a horizontal flip", 0.0)
    aa: str | None = _help("timm auto-augment string", None)
    color_jitter: float = _help("strength, with RandomResizedCrop", 0.0)
    reprob: float = _help("probability of random erasing", 0.0)
    mixup: float = _help("Mixup alpha", 0.0)
    cutmix: float = _help("CutMix alpha", 0.0)
    smoothing: float = _help("label smoothing", 0.0)
    workers: int = _help("DataLoader workers; the results do not depend on it", 0)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = _help("Accelerate trackers beside the CSV", ())
    max_steps_per_epoch: int | None = _help("stop every epoch early, to try a configuration", None)

    def __post_init__(self) -> None:
        """Check ranges and combinations before anything expensive starts."""
        self._check_ranges()
        IGOverlay(self.overlay_prob, self.overlay_weight, self.overlay_max_power)
        self.ig_options()
        if "/" in self.name or self.name in ("", ".", ".."):
            raise InputError(f"name is a folder under output_dir, not a path, got {self.name!r}")
        names = [str(name) for name in list_optimizers()]
        if self.opt not in names:
            raise InputError(f"unknown optimiser {self.opt!r}{nearest(self.opt, names)}; timm.optim lists them")
        if self.engine == "captum" and self.n_steps == "auto":
            raise InputError("n_steps auto needs engine fast; captum takes a whole number")
        self._check_models()
        self._check_losses()

    def _check_ranges(self) -> None:
        for name in ("epochs", "batch_size", "grad_accum_steps"):
            check_range(name, getattr(self, name), 1)
        for name in ("train_limit", "test_limit", "map_size", "max_steps_per_epoch"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1)
        for name in (
            "seed corruptions teacher_epochs workers warmup_epochs distill_loss_weight attention_loss_weight lr "
            "weight_decay momentum min_lr color_jitter mixup cutmix"
        ).split():
            check_range(name, getattr(self, name), 0, sys.float_info.max)
        for name in ("hflip", "reprob", "smoothing", "validation_fraction", "scale_min", "model_ema_decay"):
            check_range(name, getattr(self, name), 0, 1)
        for name in ("temperature", "clip_grad"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be above 0 and finite, got {value:g}")

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
        mixes = self.mixup > 0 or self.cutmix > 0
        if mixes and self.batch_size % 2:
            raise InputError(f"Mixup and CutMix need an even batch_size, got {self.batch_size}")
        if self.stored_logits and (mixes or self.attention_loss_weight > 0):
            raise InputError(
                "stored_logits belong to the clean, uncropped image: with Mixup, CutMix or attention transfer use a "
                "live teacher (stored_logits: false)"
            )
        if self.stored_logits and self.distill_loss_weight == 0:
            raise InputError(
                "stored_logits without distillation do nothing; set distill_loss_weight above 0, or drop them"
            )

    def ig_options(self) -> IGOptions:
        return IGOptions(
            n_steps=self.n_steps,
            max_steps=self.max_steps,
            tolerance=self.tolerance,
            baseline=self.map_baseline,
            target=self.map_target,
            output=self.map_output,
            reduction=self.map_reduction,
        )

    @property
    def needs_maps(self) -> bool:
        return self.overlay_prob > 0 or self.stored_logits

    @property
    def needs_live_teacher(self) -> bool:
        return (self.distill_loss_weight > 0 and not self.stored_logits) or self.attention_loss_weight > 0


TEACHER_FIELDS = tuple(
    "seed dataset revision image_column label_column train_split validation_split validation_fraction train_limit "
    "teacher teacher_args teacher_checkpoint teacher_mean teacher_std teacher_epochs".split()
)
TRAINING_FIELDS = tuple(
    "batch_size opt lr weight_decay momentum sched warmup_epochs min_lr grad_accum_steps clip_grad "
    "model_ema model_ema_decay train_crop scale_min hflip aa color_jitter reprob mixup cutmix smoothing "
    "max_steps_per_epoch".split()
)
MAPS_FIELDS = tuple(
    "engine n_steps max_steps tolerance map_baseline map_target map_output map_reduction map_size stored_logits".split()
)
STUDENT_FIELDS = tuple(
    "student student_args student_drop student_init overlay_prob overlay_weight overlay_max_power overlay_source "
    "teacher_view loss_type distill_loss_weight task_loss_weight temperature attention_loss_weight epochs".split()
)
EVALUATE_FIELDS = ("test_split", "test_limit", "corruptions")
