"""What a run folder tells of a student, and of runs that differ in their seed alone."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from timm_igkd.errors import InputError
from timm_igkd.evaluation.comparison import seed_interval
from timm_igkd.files import MARKERS, read_mapping
from timm_igkd.hub.cards import hub_dataset_id, public_name
from timm_igkd.maps.manifest import Provenance
from timm_igkd.report.run_files import Metrics, read_maps, read_metrics

Part = Literal["teacher", "student"]

_ORIGINS = {
    "random": "random weights",
    "pretrained": "its pretrained weights",
    "checkpoint": "the weights of a checkpoint",
    "teacher": "the weights of the teacher's kept layers",
}
_NUMBERS = ("overlay_prob", "distill_loss_weight", "attention_loss_weight", "explanation_loss_weight")
_OF_SEED = {"teacher", "student", "maps"}
_SAME_RUN = {"seed", "name", "output_dir", "resume", "workers", "trackers"}

# What a card calls a setting, and how the page's setup says it. One that is not here is shown by its own name; None: it
# is told in sentences or in the table of the maps, or leaves no trace in the weights.
_SETTINGS: dict[str, str | tuple[str, str] | None] = {
    "teacher_checkpoint": "Weights of the teacher",
    "student_checkpoint": "Weights of the student",
    "teacher_use_ema": "EMA weights of the teacher's checkpoint",
    "student_use_ema": "EMA weights of the student's checkpoint",
    "teacher_args": "Arguments of the teacher",
    "student_args": "Arguments of the student",
    "overlay_prob": ("Overlay probability", "probability {} per image"),
    "overlay_weight": ("Overlay weight", "weight of the map {}"),
    "overlay_max_power": "Largest exponent of the map",
    "overlay_source": ("Overlaid map", "maps {}"),
    "teacher_view": ("The teacher sees", "the teacher’s view {}"),
    "loss_type": ("Distillation loss", "{}"),
    "distill_loss_weight": ("Weight of the distillation loss", "weight {}"),
    "task_loss_weight": "Weight of the cross-entropy",
    "attention_loss_weight": ("Weight of attention transfer", "weight {}"),
    "explanation_loss_weight": ("Weight of the explanation loss", "weight {}"),
    "explanation_map": ("Map of the student in the explanation loss", "the student’s map {}"),
    "stored_logits": "Stored logits of the teacher",
    "train_limit": (
        "Training images, drawn by the seed with every class in its share",
        "{} training images, drawn by the seed with every class in its share",
    ),
    "unlabeled": "Images without labels",
    "unlabeled_split": "Split of the images without labels",
    "test_limit": ("Test images, drawn by the seed with every class in its share", "{} test images, drawn alike"),
    "batch_size": ("Batch size per process", "batch size {}"),
    "opt": ("Optimiser", "{}"),
    "lr": ("Learning rate", "learning rate {}"),
    "min_lr": "Last learning rate",
    "sched": "Schedule",
    "grad_accum_steps": "Batches per optimiser step",
    "clip_grad": "Largest gradient norm",
    "model_ema": "Moving average of the weights",
    "model_ema_decay": "Decay of the moving average",
    "model_ema_warmup": "The decay rises to that",
    "train_crop": "Crop",
    "scale_min": "Smallest area of a crop",
    "hflip": "Horizontal flip",
    "aa": "Auto-augment",
    "reprob": "Random erasing",
    "smoothing": "Label smoothing",
    "temperature": ("Temperature", "temperature {}"),
    "epochs": ("Epochs", "{} epochs"),
    "seed": ("Seed", "seed {}"),
    **dict.fromkeys(
        "name output_dir resume dataset revision train_split validation_split test_split corruptions "
        "workers trackers compare seeds export teacher teacher_epochs teacher_init student student_drop "
        "student_init maps engine n_steps max_steps tolerance map_method map_baseline map_target map_output "
        "map_reduction map_size".split()
    ),
}


@dataclass(frozen=True)
class RunFacts:
    """What is known of how a student came about; all of it may be empty.

    Attributes:
        config: config.yaml of the run.
        metrics: metrics.json.
        environment: environment.json.
        provenance: of the maps.
        seed_metrics: metrics of the runs that differ in their seed alone, this one included; empty for one run.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Metrics | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance | None = None
    seed_metrics: Sequence[Metrics] = ()

    @property
    def dataset(self) -> str:
        """Name of the data set; empty where it is not known."""
        return str(self.config.get("dataset") or (self.metrics and self.metrics.dataset) or "")

    @property
    def revision(self) -> str | None:
        """Revision of a data set of the Hub: the commit that was read, else as it was given."""
        maps = self.provenance.dataset if self.provenance else None
        of_maps = maps.revision if maps and maps.name == self.dataset else None  # they may be of a copy
        return (self.metrics and self.metrics.dataset_revision) or of_maps or self.config.get("revision")

    @property
    def dataset_id(self) -> str | None:
        """Id on the Hub of the data set; None of any other."""
        return hub_dataset_id(self.dataset, self.revision)

    @property
    def public_dataset(self) -> str:
        """The data set's name as others may read it: its id, of a folder the last part of the path."""
        return self.dataset_id or public_name(self.dataset)

    @property
    def is_tested_on_part(self) -> bool:
        """Whether its numbers are of images drawn from the test split (test_limit), not of all of it."""
        if self.metrics is None or self.metrics.is_part is not None:
            return self.metrics is not None and bool(self.metrics.is_part)
        limit = self.config.get("test_limit")
        return isinstance(limit, int) and self.metrics.n >= limit  # of a run of before that was noted

    @property
    def is_distilled(self) -> bool:
        """Whether the student learnt from the teacher's answers or features; False where no weight is known."""
        return any((self.config.get(f"{loss}_loss_weight") or 0) > 0 for loss in ("distill", "attention"))

    @property
    def uses_maps(self) -> bool:
        """Whether the student learnt from maps, overlaid or as targets of its own."""
        return any((self.config.get(name) or 0) > 0 for name in ("overlay_prob", "explanation_loss_weight"))

    @property
    def reads_store(self) -> bool:
        """Whether it learnt from maps or from stored logits."""
        return self.uses_maps or bool(self.config.get("stored_logits"))


