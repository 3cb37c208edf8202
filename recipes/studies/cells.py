"""A cell of a study: a training recipe as option values, over those of a protocol."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from timm_igkd.attribution.ig_options import IGOptions, Method
from timm_igkd.distillation.losses import KD_LOSSES
from timm_igkd.distillation.options import ExplanationMap, JoinedChannels, TeacherViewMode, check_temperature
from timm_igkd.errors import InputError, check_range, nearest
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.controls import OverlaySource
from timm_igkd.overlay.device_views import PaddingMode
from timm_igkd.runs.parsing import convert_value
from timm_igkd.training.settings import TrainingSettings

StudySource = Literal["aligned", "shuffled", "permuted", "noise", "blank", "sobel", "random_teacher"]
Logits = Literal["aligned", "shuffled", "live"]
Protocol = Literal["paper", "modern", "light", "fast"]

# What a protocol sets where a cell does not; PAPER settings: arXiv 2506.14440.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "paper": {"epochs": 100, "batch_size": 64, "opt": "adam", "lr": 1e-3, "sched": "none", "padding": 4, "hflip": 0.5},
    "modern": {
        "epochs": 200,
        "batch_size": 128,
        "opt": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "sched": "cosine",
        "warmup_epochs": 5,
        "padding": 4,
        "hflip": 0.5,
        "cutout": 8,
        "logits": "live",
        "teacher_view": "same",
    },
    # After K. Jordan's airbench94, arXiv 2404.00498; chosen on a validation cut, see configs/study_real_recipe.yaml
    "fast": {
        "epochs": 12,
        "batch_size": 256,
        "opt": "sgd",
        "lr": 0.2,
        "weight_decay": 5e-4,
        "sched": "triangular",
        "warmup_epochs": 2,
        "smoothing": 0.2,
        "padding": 2,
        "padding_mode": "reflect",
        "hflip": 0.5,
        "alternate_flip": True,
        "teacher_view": "same",
    },
    "light": {"epochs": 20, "batch_size": 64, "opt": "adamw", "lr": 3e-3, "sched": "cosine", "warmup_epochs": 1},
}


@dataclass(frozen=True)
class Cell:
    """One training recipe; an arm is a combination of its weights and probabilities.

    Attributes:
        protocol: gives the settings that the cell leaves out.
        student: a timm name, or None: the teacher's architecture without its last `drop` entries.
        overlay_source: what overlay and explanation loss take; "random_teacher": the maps of the teacher's architecture
            with random weights.
        map_method: of these maps; of another than "ig" the study has a store beside.
        logits: "aligned": stored, of the clean uncropped image; "shuffled": stored, of another image (one derangement
            per seed, as in the released code); "live": the teacher in the loop, on the view of `teacher_view`.
        subset_fraction: share of every class trained on, drawn anew for each seed.
        padding: this and all up to `cutout` as in timm_igkd.overlay.device_views.DeviceAugmentation.
        clip_grad: this and all up to `model_ema_decay` as in timm_igkd.training.settings.TrainingSettings.
        save: keep the student's weights as float16 safetensors beside the rows.
    """

    protocol: Protocol = "paper"
    student: str | None = None
    student_args: dict[str, Any] = field(default_factory=dict)
    drop: int = 0
    overlay_prob: float = 0.0
    overlay_weight: float = 0.5
    overlay_max_power: float = 2.0
    overlay_source: StudySource = "aligned"
    map_method: Method = "ig"
    teacher_view: TeacherViewMode = "clean"
    logits: Logits = "aligned"
    loss_type: str = "kl"
    distill_loss_weight: float = 0.0
    temperature: float = 2.5
    attention_loss_weight: float = 0.0
    explanation_loss_weight: float = 0.0
    explanation_map: ExplanationMap = "input_x_gradient"
    subset_fraction: float = 1.0
    epochs: int = 100
    batch_size: int = 64
    opt: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    sched: Literal["cosine", "triangular", "none"] = "none"
    warmup_epochs: int = 0
    smoothing: float = 0.0
    padding: int = 0
    padding_mode: PaddingMode = "black"
    hflip: float = 0.0
    alternate_flip: bool = False
    cutout: int = 0
    clip_grad: float | None = None
    model_ema: bool = False
    model_ema_decay: float = 0.999
    save: bool = False

    def __post_init__(self) -> None:
        IGOverlay(self.overlay_prob, self.overlay_weight, self.overlay_max_power)
        self.training(seed=0)
        check_range("batch_size", self.batch_size, 1)
        for name in ("drop", "padding", "cutout", "attention_loss_weight", "explanation_loss_weight"):
            check_range(name, getattr(self, name), 0, sys.float_info.max)
        for name in ("distill_loss_weight", "hflip", "smoothing"):
            check_range(name, getattr(self, name), 0, 1)
        check_temperature(self.temperature)
        if not 0 < self.subset_fraction <= 1:
            raise InputError(f"subset_fraction must be in (0, 1], got {self.subset_fraction:g}")
        if self.loss_type not in KD_LOSSES:
            raise InputError(f"unknown loss_type {self.loss_type!r}{nearest(self.loss_type, KD_LOSSES)}")
        if self.attention_loss_weight > 0 and self.logits != "live":
            raise InputError("attention transfer needs the teacher in the loop; set logits: live")
        if self.map_method == "none":
            raise InputError("map_method none makes no maps; name the method of the maps, or leave it out")
        if self.map_method != "ig" and self.overlay_source == "random_teacher":
            raise InputError(
                f"maps of a random_teacher are ig alone, got map_method {self.map_method}; drop one of them"
            )

    def training(self, seed: int, compile_mode: str = "none") -> TrainingSettings:
        """Return how a run of this cell is optimised."""
        names = {item.name for item in fields(TrainingSettings)} & {item.name for item in fields(self)}
        return TrainingSettings(**{name: getattr(self, name) for name in names}, seed=seed, compile_mode=compile_mode)

    @property
    def needs_maps(self) -> bool:
        """Whether the run overlays images, or holds the student's maps against the teacher's."""
        return self.overlay_prob > 0 or self.explanation_loss_weight > 0

    @property
    def store(self) -> str:
        """The name of the store with the cell's maps, see `store_options`."""
        if self.overlay_source == "random_teacher":
            return "maps_random_teacher"
        return "maps" if self.map_method == "ig" else f"maps_{self.map_method}"

    @property
    def store_read(self) -> str | None:
        """The store whose maps the cell's runs are overlaid with or explained by, else that of its logits, or None."""
        if self.needs_maps:
            return self.store
        return "maps" if self.needs_stored_logits else None

    @property
    def explanation_channels(self) -> JoinedChannels:
        """How the student's map joins colour channels: as the store does."""
        return "abs_sum" if store_options(self.store).reduction == "abs_sum" else "positive"

    @property
    def needs_stored_logits(self) -> bool:
        return self.distill_loss_weight > 0 and self.logits != "live"

    @property
    def needs_live_teacher(self) -> bool:
        return self.logits == "live" and (self.distill_loss_weight > 0 or self.attention_loss_weight > 0)

    @property
    def control(self) -> OverlaySource:
        """The source within the store that is read: a random teacher's maps are aligned with their images."""
        return "aligned" if self.overlay_source == "random_teacher" else self.overlay_source


