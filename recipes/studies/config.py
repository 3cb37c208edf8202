"""The settings of a study: which cells, how many seeds, which contrasts; read from one YAML (see configs/study_*.yaml).

A cell is a training recipe as option values; every setting that changes a number enters the hash that names its runs.
Paths do not: rows of several machines, whose data lie elsewhere, belong together (the rows record the data's own hash).
"""

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from timm.optim import list_optimizers

from timm_igkd.attribution.ig_options import IGOptions
from timm_igkd.distillation.losses import KD_LOSSES
from timm_igkd.errors import InputError, check_range, nearest
from timm_igkd.overlay.blend import IGOverlay
from timm_igkd.overlay.controls import OverlaySource
from timm_igkd.overlay.device_loader import PaddingMode
from timm_igkd.runs.parsing import convert_value, parse_config

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
        "lr": 0.4,
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
        overlay_source: what is overlaid; "random_teacher": the maps of the teacher's architecture with random weights.
        logits: "aligned": stored, of the clean uncropped image; "shuffled": stored, of another image (one derangement
            per seed, as in the released code); "live": the teacher in the loop, on the view of `teacher_view`.
        subset_fraction: share of every class trained on, drawn anew for each seed.
        padding: this and all up to `cutout` as in timm_igkd.overlay.device_images.DeviceAugmentation.
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
    teacher_view: Literal["clean", "same"] = "clean"
    logits: Logits = "aligned"
    loss_type: str = "kl"
    distill_loss_weight: float = 0.0
    temperature: float = 2.5
    attention_loss_weight: float = 0.0
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
    save: bool = False

    def __post_init__(self) -> None:
        IGOverlay(self.overlay_prob, self.overlay_weight, self.overlay_max_power)
        for name in ("epochs", "batch_size"):
            check_range(name, getattr(self, name), 1)
        for name in "drop padding cutout warmup_epochs lr weight_decay momentum attention_loss_weight".split():
            check_range(name, getattr(self, name), 0, sys.float_info.max)
        for name in ("distill_loss_weight", "hflip", "smoothing"):
            check_range(name, getattr(self, name), 0, 1)
        if self.temperature <= 0 or not 0 < self.subset_fraction <= 1:
            raise InputError(
                f"temperature must be above 0 and subset_fraction in (0, 1], got {self.temperature:g} and "
                f"{self.subset_fraction:g}"
            )
        names = [str(name) for name in list_optimizers()]
        if self.opt not in names:
            raise InputError(f"unknown optimiser {self.opt!r}{nearest(self.opt, names)}; timm.optim lists them")
        if self.loss_type not in KD_LOSSES:
            raise InputError(f"unknown loss_type {self.loss_type!r}{nearest(self.loss_type, KD_LOSSES)}")
        if self.attention_loss_weight > 0 and self.logits != "live":
            raise InputError("attention transfer needs the teacher in the loop; set logits: live")

    @property
    def needs_maps(self) -> bool:
        """Whether the run overlays images."""
        return self.overlay_prob > 0

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


_ADDED = ("padding_mode", "alternate_flip")
"""Settings that came after the first rows: at their defaults they change no number, and no hash of a run."""