def read_run(folder: Path, seed_runs: Sequence[Path] = (), *, finished: bool = False) -> RunFacts:
    """Return what a run folder, and others of the same settings and other seeds, tell.

    Args:
        folder: of the run.
        seed_runs: the others.
        finished: all its files must be there; otherwise one that is absent is empty.

    Raises:
        MissingFileError: the run is not finished.
        InputError: a file that cannot be read, or runs that differ in more than the seed.
    """
    config = _read(folder / "config.yaml", finished)
    _check_numbers(config, folder / "config.yaml")
    metrics = _read_metrics(folder, finished)
    seed_metrics, seeds = [], [config.get("seed")]
    for other in seed_runs:
        found, result = _read(other / "config.yaml"), _read_metrics(other)
        if metrics is None or result is None:
            raise InputError(
                f"runs of several seeds need metrics.json each; {str(other if metrics else folder)!r} has none"
            )
        different = sorted(k for k in {*config, *found} - _SAME_RUN if config.get(k) != found.get(k))
        if not different:
            different = _different_reads(folder, other, config)
            different += ["number of test images"] * (metrics.n != result.n)
        if different or found.get("seed") in seeds:
            what = f"{different[0]} differs" if different else f"seed {found.get('seed')} is there already"
            raise InputError(
                f"{str(other)!r} is no run of {str(folder)!r} with another seed alone: {what}; leave it out"
            )
        seed_metrics.append(result)
        seeds.append(found.get("seed"))
    return RunFacts(
        config=config,
        metrics=metrics,
        environment=_read(folder / "environment.json", finished),
        provenance=read_maps(folder),
        seed_metrics=[metrics, *seed_metrics] if metrics and seed_metrics else (),
    )


def _different_reads(folder: Path, other: Path, config: Mapping[str, Any]) -> list[str]:
    """Return in what two runs of equal settings differ but for the seed: what they read, and how they were launched.

    As far as the markers of both tell it. Maps and a trained teacher are a seed's own, and so are images that it draws.
    """
    drawn = {"training images": config.get("train_limit"), "test images": config.get("test_limit")}
    different: list[str] = []
    for stage in ("teacher", "student", "evaluate"):
        mine, theirs = (_read(path / MARKERS / f"{stage}.json") for path in (folder, other))
        for part in ("inputs", "launch"):
            here, there = mine.get(part), theirs.get(part)
            if isinstance(here, dict) and isinstance(there, dict):
                known = [name for name in here.keys() & there.keys() - _OF_SEED if not drawn.get(name)]
                different += sorted(name for name in known if here[name] != there[name])
    return different


def _check_numbers(config: Mapping[str, Any], path: Path) -> None:
    """Raise InputError for a setting whose value is computed with and is no number."""
    for name in _NUMBERS:
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float | None) or value != value:
            raise InputError(f"{str(path)!r} has {name} {value!r}, expected a number; restore it")


def _read(path: Path, required: bool = False) -> dict[str, Any]:
    """Read a file of names with values; one that is absent is empty unless it is required."""
    return read_mapping(path) if required or path.exists() or path.is_symlink() else {}


def _read_metrics(folder: Path, required: bool = False) -> Metrics | None:
    path = folder / "metrics.json"
    return read_metrics(path) if required or path.exists() else None


def origin(config: Mapping[str, Any], part: Part) -> str:
    """Return what the teacher or student of a run started from.

    Args:
        config: of the run.
        part: which of the two.

    Returns:
        "random", "pretrained" (the name's own weights), "checkpoint" (a file's), or of a student "teacher": the layers
        that it keeps of a teacher, which itself began somewhere.
    """
    is_given = part == "teacher" and not config.get("teacher_epochs")
    start = "pretrained" if is_given else str(config.get(f"{part}_init", "random"))
    return "checkpoint" if start == "pretrained" and config.get(f"{part}_checkpoint") else start


def start_of(config: Mapping[str, Any], part: Part) -> str:
    """Return the `origin` of a model in words."""
    return _ORIGINS.get(origin(config, part), _ORIGINS["random"])


def setting_words(name: str) -> str | None:
    """Return what a setting is called; None where cards do not list it."""
    found = _SETTINGS.get(name, name.replace("_", " ").capitalize())
    return found[0] if isinstance(found, tuple) else found


def setting_phrase(name: str, value: str) -> str:
    """Return a setting as the page's setup says it."""
    found = _SETTINGS[name]
    assert isinstance(found, tuple)
    return found[1].format(value)


def seed_summary(top1: Sequence[float]) -> dict[str, Any]:
    """Return n, mean, standard deviation and the 95 % t interval of the mean; `interval` is None without any spread."""
    return {
        "n": len(top1),
        "mean": statistics.fmean(top1),
        "sd": statistics.stdev(top1),
        "interval": seed_interval(top1),
    }
