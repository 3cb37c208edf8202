"""The model card of a student, from what its run folder holds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from timm_igkd.cards import hub_dataset_id, public_name, read_template, render_card
from timm_igkd.errors import InputError
from timm_igkd.model_loading import count_macs, count_parameters, needs_plugin
from timm_igkd.report_tables import flat_rows, large, plain, result_rows, size_rows, summary_sentence
from timm_igkd.store_files import read_json

# 97.5 % quantiles of the t distribution for 1 to 30 degrees of freedom; above, the normal one is close.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_SAME_RUN = {"seed", "name", "output_dir", "resume", "workers", "trackers"}
_SETTINGS = (
    ("Overlay probability", "overlay_prob"),
    ("Overlay weight", "overlay_weight"),
    ("Largest exponent of the map", "overlay_max_power"),
    ("Overlaid map", "overlay_source"),
    ("The teacher sees", "teacher_view"),
    ("Distillation loss", "loss_type"),
    ("Weight of the distillation loss", "distill_loss_weight"),
    ("Weight of the cross-entropy", "task_loss_weight"),
    ("Temperature", "temperature"),
    ("Weight of attention transfer", "attention_loss_weight"),
    ("Logits stored with the maps", "stored_logits"),
    ("Epochs", "epochs"),
    ("Batch size per process", "batch_size"),
    ("Optimiser", "opt"),
    ("Learning rate", "lr"),
    ("Weight decay", "weight_decay"),
    ("Schedule", "sched"),
    ("Crop", "train_crop"),
    ("Horizontal flip", "hflip"),
    ("Auto-augment", "aa"),
    ("Random erasing", "reprob"),
    ("Mixup, CutMix", ("mixup", "cutmix")),
    ("Label smoothing", "smoothing"),
    ("Seed", "seed"),
)


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
    metrics: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    seed_metrics: Sequence[Mapping[str, Any]] = ()


def read_run(folder: Path, seed_runs: Sequence[Path] = ()) -> RunFacts:
    """Return what a run folder, and others of the same settings and other seeds, tell.

    Raises:
        InputError: a file that cannot be read, or runs that differ in more than the seed.
    """
    config, metrics = _yaml(folder / "config.yaml"), _json(folder / "metrics.json")
    seed_metrics = []
    for other in seed_runs:
        found, result = _yaml(other / "config.yaml"), _json(other / "metrics.json")
        if "top1" not in metrics or "top1" not in result:
            raise InputError(
                f"runs of several seeds need metrics.json each; {str(other if metrics else folder)!r} has none"
            )
        different = [k for k in {*config, *found} - _SAME_RUN if config.get(k) != found.get(k)]
        if different or found.get("seed") == config.get("seed"):
            what = f"{sorted(different)[0]} differs" if different else "its seed is the same"
            raise InputError(
                f"{str(other)!r} is no run of {str(folder)!r} with another seed alone: {what}; leave it out"
            )
        seed_metrics.append(result)
    return RunFacts(
        config=config,
        metrics=metrics,
        environment=_json(folder / "environment.json"),
        provenance=_json(folder / "maps" / "provenance.json"),
        seed_metrics=[metrics, *seed_metrics] if seed_metrics else (),
    )


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{str(path)!r} is not YAML; restore it, or push the run's student folder alone") from error
    return content if isinstance(content, dict) else {}


def seed_summary(top1: Sequence[float]) -> dict[str, float]:
    """Return n, mean, standard deviation and the 95 % t interval of the mean."""
    n, mean, sd = len(top1), statistics.fmean(top1), statistics.stdev(top1)
    half = (_T[n - 2] if n - 2 < len(_T) else 1.96) * sd / math.sqrt(n)
    return {"n": n, "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def model_card(
    model: nn.Module, repo_id: str, run: RunFacts, *, maps_repo: str | None = None, license: str = "apache-2.0"
) -> str:
    """Return the card of a student.

    Args:
        model: the student, as loaded.
        repo_id: user/name on the Hub.
        run: what is known of it.
        maps_repo: user/name of the dataset of its teacher's maps.
        license: an identifier of the Hub.
    """
    config: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    metrics = run.metrics if "top1" in run.metrics else {}
    dataset = str(run.config.get("dataset") or metrics.get("dataset") or "")
    hardware = metrics.get("hardware")
    if hardware:
        hardware = f"{hardware}, {metrics.get('device', 'cpu')}, {metrics.get('threads', '?')} threads"
    return render_card(
        "model_card.md",
        metadata=_metadata(repo_id, run, metrics, dataset, maps_repo, license).to_yaml(),
        name=repo_id.split("/")[1],
        repo_id=repo_id,
        introduction=_introduction(model, run, dataset),
        summary=summary_sentence(metrics) if metrics else "",
        needs_plugin=needs_plugin(model),
        architecture=config["architecture"],
        input_size=config["input_size"],
        num_classes=model.num_classes,
        dataset_name=public_name(dataset),
        metrics=metrics,
        has_teacher=bool(metrics.get("teacher")),
        results=result_rows(metrics) if metrics else [],
        seeds=seed_summary([m["top1"] for m in run.seed_metrics]) if run.seed_metrics else None,
        sizes=size_rows(metrics or {"num_parameters": count_parameters(model), "macs": count_macs(model)}),
        hardware=hardware,
        robustness=flat_rows(metrics.get("robustness") or {}),
        settings=_settings(run.config),
        ig_options=_ig_options(run),
        overlaid=(run.config.get("overlay_prob") or 0) > 0,
        maps_repo=maps_repo,
        citations=read_template("citations.bib").strip(),
        versions=", ".join(
            f"{name} {run.environment[name]}" for name in ("timm_igkd", "timm", "torch") if run.environment.get(name)
        ),
    )


def _introduction(model: nn.Module, run: RunFacts, dataset: str) -> str:
    config: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    text = f"An image classifier: `{config['architecture']}` with {large(count_parameters(model))} parameters"
    if run.config.get("teacher"):
        text += f", distilled from `{public_name(str(run.config['teacher']))}`"
        if run.config.get("student") is None and run.config.get("student_drop"):
            text += f" without its last {run.config['student_drop']} blocks"
    if dataset:
        text += f" on `{public_name(dataset)}`"
    if (run.config.get("overlay_prob") or 0) > 0:
        text += ", with integrated-gradients maps of the teacher overlaid on part of the training images"
    return text + "."


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not config:
        return []
    rows = [("Teacher", public_name(str(config.get("teacher"))))]
    if config.get("teacher_epochs"):
        rows.append(("Teacher's training", f"{config['teacher_epochs']} epochs from random weights, on the same data"))
    student = config.get("student") or f"the teacher without its last {config.get('student_drop')} blocks"
    rows.append(("Student", f"{student}, from {_start(config)} weights"))
    splits = [str(config[key]) for key in ("train_split", "validation_split", "test_split") if config.get(key)]
    rows.append(("Splits", ", ".join(splits)))
    for name, keys in _SETTINGS:
        wanted = (keys,) if isinstance(keys, str) else keys
        if all(key in config for key in wanted):
            rows.append((name, ", ".join(plain(config[key]) for key in wanted)))
    return rows


def _start(config: Mapping[str, Any]) -> str:
    return "the teacher's" if config.get("student") is None and config.get("student_init") == "teacher" else "random"


def _ig_options(run: RunFacts) -> list[tuple[str, str]]:
    """Return how the maps were made, as their provenance says it."""
    maps = run.provenance
    if "options" not in maps:
        return []
    rows = [(name.replace("_", " ").capitalize(), plain(value)) for name, value in maps["options"].items()]
    rows.append(("Engine", f"{maps.get('engine', '?')}, {maps.get('dtype', '?')}"))
    rows.append(("Images", plain(maps.get("n"))))
    numbers = maps.get("statistics") or {}
    for name, key in (
        ("Steps on average", "mean_steps"),
        ("Absolute convergence delta, median", "abs_delta_median"),
        ("Absolute convergence delta, 90th percentile", "abs_delta_p90"),
    ):
        if key in numbers:
            rows.append((name, f"{numbers[key]:.3g}"))
    return rows


def _metadata(
    repo_id: str,
    run: RunFacts,
    metrics: Mapping[str, Any],
    dataset: str,
    maps_repo: str | None,
    license: str,
) -> ModelCardData:
    source = run.provenance.get("dataset") or {}
    revision = run.config.get("revision") or source.get("revision")
    dataset_id = hub_dataset_id(dataset, revision) if dataset else None
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=dataset_id or public_name(dataset),
            dataset_name=public_name(dataset),
            dataset_split=metrics.get("split"),
            dataset_revision=revision if dataset_id else None,
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(metrics[key], 2),
        )
        for name, key in (("Top-1 accuracy, %", "top1"), ("Top-5 accuracy, %", "top5"))
        if key in metrics
    ]
    datasets = [name for name in (dataset_id, maps_repo) if name]
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=license,
        base_model=base_model(run.config),
        datasets=datasets or None,
        metrics=["accuracy"] if results else None,
        tags=["image-classification", "timm", "timm-igkd", "knowledge-distillation", "integrated-gradients"],
        model_name=repo_id.split("/")[1] if results else None,
        eval_results=results or None,
    )


def base_model(config: Mapping[str, Any]) -> str | None:
    """Return the Hub id of a pretrained teacher; None where it was trained in the run or is known by no Hub id."""
    teacher = str(config.get("teacher") or "")
    if not teacher or config.get("teacher_epochs") or config.get("teacher_checkpoint"):
        return None
    if teacher.startswith("hf-hub:"):
        return teacher.removeprefix("hf-hub:").partition("@")[0]
    known = timm.get_pretrained_cfg(teacher) if timm.is_model(teacher) else None
    hub_id = known.hf_hub_id if known else None
    return (
        f"{hub_id}{teacher if '.' in teacher else f'{teacher}.{known.tag}'}" if hub_id == "timm/" and known else hub_id
    )