@dataclass(frozen=True)
class StudyConfig:
    """One study: a grid of cells and seeds."""

    name: str = field(metadata={"help": "of the study"})
    title: str = field(default="", metadata={"help": "one line for the report"})
    purpose: Literal["check", "primary", "exploratory"] = field(
        default="exploratory", metadata={"help": "check: of the machinery, no conclusion is drawn"}
    )
    question: str = field(default="", metadata={"help": "what the study asks"})
    output_dir: str = field(
        default="", metadata={"help": "rows and predictions; default: recipes/results/study_<name>"}
    )
    work_dir: str = field(default="", metadata={"help": "maps and marks of runs under way; default: runs/study_<name>"})

    dataset: str = field(default="../shared/data/cifar10", metadata={"help": "Hub id, folder or digits"})
    revision: str | None = field(default=None, metadata={"help": "of a Hub dataset"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    train_limit: int | None = field(default=None, metadata={"help": "only its first images"})
    evaluate_on: Literal["test", "validation"] = field(
        default="test", metadata={"help": "validation: a tenth of every class is cut from the training split"}
    )
    test_split: str = field(default="test", metadata={"help": "split to evaluate on"})
    test_limit: int | None = field(default=None, metadata={"help": "only its first images"})
    transfer_dataset: str | None = field(default=None, metadata={"help": "other images of the same classes"})
    transfer_split: str = field(default="test", metadata={"help": "its split"})

    teacher: str | None = field(default=None, metadata={"help": "timm name, hf-hub:… or local-dir:…"})
    teacher_args: dict[str, Any] = field(default_factory=dict, metadata={"help": "its arguments"})
    teacher_checkpoint: str | None = field(default=None, metadata={"help": "its weights"})
    teacher_mean: tuple[float, float, float] | None = field(default=None, metadata={"help": "its normalisation"})
    teacher_std: tuple[float, float, float] | None = field(default=None, metadata={"help": "its normalisation"})
    n_steps: int | Literal["auto"] = field(default=50, metadata={"help": "integration steps of the maps"})

    first_seed: int = field(default=0, metadata={"help": "number of the first seed"})
    seeds: int = field(default=3, metadata={"help": "runs of every cell"})
    base: dict[str, Any] = field(default_factory=dict, metadata={"help": "settings of all cells"})
    cells: dict[str, Any] = field(default_factory=dict, metadata={"help": "name: settings"})
    contrasts: tuple[Any, ...] = field(default=(), metadata={"help": "pairs [a, b] of cells, named in advance"})
    outcomes: tuple[str, ...] = field(default=("top1", "corruption_top1"), metadata={"help": "primary first"})
    smallest_effect: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "outcome: points of the smallest difference of interest, bound of its equivalence tests"},
    )
    ended: str = field(
        default="",
        metadata={"help": "why a primary study ended before its plan was complete; until then it claims nothing"},
    )

    corruption_images: int = field(default=0, metadata={"help": "test images per corruption; 0: none"})
    ig_images: int = field(default=0, metadata={"help": "test images whose IG maps are compared; 0: none"})
    latency: bool = field(default=True, metadata={"help": "measure it, once per architecture"})

    launch: str = field(default="", metadata={"help": "options of accelerate launch, for the command in the report"})
    parallel: int = field(default=1, metadata={"help": "runs at once, each a process"})
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = field(
        default="none", metadata={"help": "torch.compile mode of the student; reduce-overhead uses CUDA graphs"}
    )
    merge: tuple[str, ...] = field(default=(), metadata={"help": "output folders of other machines to take rows from"})
    report: bool = field(default=True, metadata={"help": "write the report of this study at the end"})

    def __post_init__(self) -> None:
        if "/" in self.name or self.name in ("", ".", ".."):
            raise InputError(f"name is a part of folder names, got {self.name!r}")
        object.__setattr__(self, "output_dir", self.output_dir or f"recipes/results/study_{self.name}")
        object.__setattr__(self, "work_dir", self.work_dir or f"runs/study_{self.name}")
        for name in ("seeds", "parallel"):
            check_range(name, getattr(self, name), 1)
        for name in ("first_seed", "corruption_images", "ig_images"):
            check_range(name, getattr(self, name), 0)
        for outcome, points in self.smallest_effect.items():
            if outcome not in self.outcomes:
                raise InputError(f"smallest_effect names no outcome: {outcome!r}{nearest(outcome, self.outcomes)}")
            if isinstance(points, bool) or not isinstance(points, int | float) or not 0 < points < math.inf:
                raise InputError(f"smallest_effect of {outcome} must be above 0 points, got {points!r}")
        for name in ("train_limit", "test_limit"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1)
        object.__setattr__(self, "cells", self._expand())
        object.__setattr__(self, "contrasts", self._checked_contrasts())
        self._check_teacher()
        self.ig_options()

    def _expand(self) -> dict[str, Cell]:
        """Return the cells; one with a grid (setting: list) becomes one per combination, named after it."""
        if not self.cells:
            raise InputError(f"study {self.name!r} has no cells; add some under cells:")
        cells: dict[str, Cell] = {}
        for name, given in self.cells.items():
            settings = dict(given or {})
            grid = settings.pop("grid", {})
            for key, values in grid.items():
                if not isinstance(values, list) or not values:
                    raise InputError(f"cell {name!r}: grid {key} must be a list of values, got {values!r}")
            for values in itertools.product(*grid.values()):
                chosen = dict(zip(grid, values, strict=True))
                label = ", ".join([name, *(f"{key} {value}" for key, value in chosen.items())])
                cells[label] = create_cell(label, self.base | settings | chosen)
        return cells

    def _checked_contrasts(self) -> tuple[tuple[str, str], ...]:
        pairs = []
        for pair in self.contrasts:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise InputError(f"contrasts are pairs of cells such as [KD&IG, KD], got {pair!r}")
            for name in pair:
                if name not in self.cells:
                    raise InputError(f"contrast {list(pair)} names an unknown cell{nearest(str(name), self.cells)}")
            pairs.append((str(pair[0]), str(pair[1])))
        return tuple(pairs)

    def _check_teacher(self) -> None:
        for name, cell in self.cells.items():
            uses = cell.needs_maps or cell.distill_loss_weight > 0 or cell.attention_loss_weight > 0
            if self.teacher is None and (uses or cell.student is None):
                raise InputError(f"cell {name!r} needs a teacher, got none; set teacher")

    def ig_options(self) -> IGOptions:
        return IGOptions(n_steps=self.n_steps)

    @property
    def seed_range(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def run_hash(self, cell: Cell) -> str:
        """Return the name of a cell's runs: 12 hex digits of all settings that change a number."""
        return hashlib.sha256(json.dumps(self.settings(cell), sort_keys=True).encode()).hexdigest()[:12]

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Return what a cell's runs depend on, paths and what only changes speed left out."""
        names = (
            "train_split train_limit evaluate_on test_split test_limit teacher_args teacher_mean teacher_std n_steps "
            "corruption_images ig_images"
        )
        study = {name: getattr(self, name) for name in names.split()}
        kept = {
            name: value
            for name, value in asdict(cell).items()
            if name != "save" and not (name in _ADDED and value == getattr(Cell, name))
        }
        return json.loads(json.dumps({"study": study, "cell": kept}))


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
        values = {key: convert_value(key, value, hints[key]) for key, value in (PROTOCOLS[protocol] | given).items()}
        return replace(Cell(), **values)
    except InputError as error:
        raise InputError(f"cell {name!r}: {error}") from error


def load_study(path: str | Path, *overrides: str) -> StudyConfig:
    """Return the study of a YAML file, with flags such as "--seeds=2" over it."""
    return parse_config(StudyConfig, ["--config", str(path), *overrides])
