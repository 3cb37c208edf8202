"""All studies in one table: every contrast of an aligned overlay with none, or with a control."""

from collections.abc import Sequence
from typing import Any

from studies.cells import is_aligned_against_control, is_overlay_against_none
from studies.contrast import Contrast
from studies.origins import source_of
from studies.results import StudyResults
from studies.statistics import Comparison
from studies.tables import DASH, NARROW, Entry, Table, probability, signed, span


def glance(studies: Sequence[StudyResults]) -> Table | None:
    """Return the overlay's contrasts of all studies that were run, checks of the machinery left out; None: none."""
    first: dict[frozenset[Any], StudyResults] = {}  # by the runs of both cells: studies share some
    rows: list[tuple[str, list[Entry]]] = []
    for results in studies:
        if not results.rows or results.config.purpose == "check" or results.is_withheld:
            continue
        found = [
            (contrast.name, _entries(results, contrast))
            for contrast in results.contrasts("top1")
            if contrast.comparison.n > 1
            and _is_of_overlay(results, contrast)
            and first.setdefault(_runs_of(results, contrast), results) is results
        ]
        rows += [(_called(results), []), *found] if found else []
    if not rows:
        return None
    columns = ["Runs of each", "Clean accuracy, points", "Holm p", "Under corruption, points", "Holm p"]
    note = (
        f"Differences with 95{NARROW}% intervals, not adjusted; Holm's p within each study and outcome. Only a primary "
        "study claims an effect; the others are exploratory."
    )
    return Table("At a glance: aligned overlays against none and against controls", columns, rows, note)


def _called(results: StudyResults) -> str:
    name = results.config.title or results.config.name
    return f"{name} (primary)" if results.config.purpose == "primary" else name


def _is_of_overlay(results: StudyResults, contrast: Contrast) -> bool:
    a, b = results.cell(contrast.a), results.cell(contrast.b)
    return is_overlay_against_none(a, b) or is_aligned_against_control(a, b)


def _runs_of(results: StudyResults, contrast: Contrast) -> frozenset[Any]:
    """Return what tells the runs of a contrast from those of other studies' contrasts, seeds left out."""
    both = ((part, row) for part in (contrast.a, contrast.b) for row in results.runs[part].values())
    return frozenset((part == contrast.a, row["config_hash"], source_of(row)) for part, row in both)


def _entries(results: StudyResults, contrast: Contrast) -> list[Entry]:
    (corrupted,) = (c for c in results.contrasts("corruption_top1") if (c.a, c.b) == (contrast.a, contrast.b))
    return [
        Entry(str(contrast.comparison.n)),
        _difference(contrast.comparison),
        Entry(probability(contrast.holm_p)),
        _difference(corrupted.comparison),
        Entry(probability(corrupted.holm_p)),
    ]


def _difference(found: Comparison) -> Entry:
    if found.n == 0:
        return Entry(DASH)
    return Entry(signed(found.difference), span(found.low, found.high, sign=True))
