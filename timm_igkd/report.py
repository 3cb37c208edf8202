"""Write one self-contained HTML page that shows what a run trained, how good it is and how to use it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from timm_igkd import report_tables as tables
from timm_igkd.preview import Sample
from timm_igkd.report_figures import learning_curves, require_matplotlib
from timm_igkd.report_sections import (
    Disagreement,
    calibration_views,
    collect_disagreements,
    confusion_view,
    disagreement_view,
    sample_view,
)
from timm_igkd.run_files import History, Predictions, read_history, read_mapping, read_predictions

__all__ = ["Disagreement", "collect_disagreements", "write_report"]

MOST_SAMPLES = 12
MOST_DISAGREEMENTS = 24

# Row of the setup table -> settings in words; a setting the run does not have is left out.
_SETUP_WORDS = {
    "Overlay": {
        "overlay_prob": "on a share of {} of the images",
        "overlay_weight": "weight of the map {}",
        "overlay_source": "maps: {}",
        "teacher_view": "view of the teacher: {}",
    },
    "Distillation": {
        "kd_loss": "{}",
        "distill_loss_weight": "weight {}",
        "temperature": "temperature {}",
        "task_loss_weight": "weight of the labels {}",
        "attention_loss_weight": "weight of attention transfer {}",
    },
    "Training": {
        "epochs": "{} epochs",
        "batch_size": "batch size {}",
        "opt": "optimiser {}",
        "lr": "learning rate {}",
        "seed": "seed {}",
    },
}


def write_report(
    run_dir: str | Path,
    *,
    samples: Sequence[Sample] | None = None,
    disagreements: Sequence[Disagreement] | None = None,
) -> Path:
    """Write `run_dir`/report/index.html from the files of a finished run; equal inputs give an equal page.

    Args:
        run_dir: folder with config.yaml, metrics.json, environment.json, predictions.npz and student_history.csv;
            teacher_history.csv is absent for a released teacher, maps/provenance.json for a run without maps.
        samples: training images with their maps, at most 12 are shown.
        disagreements: images on which student and teacher differ, at most 24 are shown.

    Returns:
        The path of the page.

    Raises:
        MissingFileError: the run is not finished.
        InputError: a file cannot be read as what it should be, or matplotlib is missing.
    """
    require_matplotlib()
    run_dir = Path(run_dir)
    context = _context(run_dir, (samples or ())[:MOST_SAMPLES], (disagreements or ())[:MOST_DISAGREEMENTS])
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = jinja.from_string(template).render(context)
    path = run_dir / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _context(run_dir: Path, samples: Sequence[Sample], disagreements: Sequence[Disagreement]) -> dict[str, Any]:
    """Read the run and return everything the template shows."""
    config = read_mapping(run_dir / "config.yaml")
    metrics = read_mapping(run_dir / "metrics.json")
    environment = read_mapping(run_dir / "environment.json")
    provenance = read_mapping(run_dir / "maps" / "provenance.json", optional=True)
    student_history = read_history(run_dir / "student_history.csv")
    teacher_csv = run_dir / "teacher_history.csv"
    teacher_history = read_history(teacher_csv) if teacher_csv.exists() else None
    predictions = read_predictions(run_dir / "predictions.npz")
    return {
        "run_name": str(config.get("name") or run_dir.resolve().name),
        "summary": tables.summary_sentence(metrics),
        "highlights": _highlights(metrics),
        "setup": _setup_rows(config, metrics, provenance, teacher_history, predictions),
        "results": tables.result_rows(metrics),
        "n": tables.count(metrics["n"]),
        "split": tables.plain(metrics.get("split")),
        "dataset": tables.plain(metrics.get("dataset")),
        "seed": tables.plain(config.get("seed")),
        "has_teacher": bool(metrics.get("teacher")),
        "teacher_trained_here": teacher_history is not None,
        "curves": [(Markup(svg), text) for svg, text in learning_curves(student_history, teacher_history)],
        "samples": [sample_view(sample) for sample in samples],
        "has_maps": bool(provenance),
        "confusion": confusion_view(predictions),
        "calibration": calibration_views(predictions),
        "disagreement": disagreement_view(predictions, disagreements),
        "sizes": tables.size_rows(metrics),
        "latency_note": _latency_note(metrics),
        "command": _command(environment),
        "provenance": _provenance_groups(config, metrics, environment, provenance),
        "needs_plugin": bool(metrics.get("needs_plugin", True)),
    }


def _highlights(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    shown = [(tables.percent(metrics["top1"]), "top-1 accuracy")]
    if metrics.get("compression"):
        shown.append((tables.ratio(metrics["compression"]), "fewer parameters"))
    if "agreement" in metrics:
        shown.append((tables.percent(metrics["agreement"]), "same answer as the teacher"))
    one = (metrics.get("latency_ms") or {}).get("batch_1")
    if one:
        shown.append((f"{one['median']:.3g}{tables.NARROW}ms", f"per image on {_device_words(metrics)}"))
    return shown


def _setup_rows(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
    teacher_history: History | None,
    predictions: Predictions,
) -> list[tuple[str, str]]:
    """Say what was trained on what, from whichever settings the run has."""
    rows = []
    teacher = metrics.get("teacher")
    if teacher:
        origin = f"trained here for {len(teacher_history['epoch'])} epochs" if teacher_history else "released weights"
        rows.append(
            (
                "Teacher",
                f"{tables.plain(config.get('teacher'))}, {tables.large(teacher['num_parameters'])} parameters, "
                f"{origin}",
            )
        )
    rows.append(
        ("Student", f"{tables.plain(config.get('student'))}, {tables.large(metrics['num_parameters'])} parameters")
    )
    rows.append(("Dataset", f"{tables.plain(metrics.get('dataset'))}, {len(predictions.class_names)} classes"))
    tested = f"{tables.count(metrics['n'])} images of split “{tables.plain(metrics.get('split'))}”"
    rows.append(("Tested on", tested))
    if provenance:
        options = provenance.get("options")
        details = (
            ", ".join(f"{key} {tables.plain(value)}" for key, value in options.items())
            if isinstance(options, dict)
            else ""
        )
        rows.append(
            (
                "Maps",
                f"{tables.plain(provenance.get('n'))} integrated-gradients maps" + (f" ({details})" if details else ""),
            )
        )
    for heading, settings in _SETUP_WORDS.items():
        known = [words.format(tables.plain(config[key])) for key, words in settings.items() if config.get(key) is not None]
        if known:
            rows.append((heading, ", ".join(known)))
    return rows


def _device_words(metrics: Mapping[str, Any]) -> str:
    device = str(metrics.get("device") or "cpu").partition(":")[0]
    return {"cpu": "CPU", "cuda": "GPU"}.get(device, device)


def _latency_note(metrics: Mapping[str, Any]) -> str:
    times = metrics.get("latency_ms") or {}
    if not times:
        return "Latency was not measured."
    repeats = ", ".join(f"{entry['n']} at {key.replace('_', ' size ')}" for key, entry in times.items())
    threads = metrics.get("threads")
    where = _device_words(metrics) + (f", {threads} thread{'s' if threads != 1 else ''}" if threads else "")
    return (
        f"Latency is the median of warm, repeated passes (student: {repeats}) on "
        f"{metrics.get('hardware') or 'unknown hardware'} ({where}); p90 is the time that nine passes in ten stay under."
    )


def _command(environment: Mapping[str, Any]) -> str:
    command = environment.get("command")
    if isinstance(command, list):
        return " ".join(str(part) for part in command)
    return str(command) if command else "accelerate launch recipes/train_igkd.py --config config.yaml"


def _provenance_groups(
    config: Mapping[str, Any], metrics: Mapping[str, Any], environment: Mapping[str, Any], provenance: Mapping[str, Any]
) -> list[tuple[str, list[tuple[str, str]]]]:
    times = metrics.get("wall_time_s") or {}
    walls = [(stage, tables.duration(seconds)) for stage, seconds in times.items() if seconds is not None]
    if walls:
        walls.append(("total", tables.duration(sum(seconds for seconds in times.values() if seconds is not None))))
    software = {key: value for key, value in environment.items() if key != "command"}
    packages = [
        (name.removeprefix("packages.").removeprefix("versions."), value) for name, value in tables.flat_rows(software)
    ]
    groups = [
        ("Wall time", walls),
        ("Software and hardware", packages),
        ("Settings", tables.flat_rows(config)),
        ("Maps", tables.flat_rows(provenance)),
    ]
    return [(heading, rows) for heading, rows in groups if rows]
