"""Write one self-contained HTML page that shows what a run trained, how good it is and how to use it."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from timm_igkd.attribution.ig_options import METHOD_NAMES
from timm_igkd.files import write_atomic
from timm_igkd.intervals import three_digits
from timm_igkd.maps.manifest import Provenance
from timm_igkd.maps.scores import read_score
from timm_igkd.overlay.preview import Sample
from timm_igkd.report import tables
from timm_igkd.report.figures import learning_curves
from timm_igkd.report.run_facts import RunFacts, read_run, setting_phrase, start_of
from timm_igkd.report.run_files import (
    History,
    Metrics,
    Predictions,
    read_history,
    read_predictions,
)
from timm_igkd.report.sections import (
    Disagreement,
    calibration_views,
    confusion_view,
    disagreement_view,
    sample_view,
)
from timm_igkd.report.verdict import arm_rows, num_seeds, verdict

# Row of the setup table -> the setting that switches it on, and what it tells where a run has it.
_SETUP = {
    "Overlay": ("overlay_prob", ("overlay_prob", "overlay_weight", "overlay_source", "teacher_view")),
    "Distillation": ("distill_loss_weight", ("loss_type", "distill_loss_weight", "temperature")),
    "Part of the images": ("train_limit", ("train_limit", "test_limit")),
    "Attention transfer": ("attention_loss_weight", ("attention_loss_weight",)),
    "Explanation loss": ("explanation_loss_weight", ("explanation_loss_weight", "explanation_map")),
    "Training": ("epochs", ("epochs", "batch_size", "opt", "lr", "seed")),
}


def write_report(
    run_dir: str | Path,
    *,
    samples: Sequence[Sample] = (),
    disagreements: Sequence[Disagreement] = (),
) -> Path:
    """Write `run_dir`/report/index.html from the files of a finished run; equal inputs give an equal page.

    Args:
        run_dir: folder with config.yaml, metrics.json, environment.json, predictions.npz and student_history.csv;
            teacher_history.csv is absent for a released teacher, maps/provenance.json for a run without maps;
            maps/score.json, of `timm-igkd score`, says how faithful they are.
        samples: training images with their maps.
        disagreements: images on which student and teacher differ.

    Returns:
        The path of the page.

    Raises:
        MissingFileError: the run is not finished.
        InputError: a file cannot be read as what it should be, or matplotlib is missing.
    """
    run_dir = Path(run_dir)
    context = _context(run_dir, samples, disagreements)
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = jinja.from_string(template).render(context)
    path = run_dir / "report" / "index.html"
    write_atomic(path, page.encode())
    return path


def page_style() -> str:
    """Return the style sheet of report pages; colours are the CSS variables that figures are drawn in."""
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8").strip()


def light_colours() -> dict[str, str]:
    """Return the style sheet's colours by name, those of light mode, for figures outside of a page."""
    return dict(re.findall(r"--(\w+): (#\w+)", page_style().partition("@media")[0]))


def _context(run_dir: Path, samples: Sequence[Sample], disagreements: Sequence[Disagreement]) -> dict[str, Any]:
    """Read the run and return everything the template shows."""
    run = read_run(run_dir, finished=True)
    config, metrics, maps = run.config, run.metrics, run.provenance
    assert metrics is not None
    student_history = read_history(run_dir / "student_history.csv")
    teacher_csv = run_dir / "teacher_history.csv"
    teacher_history = read_history(teacher_csv) if teacher_csv.exists() else None
    predictions = read_predictions(run_dir / "predictions.npz")
    return {
        "style": page_style(),
        "run_name": str(config.get("name") or os.path.basename(os.path.realpath(run_dir))),
        "verdict": verdict(metrics.arms),
        "arms": arm_rows(metrics.arms),
        "summary": tables.summary_sentence(metrics),
        "highlights": _highlights(metrics),
        "setup": _setup_rows(run, metrics, teacher_history, predictions),
        "results": tables.result_rows(metrics),
        "n": tables.count(metrics.n),
        "is_part": run.is_tested_on_part,
        "has_unlabeled": bool(config.get("unlabeled")),
        "split": tables.plain(metrics.split),
        "dataset": tables.plain(metrics.dataset),
        "seed": tables.plain(config.get("seed")),
        "num_seeds": num_seeds(metrics.arms),
        "has_teacher": metrics.teacher is not None,
        "teacher_trained_here": teacher_history is not None,
        "curves": learning_curves(student_history, teacher_history),
        "samples": [sample_view(sample) for sample in samples],
        "has_maps": maps is not None and maps.options.has_maps,
        "method": METHOD_NAMES[maps.options.method] if maps else "",
        "score": read_score(run_dir / "maps", maps) if maps else None,
        "confusion": confusion_view(predictions),
        "calibration": calibration_views(predictions),
        "disagreement": disagreement_view(predictions, disagreements),
        "sizes": tables.size_rows(metrics, metrics.teacher),
        "exports": tables.export_rows(metrics),
        "export_note": tables.export_note(metrics),
        "latency_note": _latency_note(metrics),
        "command": _command(run.environment),
        "provenance": _provenance_groups(run, metrics),
        "needs_plugin": metrics.needs_plugin,
    }