def has_aligned_overlay(cell: Cell) -> bool:
    """Say whether a cell overlays images with their own maps."""
    return cell.overlay_prob > 0 and cell.overlay_source == "aligned"


def is_overlay_against_none(a: Cell, b: Cell) -> bool:
    """Say whether a overlays images with their own maps, b overlays none, and nothing else differs in their runs."""
    return has_aligned_overlay(a) and _used_settings(replace(a, overlay_prob=0.0)) == _used_settings(b)


def is_aligned_against_control(a: Cell, b: Cell) -> bool:
    """Say whether a overlays images with their own maps, b with others as often, and nothing else differs."""
    return (
        has_aligned_overlay(a)
        and b.overlay_source != "aligned"
        and _used_settings(replace(a, overlay_source=b.overlay_source)) == _used_settings(b)
    )


def _used_settings(cell: Cell) -> Cell:
    """Return a cell with the settings at their defaults that its runs do not depend on."""
    unused = ["protocol", "save"]  # a protocol gave what the other settings say
    if cell.overlay_prob == 0:
        unused += ["overlay_weight", "overlay_max_power"]
    if cell.overlay_prob == 0 or not cell.needs_live_teacher:
        unused.append("teacher_view")
    if not cell.needs_maps:
        unused += ["overlay_source", "map_method"]
    if cell.explanation_loss_weight == 0:
        unused.append("explanation_map")
    if cell.distill_loss_weight == 0:
        unused += ["temperature", "loss_type"]
        unused += ["logits"] if cell.attention_loss_weight == 0 else []
    if not cell.model_ema:
        unused.append("model_ema_decay")
    return replace(cell, **{name: getattr(Cell, name) for name in unused})


ADDED = (
    *("padding_mode", "alternate_flip", "clip_grad", "model_ema", "model_ema_decay"),
    *("map_method", "explanation_loss_weight", "explanation_map"),
)
"""Settings that came after the first rows: at their defaults they change no number, and no hash of a run."""


def store_options(store: str, n_steps: int | Literal["auto"] = 50) -> IGOptions:
    """Return which maps a store of a study holds.

    Args:
        store: "maps", "maps_random_teacher", or "maps_" with another method than ig.
        n_steps: of ig, the study's.
    """
    if store in ("maps", "maps_random_teacher"):
        return IGOptions(n_steps=n_steps)
    return IGOptions(method=store.removeprefix("maps_"))  # type: ignore[arg-type]  # checked there


def create_cell(name: str, given: Mapping[str, Any]) -> Cell:
    """Return a cell of the given settings over those of its protocol.

    Raises:
        InputError: an unknown setting, or a value of the wrong type or out of range; the cell is named.
    """
    hints = get_type_hints(Cell)
    names = [item.name for item in fields(Cell)]
    for key in given:
        if key not in names:
            raise InputError(f"cell {name!r} has an unknown setting {key!r}{nearest(str(key), names)}")
    protocol = str(given.get("protocol", Cell.protocol))
    if protocol not in PROTOCOLS:
        raise InputError(f"cell {name!r}: protocol must be one of {list(get_args(Protocol))}, got {protocol!r}")
    try:
        values = {key: convert_value(key, value, hints[key]) for key, value in {**PROTOCOLS[protocol], **given}.items()}
        return replace(Cell(), **values)
    except InputError as error:
        raise InputError(f"cell {name!r}: {error}") from error
