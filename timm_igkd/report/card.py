"""The model card of a student, from what its run folder holds."""

import re
from collections.abc import Mapping
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from timm_igkd.attribution.ig_options import METHOD_NAMES, METHOD_PAPERS, Method
from timm_igkd.evaluation.latency import Timing
from timm_igkd.hub.cards import Markdown, cell, citations, code, public_name, render_card
from timm_igkd.intervals import three_digits
from timm_igkd.models.loading import count_macs, count_parameters, needs_plugin
from timm_igkd.report.licenses import license_metadata, license_of_start
from timm_igkd.report.run_facts import RunFacts, origin, seed_summary, setting_words, start_of
from timm_igkd.report.run_files import Metrics, Sizes
from timm_igkd.report.tables import (
    ABSENT,
    NARROW,
    Row,
    corruption_rows,
    export_note,
    export_rows,
    label_counts,
    large,
    plain,
    result_rows,
    size_rows,
    summary_sentence,
)
from timm_igkd.report.verdict import num_seeds, verdict

_OPTIONS = {
    "method": "Method",
    "n_steps": "Integration steps",
    "max_steps": "Most steps of an image",
    "tolerance": "Least map correlation to stop at",
    "baseline": "Baseline",
    "target": "Attributed class",
    "output": "Attributed output",
    "reduction": "Channels joined by",
}


def model_card(
    model: nn.Module, repo_id: str, run: RunFacts, *, maps_repo: str | None = None, license: str | None = None
) -> str:
    """Return the card of a student.

    Args:
        model: the student, as loaded.
        repo_id: user/name on the Hub.
        run: what is known of it.
        maps_repo: user/name of the dataset of its teacher's maps.
        license: an identifier of the Hub; None: that of what the student started from.
    """
    config: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    metrics = run.metrics
    teacher = metrics.teacher if metrics else None
    return render_card(
        "model_card.md",
        metadata=_metadata(repo_id, run, maps_repo, license or license_of_start(config, run.config)).to_yaml(),
        name=repo_id.split("/")[1],
        repo_id=repo_id,
        introduction=_introduction(model, run),
        verdict=verdict(metrics.arms if metrics else None),
        summary=summary_sentence(metrics) if metrics else "",
        needs_plugin=needs_plugin(model),
        architecture=config["architecture"],
        input_size=config["input_size"],
        image_mode={1: "L", 2: "LA", 4: "RGBA"}.get(config["input_size"][0], "RGB"),
        num_classes=model.num_classes,
        dataset_name=run.public_dataset,
        metrics=metrics,
        is_part=run.is_tested_on_part,
        has_teacher=teacher is not None,
        results=result_rows(metrics, corruptions=False) if metrics else [],
        num_seeds=num_seeds(metrics.arms if metrics else None),
        seeds=seed_summary([m.top1 for m in run.seed_metrics]) if run.seed_metrics else None,
        sizes=size_rows(metrics or Sizes(num_parameters=count_parameters(model), macs=count_macs(model)), teacher)
        + _onnx_rows(metrics.onnx_latency_ms if metrics else {}),
        exports=export_rows(metrics),
        export_note=export_note(metrics),
        hardware=_hardware(metrics),
        **_robustness(metrics),
        settings=_settings(run),
        is_distilled=run.is_distilled,
        **_maps_section(run),
        maps_repo=maps_repo,
        citations=citations(METHOD_PAPERS[_method(run)] if run.uses_maps else None),
        versions=", ".join(
            f"{name} {run.environment[name]}" for name in ("timm_igkd", "timm", "torch") if run.environment.get(name)
        ),
    )


def _hardware(metrics: Metrics | None) -> str | None:
    """Return what latencies were measured on."""
    if not metrics or not metrics.hardware:
        return None
    return f"{metrics.hardware}, device {metrics.device or '?'}, torch threads: {metrics.threads or '?'}"


