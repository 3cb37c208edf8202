"""The report of studies, from their rows alone: Markdown with figures as files, and one self-contained HTML page.

Every number is computed from results.csv (and, for the two-level bootstrap, the predictions beside it); equal rows give
equal files.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from studies.answers import answers
from studies.config import StudyConfig
from studies.facts import facts
from studies.figures import FIGURES
from studies.glance import glance
from studies.opening import extension, opening
from studies.paper_table import paper_table
from studies.results import LEAST_SEEDS, StudyResults
from studies.sensitivity import sensitivity_table
from studies.tables import cells_table, contrast_table, corruption_table, transfer_table
from studies.trials import trials_table
from studies.withheld import withhold_shared_runs
from timm_igkd.errors import InputError
from timm_igkd.files import write_atomic
from timm_igkd.report.figures import svg_file
from timm_igkd.report.page import light_colours, page_style

_HERE = Path(__file__).parent

PURPOSES = {
    "check": "A check: it tests the machinery on small numbers and draws no conclusion.",
    "primary": "The primary study: contrasts, outcomes, number of seeds and its rules were fixed before its first run.",
    "exploratory": "Exploratory: what it shows is a suggestion to be tested, no claim.",
}


class Drawing(NamedTuple):
    """A figure of a study: the file that the Markdown shows, the SVG of the page, and both in words."""

    title: str
    file: str
    svg: str
    words: str


def write_report(
    configs: Sequence[StudyConfig],
    results_md: str | Path,
    html: str | Path,
    paths: Sequence[str | Path] | None = None,
    figures: str | Path | None = None,
) -> None:
    """Write the report of studies, those that were not run included.

    Args:
        configs: the studies, in the order of the report; those of the appendix come after the others.
        results_md: Markdown file to write.
        html: page to write, self-contained.
        paths: the studies' YAML files, for their commands; default: recipes/configs/study_<name>.yaml.
        figures: folder of the Markdown's figures; default: "figures" beside it.

    Raises:
        InputError: two studies of one name, rows or predictions that cannot be used, or matplotlib is missing.
    """
    names = [config.name for config in configs]
    if not names or len(set(names)) < len(names):
        raise InputError(f"a report needs at least one study, each once, got {names or 'none'}")
    studies = withhold_shared_runs([StudyResults.read(config) for config in configs])
    figures = Path(figures or Path(results_md).parent / "figures")
    paths = paths or [f"recipes/configs/study_{name}.yaml" for name in names]
    sections = [_section(results, path) for results, path in zip(studies, paths, strict=True)]
    sections.sort(key=lambda section: section["in_appendix"])
    begun = [section for section in sections if not section["only_planned"]]
    context = {
        "lead": opening(studies),
        "glance": glance(studies),
        "figures": os.path.relpath(figures, Path(results_md).parent).replace(os.sep, "/"),
        "studies": begun,
        "planned": [section for section in sections if section["only_planned"]],
    }
    page = _environment(autoescape=True).from_string(_template("report.html"))
    text = _environment(autoescape=False).from_string(_template("report.md.j2"))
    for section in begun:
        for figure in section["figures"]:
            write_atomic(figures / figure.file, svg_file(figure.svg, light_colours()).encode())
    write_atomic(Path(html), page.render(context, style=page_style()).encode())
    write_atomic(Path(results_md), _tidy(text.render(context)).encode())


def _template(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _environment(autoescape: bool) -> Environment:
    environment = Environment(autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = lambda text: text.replace("|", "\\|")
    return environment


def _tidy(markdown: str) -> str:
    """Return Markdown without runs of empty lines."""
    return re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n"


def _purpose(results: StudyResults) -> str:
    """Return what a study is for, and of an unfinished primary one that its numbers are interim."""
    text = PURPOSES[results.config.purpose]
    if results.config.purpose == "primary" and results.rows and results.missing and results.config.ended:
        text += f" Ended before its plan: {results.config.ended}."
    return " ".join(filter(None, [text, extension(results.config)]))


def _amendments(text: str) -> list[str]:
    """Return the amendments of a plan: from each "on year-month-day" that begins a sentence to the next."""
    found = re.split(r"(?:^|(?<=[.!?] ))(?:Again )?on (?=\d{4}-\d\d-\d\d\b)", " ".join(text.split()))
    return [part.strip() for part in found if part.strip()]


def _waits(results: StudyResults) -> str:
    """Return why nothing of a study is shown; empty where it may be."""
    planned = results.num_planned
    if results.config.ended and (results.is_interim or not results.rows):
        return f"Ended with fewer than {LEAST_SEEDS} seeds of every cell: nothing is shown or claimed."
    if not results.rows:
        return f"{planned} run{'' if planned == 1 else 's'} planned."
    if not results.is_withheld:
        return ""
    if results.withheld_by:
        return f"It has runs of the primary study {results.withheld_by}, of which nothing is shown yet."
    if not results.is_interim:
        how = "Ended" if results.missing else "Complete"
        return f"{how}; nothing is shown before the blind look at its spread, after which its file says report: true."
    return (
        f"Interim: {len(results.rows)} of {planned} runs are done. No result is shown before all are; the study can "
        "end early for lack of time alone, never for a result."
    )


def _section(results: StudyResults, path: str | Path) -> dict[str, Any]:
    """Return everything the templates show of one study."""
    config = results.config
    slug = re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-") or "study"
    section = {
        "slug": f"study-{slug}",
        "title": config.title or config.name,
        "in_appendix": config.appendix,
        "purpose": _purpose(results),
        "amended": _amendments(config.amended),
        "question": config.question,
        "command": " ".join(["accelerate launch", *config.launch.split(), f"recipes/study.py --config {path}"]),
        "waits": _waits(results),
        "has_missing": bool(results.missing) and not config.ended,
        "only_planned": not results.rows and not config.ended,
        "figures": [],
    }
    if section["waits"]:
        return section
    columns = list(dict.fromkeys([*config.outcomes, "transfer_balanced_top1"])) if config.contrasts else []
    tables = [contrast_table(results, column) for column in columns]
    tables += [
        sensitivity_table(results),
        trials_table(results),
        cells_table(results),
        corruption_table(results),
        transfer_table(results),
        paper_table(results),
    ]
    drawn = [(title, f"{slug}-{draw.__name__}.svg", draw(results, slug)) for title, draw in FIGURES]
    return section | {
        "answers": answers(results),
        "tables": [table for table in tables if table is not None],
        "figures": [Drawing(title, file, *figure) for title, file, figure in drawn if figure is not None],
        "facts": facts(results),
    }