def _highlights(metrics: Metrics) -> list[tuple[str, str]]:
    shown = [(tables.percent(metrics.top1), "top-1 accuracy")]
    if metrics.compression:
        value, _, word = tables.factor(metrics.compression, 1, "fewer").partition(" ")
        shown.append((value, f"{word or 'number of'} parameters"))
    if metrics.agreement is not None:
        shown.append((tables.percent(metrics.agreement), "same answer as the teacher"))
    one = metrics.latency_ms.get("batch_1")
    if one:
        shown.append((f"{three_digits(one.median)}{tables.NARROW}ms", f"per image on {_device_words(metrics)}"))
    return shown


def _setup_rows(
    run: RunFacts, metrics: Metrics, teacher_history: History | None, predictions: Predictions
) -> list[tuple[str, str]]:
    """Say what was trained on what, from whichever settings the run has."""
    rows, config, maps = [], run.config, run.provenance
    teacher = metrics.teacher
    if teacher:
        origin = start_of(config, "teacher")
        if teacher_history:
            origin = f"trained here for {len(teacher_history['epoch'])} epochs from {origin}"
        name, size = tables.plain(config.get("teacher")), tables.large(teacher.num_parameters)
        rows.append(("Teacher", f"{name}, {size} parameters, {origin}"))
    name = (
        config.get("student") or f"the teacher cut at its end (student_drop {tables.plain(config.get('student_drop'))})"
    )
    size, origin = tables.large(metrics.num_parameters), start_of(config, "student")
    rows.append(("Student", f"{name}, {size} parameters, trained from {origin}"))
    rows.append(("Dataset", f"{tables.plain(metrics.dataset)}, {len(predictions.class_names)} classes"))
    if config.get("train_split"):
        what = tables.label_counts(metrics)
        more = f" with “{config['unlabeled']}”" if config.get("unlabeled") else ""
        rows.append(("Trained on", f"split “{config['train_split']}”{more}" + (f": {what}" if what else "")))
    rows.append(("Tested on", f"{tables.count(metrics.n)} images of split “{tables.plain(metrics.split)}”"))
    if maps is not None and maps.options.has_maps:
        used = {key: value for key, value in maps.options.used.items() if key != "method"}
        details = ", ".join(f"{key} {tables.plain(value)}" for key, value in used.items())
        rows.append(("Maps", f"{tables.count(maps.n)} {maps.options.content}: {details}"))
    for heading, (switch, names) in _SETUP.items():
        known = [setting_phrase(name, tables.plain(config[name])) for name in names if config.get(name) is not None]
        if known:
            rows.append((heading, "none" if config.get(switch) == 0 else ", ".join(known)))
    return rows


def _device_words(metrics: Metrics) -> str:
    device = (metrics.device or "cpu").partition(":")[0]
    return {"cpu": "CPU", "cuda": "GPU"}.get(device, device)


def _latency_note(metrics: Metrics) -> str:
    times = metrics.latency_ms
    if not times:
        return "Latency was not measured."
    repeats = ", ".join(f"{entry.n} at {key.replace('_', ' size ')}" for key, entry in times.items())
    threads = metrics.threads
    where = _device_words(metrics) + (f", {threads} thread{'s' if threads != 1 else ''}" if threads else "")
    return (
        f"Latency is the median of warm, repeated passes (student: {repeats}) on "
        f"{metrics.hardware or 'unknown hardware'} ({where}); "
        "p90 is the time that nine passes in ten stay under."
    )


def _command(environment: Mapping[str, Any]) -> str:
    return str(environment.get("command") or "accelerate launch recipes/train_igkd.py --config config.yaml")


def _stored_facts(provenance: Provenance) -> dict[str, Any]:
    """Return what a store says of itself; where it has no maps, without what only maps have."""
    found = asdict(provenance)
    if provenance.options.has_maps:
        return found
    return {name: value for name, value in found.items() if name not in ("map_size", "statistics")} | {
        "options": provenance.options.used
    }


def _provenance_groups(run: RunFacts, metrics: Metrics) -> list[tuple[str, list[tuple[str, str]]]]:
    times = metrics.wall_time_s
    walls = [(stage, tables.duration(seconds)) for stage, seconds in times.items()]
    if walls:
        walls.append(("total", tables.duration(sum(times.values()))))
    software = {key: value for key, value in run.environment.items() if key != "command"}
    stored = "Stored logits" if run.provenance is not None and not run.provenance.options.has_maps else "Maps"
    groups = [
        ("Wall time", walls),
        ("Software and hardware", tables.flat_rows(software)),
        ("Settings", tables.flat_rows(run.config)),
        (stored, tables.flat_rows({} if run.provenance is None else _stored_facts(run.provenance))),
    ]
    return [(heading, rows) for heading, rows in groups if rows]