def _robustness(metrics: Metrics | None) -> dict[str, Any]:
    """Return what the card's section on corruptions shows."""
    teacher, found = (metrics.teacher, metrics.robustness) if metrics else (None, None)
    rows = corruption_rows(found) if found else {}
    return {
        "robustness": found,
        "teacher_robustness": teacher and teacher.robustness,
        "robustness_rows": [[kind, *(f"{value:.1f}" for value in top1)] for kind, top1 in rows.items()],
    }


def _maps_section(run: RunFacts) -> dict[str, Any]:
    """Return what the card's section on maps shows."""
    return {
        "ig_options": _ig_options(run),
        "stored_logits_alone": run.provenance is not None and not run.provenance.options.has_maps,
        "method": METHOD_NAMES[_method(run)],
        "overlaid": (run.config.get("overlay_prob") or 0) > 0,
        "overlay_prob": plain(run.config.get("overlay_prob")),
        "overlay_source": run.config.get("overlay_source", "aligned"),
    }


def _introduction(model: nn.Module, run: RunFacts) -> Markdown:
    config: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    text = f"An image classifier: {code(config['architecture'])}"
    if run.config.get("student") is None and run.config.get("student_drop"):
        text += f", its teacher without the last {cell(run.config['student_drop'])} blocks"
    text += f", {large(count_parameters(model))} parameters"
    teacher = code(public_name(str(run.config["teacher"]))) if run.config.get("teacher") else "the teacher"
    if run.config.get("teacher") and run.is_distilled:
        text += f", distilled from {teacher}"
        teacher = "the teacher"
    else:
        text += ", trained" if run.dataset else ""
    if run.dataset:
        text += f" on {code(run.public_dataset)}"
    source = run.config.get("overlay_source", "aligned")
    what = f"{METHOD_NAMES[_method(run)]} maps of {teacher}" if source == "aligned" else f"the control {code(source)}"
    if (run.config.get("overlay_prob") or 0) > 0:
        text += f", with {what} overlaid on part of the training images"
    if (run.config.get("explanation_loss_weight") or 0) > 0:
        text += f", its own maps ({code(run.config.get('explanation_map'))}) held against {what}"
    if counts := label_counts(run.metrics):
        text += f"; it learnt from {cell(counts)}, those without labels by the teacher's answers alone"
    return Markdown(text + ".")


def _settings(run: RunFacts) -> list[tuple[str, str]]:
    config = run.config
    if not config:
        return []
    rows = [("Teacher", public_name(str(config.get("teacher"))))]
    if config.get("teacher_epochs"):
        rows.append(
            (
                "Teacher's training",
                f"{config['teacher_epochs']} epochs from {start_of(config, 'teacher')}, on the same data",
            )
        )
    truncated = f"the teacher without its last {config.get('student_drop')} blocks"
    student = public_name(str(config["student"])) if config.get("student") else truncated
    rows.append(("Student", f"{student}, from {start_of(config, 'student')}"))
    splits = [str(config[key]) for key in ("train_split", "validation_split", "test_split") if config.get(key)]
    rows.append(("Splits", ", ".join(splits)))
    images = run.metrics.training_images if run.metrics else None
    if images and not images.labeled:
        config = {**config, "task_loss_weight": 0.0}
    elif config.get("task_loss_weight") is None and config.get("distill_loss_weight") is not None:
        config = {**config, "task_loss_weight": 1 - config["distill_loss_weight"]}
    for name, value in config.items():
        if (words := setting_words(name)) and value not in (None, {}, [], ""):
            rows.append((words, plain(_public(value))))
    return rows


