"""The settings of a study: which cells, how many seeds, which contrasts; read from one YAML (see configs/study_*.yaml).

A cell is a training recipe as option values; every setting that changes a number enters the hash that names its runs.
Paths do not: rows of several machines, whose data lie elsewhere, belong together (the rows record the data's own hash).
"""

import hashlib
import itertools
import json
import math
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, Literal

from studies.cells import ADDED, Cell, create_cell, store_options
from studies.outcomes import PERCENTAGES
from timm_igkd.errors import InputError, check_range, nearest
from timm_igkd.runs.parsing import parse_config, setting
from timm_igkd.runs.settings import TrackerName
from timm_igkd.training.settings import CompileMode


def _in_hash(text: str, default: Any) -> Any:
    """A setting that changes numbers, and with them the name of the runs."""
    return setting(text, default, in_hash=True)


@dataclass(frozen=True)
class StudyConfig:
    """One study: a grid of cells and seeds."""

    name: str = field(metadata={"help": "of the study"})
    title: str = setting("one line for the report", "")
    purpose: Literal["check", "primary", "exploratory"] = setting(
        "check: of the machinery, no conclusion is drawn", "exploratory"
    )
    appendix: bool = setting("shown after the others, in the report's appendix", False)
    question: str = setting("what the study asks", "")
    remark: str = setting("what a reader of its rows must know", "")
    output_dir: str = setting("rows and predictions; default: recipes/results/study_<name>", "")
    work_dir: str = setting("maps and marks of runs under way; default: runs/study_<name>", "")

    dataset: str = setting("Hub id, folder or digits", "../shared/data/cifar10")
    revision: str | None = setting("of a Hub dataset", None)
    train_split: str = _in_hash("split to train on", "train")
    train_limit: int | None = _in_hash("only its first images", None)
    evaluate_on: Literal["test", "validation"] = _in_hash(
        "validation: a tenth of every class is cut from the training split", "test"
    )
    test_split: str = _in_hash("split to evaluate on", "test")
    test_limit: int | None = _in_hash("only its first images", None)
    transfer_dataset: str | None = setting("other images of the same classes", None)
    transfer_split: str = setting("its split", "test")

    teacher: str | None = setting("timm name, hf-hub:… or local-dir:…", None)
    teacher_args: dict[str, Any] = _in_hash("its arguments", {})
    teacher_checkpoint: str | None = setting("its weights", None)
    teacher_use_ema: bool = setting("the EMA weights of a .pth.tar", False)
    teacher_mean: tuple[float, float, float] | None = _in_hash("its normalisation", None)
    teacher_std: tuple[float, float, float] | None = _in_hash("its normalisation", None)
    n_steps: int | Literal["auto"] = _in_hash("integration steps of the maps", 50)

    first_seed: int = setting("number of the first seed", 0)
    seeds: int = setting("runs of every cell", 3)
    planned_seeds: int | None = setting("seeds before an extension by a rule of the plan; default: seeds", None)
    base: dict[str, Any] = setting("settings of all cells", {})
    cells: dict[str, Any] = setting("name: settings", {})
    contrasts: tuple[Any, ...] = setting("pairs [a, b] of cells, named in advance", ())
    outcomes: tuple[str, ...] = setting(
        "columns in percent, of which more is better; primary first", ("top1", "corruption_top1")
    )
    smallest_effect: dict[str, Any] = setting(
        "outcome: points of the smallest difference of interest, bound of its equivalence tests", {}
    )
    sensitivity: dict[str, Any] = setting("name: seeds, sets of seeds in which the contrasts are shown once more", {})
    amended: str = setting("when and how a primary study's plan was changed after its first run", "")
    same_maps: tuple[str, ...] = setting(
        "maps_hash of stores that are taken as the same though their rows hold no means; say why in the YAML", ()
    )
    ends: str = setting("last day of a study, UTC, year-month-day: no run is begun after it, none that was counts", "")
    ended: str = setting("why a primary study ended before its plan was complete; until then it claims nothing", "")

    failed_below: float = setting("a run that ends under this top1 is failed: listed, in no mean and no contrast", 0.0)

    corruption_images: int = _in_hash("test images per corruption; 0: none", 0)
    ig_images: int = _in_hash("test images whose IG maps are compared; 0: none", 0)
    latency: bool = setting("measure it, once per architecture", True)

    launch: str = setting("options of accelerate launch, for the command in the report", "")
    parallel: int = setting("runs at once, each a process", 1)
    compile: CompileMode = setting("torch.compile mode of the student; reduce-overhead uses CUDA graphs", "none")
    trackers: tuple[TrackerName, ...] = setting("Accelerate trackers beside the rows", ())
    rows_of: tuple[str, ...] = setting("output folders of studies whose runs are some of its own: taken over", ())
    merge: tuple[str, ...] = setting("output folders of other machines to take rows from", ())
    report: bool = setting("write the report of this study at the end", True)

    def __post_init__(self) -> None:
        if "/" in self.name or self.name in ("", ".", ".."):
            raise InputError(f"name is a part of folder names, got {self.name!r}")
        object.__setattr__(self, "output_dir", self.output_dir or f"recipes/results/study_{self.name}")
        object.__setattr__(self, "work_dir", self.work_dir or f"runs/study_{self.name}")
        for name in ("seeds", "parallel"):
            check_range(name, getattr(self, name), 1)
        if self.planned_seeds is not None:
            check_range("planned_seeds", self.planned_seeds, 1)
        for name in ("first_seed", "corruption_images", "ig_images"):
            check_range(name, getattr(self, name), 0)
        check_range("failed_below", self.failed_below, 0, 100)
        self._check_outcomes()
        for outcome, points in self.smallest_effect.items():
            if outcome not in self.outcomes:
                raise InputError(f"smallest_effect names no outcome: {outcome!r}{nearest(outcome, self.outcomes)}")
            if isinstance(points, bool) or not isinstance(points, int | float) or not 0 < points < math.inf:
                raise InputError(f"smallest_effect of {outcome} must be above 0 points, got {points!r}")
        if self.ends:
            try:
                is_day = date.fromisoformat(self.ends).isoformat() == self.ends
            except ValueError:
                is_day = False
            if not is_day:
                raise InputError(f'ends must be a day in quotes, such as "2026-12-31", got {self.ends!r}')
        for name, seeds in self.sensitivity.items():
            if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
                raise InputError(f"sensitivity {name!r} must be a list of seeds, got {seeds!r}")
        for name in ("train_limit", "test_limit"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1)
        object.__setattr__(self, "cells", self._expand())
        object.__setattr__(self, "contrasts", self._checked_contrasts())
        self._check_teacher()
        store_options("maps", self.n_steps)

    def _expand(self) -> dict[str, Cell]:
        """Return the cells; one with a grid (setting: list) becomes one per combination, named after it."""
        if not self.cells:
            raise InputError(f"study {self.name!r} has no cells; add some under cells:")
        cells: dict[str, Cell] = {}
        for name, given in self.cells.items():
            if not isinstance(given, dict | None):
                raise InputError(f"cell {name!r} must hold settings by name, got {type(given).__name__}")
            settings = dict(given or {})
            grid = settings.pop("grid", {})
            if not isinstance(grid, dict):
                raise InputError(f"cell {name!r}: grid must hold lists by name, got {type(grid).__name__}")
            for key, values in grid.items():
                if not isinstance(values, list) or not values:
                    raise InputError(f"cell {name!r}: grid {key} must be a list of values, got {values!r}")
            for values in itertools.product(*grid.values()):
                chosen = dict(zip(grid, values, strict=True))
                label = ", ".join([name, *(f"{key} {value}" for key, value in chosen.items())])
                if label in cells:
                    raise InputError(f"cell {label!r} is there twice; remove one, or a value from its grid")
                cells[label] = create_cell(label, self.base | settings | chosen)
        by_hash: dict[str, str] = {}
        for name, cell in cells.items():
            if (other := by_hash.setdefault(self.run_hash(cell), name)) != name:
                raise InputError(
                    f"cells {other!r} and {name!r} have the same settings, and so the same runs; remove one"
                )
        return cells

    def _check_outcomes(self) -> None:
        if not self.outcomes:
            raise InputError(f"study {self.name!r} has no outcomes; name at least the primary one, such as top1")
        for outcome in self.outcomes:
            if outcome not in PERCENTAGES:
                raise InputError(
                    f"outcomes are in percent, of which more is better, got {outcome!r}{nearest(outcome, PERCENTAGES)}"
                )
        if len(set(self.outcomes)) < len(self.outcomes):
            raise InputError(f"outcomes are named once each, got {list(self.outcomes)}")

    def _checked_contrasts(self) -> tuple[tuple[str, str], ...]:
        pairs: list[tuple[str, str]] = []
        for pair in self.contrasts:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise InputError(f"contrasts are pairs of cells such as [KD&IG, KD], got {pair!r}")
            for name in pair:
                if str(name) not in self.cells:
                    raise InputError(f"contrast {list(pair)} names an unknown cell{nearest(str(name), self.cells)}")
            a, b = str(pair[0]), str(pair[1])
            if a == b:
                raise InputError(f"contrast {list(pair)} is of one cell with itself; name two")
            if (a, b) in pairs or (b, a) in pairs:
                raise InputError(f"contrast {list(pair)} is there twice; remove one: Holm's p counts them all")
            pairs.append((a, b))
        return tuple(pairs)

    def _check_teacher(self) -> None:
        for name, cell in self.cells.items():
            if cell.explanation_loss_weight > 0 and self.compile != "none":
                raise InputError(
                    f"cell {name!r} has an explanation loss, which cannot be compiled; set compile to none"
                )
            uses = cell.needs_maps or cell.distill_loss_weight > 0 or cell.attention_loss_weight > 0
            if self.teacher is None and (uses or cell.student is None):
                raise InputError(f"cell {name!r} needs a teacher, got none; set teacher")

    @property
    def seed_range(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def extended_from(self) -> int | None:
        """Seeds that the study had before it was extended; None where it was not."""
        return self.planned_seeds if (self.planned_seeds or self.seeds) < self.seeds else None

    def is_over(self, started: str) -> bool:
        """Return whether a run that began then, in ISO format and UTC, came after the study's last day."""
        return bool(self.ends) and started[: len(self.ends)] > self.ends

    def run_hash(self, cell: Cell) -> str:
        """Return the name of a cell's runs: 12 hex digits of all settings that change a number."""
        return hashlib.sha256(json.dumps(self.settings(cell), sort_keys=True).encode()).hexdigest()[:12]

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Return what a cell's runs depend on, paths and what only changes speed left out."""
        study = {item.name: getattr(self, item.name) for item in fields(self) if item.metadata.get("in_hash")}
        kept = {
            name: value
            for name, value in asdict(cell).items()
            if name != "save" and not (name in ADDED and value == getattr(Cell, name))
        }
        return json.loads(json.dumps({"study": study, "cell": kept}))


def load_study(path: str | Path, *overrides: str) -> StudyConfig:
    """Return the study of a YAML file, with flags such as "--seeds=2" over it."""
    return parse_config(StudyConfig, ["--config", str(path), *overrides])