def _public(value: Any) -> Any:
    """Return a setting with its paths as `public_name` shows them, at every depth."""
    if isinstance(value, Mapping):
        return {name: _public(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_public(part) for part in value]
    return public_name(value) if isinstance(value, str) else value


def _onnx_rows(measured: Mapping[str, Timing]) -> list[Row]:
    """Return the student's latency in onnxruntime, where it was measured."""
    names = {"batch_1": "Latency in onnxruntime, one image", "batch_64": "Latency in onnxruntime, batch of 64"}
    return [
        Row(name, ABSENT, f"{three_digits(times.median)}{NARROW}ms (p90 {three_digits(times.p90)})", "")
        for key, name in names.items()
        if (times := measured.get(key))
    ]


def _method(run: RunFacts) -> Method:
    return run.provenance.options.method if run.provenance else "ig"


def _ig_options(run: RunFacts) -> list[tuple[str, str]]:
    """Return how the maps were made, as their provenance says it."""
    maps = run.provenance
    if maps is None or not maps.options.has_maps:
        return []
    rows = [(_OPTIONS.get(name, name), plain(value)) for name, value in maps.options.used.items()]
    rows += [
        ("Engine", f"{maps.engine}, {maps.dtype}{', compiled' if maps.compiled else ''}"),
        ("Images", plain(maps.n)),
    ]
    numbers = maps.statistics
    if maps.options.method != "ig":
        return rows
    return [
        *rows,
        ("Steps on average", three_digits(numbers.mean_steps)),
        ("Absolute convergence delta, median", f"{numbers.abs_delta_median:.3g}"),
        ("Absolute convergence delta, 90th percentile", f"{numbers.abs_delta_p90:.3g}"),
    ]


def _metadata(
    repo_id: str,
    run: RunFacts,
    maps_repo: str | None,
    license: str,
) -> ModelCardData:
    dataset_id = run.dataset_id
    slug = re.sub(r"[^\w.-]+", "-", run.public_dataset, flags=re.ASCII).strip("-") or "unknown"
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=dataset_id or slug,
            dataset_name=run.public_dataset + (f" ({metrics.n} images of the split)" if run.is_tested_on_part else ""),
            dataset_split=metrics.split,
            dataset_revision=run.revision if dataset_id else None,
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(top1, 2),
        )
        for metrics in ([run.metrics] if run.metrics else [])
        for name, top1 in (("Top-1 accuracy, %", metrics.top1), ("Top-5 accuracy, %", metrics.top5))
        if top1 is metrics.top1 or top1 < 100  # top-5 of five classes or fewer says nothing
    ]
    datasets = [name for name in (dataset_id, maps_repo) if name]
    uses_teacher = run.is_distilled or run.uses_maps or run.config.get("student_init") == "teacher"
    bases = base_models(run.config, uses_teacher)
    tags = ["image-classification", "timm", "timm-igkd"]
    if run.is_distilled:
        tags.append("knowledge-distillation")
    if run.uses_maps:
        tags.append(METHOD_NAMES[_method(run)].lower())
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        **license_metadata(license),
        base_model=bases if len(bases) > 1 else next(iter(bases), None),
        datasets=datasets or None,
        metrics=["accuracy"] if results else None,
        tags=tags,
        model_name=repo_id.split("/")[1] if results else None,
        eval_results=results or None,
    )


def base_models(config: Mapping[str, Any], uses_teacher: bool) -> list[str]:
    """Return the Hub ids of the weights that a student started from and of the teacher it learnt from.

    Weights that were trained in the run, or are known by no Hub id, are left out.
    """
    names = []
    if origin(config, "student") == "pretrained":
        names.append(str(config.get("student") or ""))
    if uses_teacher and not config.get("teacher_epochs") and origin(config, "teacher") == "pretrained":
        names.append(str(config.get("teacher") or ""))
    return list(dict.fromkeys(found for name in names if (found := _hub_id(name)) is not None))


def _hub_id(model: str) -> str | None:
    if model.startswith("hf-hub:"):
        return model.removeprefix("hf-hub:").partition("@")[0]
    known = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    hub_id = known.hf_hub_id if known else None
    return f"{hub_id}{model if '.' in model else f'{model}.{known.tag}'}" if hub_id == "timm/" and known else hub_id
