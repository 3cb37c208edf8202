"""The report's first sentences, for a reader who does not read on: what the complete primary study shows."""

from collections.abc import Callable, Sequence
from typing import Any

from studies.answers import ADVANTAGE, failures, finding, robustness, why_nothing_is_claimed
from studies.beside_paper import beside_unlike_paper
from studies.cells import Cell, is_aligned_against_control, is_overlay_against_none
from studies.config import StudyConfig
from studies.contrast import Contrast
from studies.origins import source_of
from studies.results import LEAST_SEEDS, StudyResults
from studies.rows import key_of
from studies.tables import signed, span
from timm_igkd.report.tables import NARROW

_KEY = f"(points, 95{NARROW}% interval, not adjusted; words by Holm's p, in the tables)"


def opening(studies: Sequence[StudyResults]) -> str:
    """Return the report's first sentences.

    With a complete primary study three of them answer: does the overlay help accuracy, robustness and transfer; does
    alignment matter; what of the paper holds. Without one nothing is claimed. Paragraphs are apart by an empty line.
    """
    # studies share runs: each counts once
    done = {(key_of(row), source_of(row)) for results in studies for row in results.rows}
    planned = {run for results in studies for run in _planned(results.config)}
    together = f"{len(studies)} stud{'y' if len(studies) == 1 else 'ies'}"
    counted = f"{len(done)} of {len(planned)} planned runs in {together} are done."
    primary = [results for results in studies if results.config.purpose == "primary" and results.rows]
    if not primary:
        return f"{counted} No primary study has been run: nothing is claimed."
    if any(results.is_interim for results in primary):
        if all(results.config.ended for results in primary):
            return f"{counted} The primary study ended with fewer than {LEAST_SEEDS} whole seeds: nothing is claimed."
        return f"{counted} The primary study is not complete: nothing is claimed yet."
    if any(results.is_withheld for results in primary):
        how = "ended" if any(results.missing for results in primary) else "complete"
        return f"{counted} The primary study is {how}; nothing is shown or claimed until its file says report: true."
    sentences = [
        sentence
        for results in primary
        for sentence in (_effect(results), _alignment(results), _paper(results), _amendment(results))
    ]
    return "\n\n".join([*(sentence for sentence in sentences if sentence), counted])


def _planned(config: StudyConfig) -> set[tuple[Any, ...]]:
    """Return what tells planned runs from those of other studies, before there is a row that says more."""
    source = config.dataset, config.teacher, config.teacher_checkpoint, config.launch
    return {(config.run_hash(cell), seed, *source) for cell in config.cells.values() for seed in config.seed_range}


def _effect(results: StudyResults) -> str:
    parts = _parts(results, is_overlay_against_none)
    if parts and (robust := robustness(results)):
        parts.append(robust)
    if parts and (failed := failures(results)):
        parts.append(f"failed, and in no contrast, are {failed}")
    if results.config.ended and results.missing:
        parts.append("the study ended before its plan was complete")
    about = "Does the overlay help? For this teacher, on these test images, aligned overlays against none"
    return f"{about} {_KEY}: {'; '.join(parts)}." if parts else ""


def _alignment(results: StudyResults) -> str:
    """Say what aligned minus shuffled shows: the same maps, of other images."""
    parts = _parts(
        results, lambda a, b: is_aligned_against_control(a, b) and b.overlay_source == "shuffled", named_alone=True
    )
    about = "Does alignment matter? Aligned maps against the same maps of other images, likewise"
    return f"{about}: {'; '.join(parts)}." if parts else ""


def _paper(results: StudyResults) -> str:
    told = beside_unlike_paper(results)
    return f"What of the paper holds? {told}" if told else ""


def _amendment(results: StudyResults) -> str:
    sentences = [extension(results.config)]
    if results.config.amended:
        sentences.append(
            "The plan was amended after its first run: how, and what other sets of seeds give, stands in its section."
        )
    return " ".join(filter(None, sentences))


def extension(config: StudyConfig) -> str:
    """Return in a sentence that a study got more seeds than it began with; empty where it did not."""
    if not config.extended_from:
        return ""
    return (
        f"Its {config.extended_from} seeds became {config.seeds} by the rule of the plan, "
        "without a look at a difference."
    )


def _parts(results: StudyResults, is_meant: Callable[[Cell, Cell], bool], named_alone: bool = False) -> list[str]:
    """Return what the contrasts of a kind show, outcome by outcome; those not named in advance are last."""
    return [
        f"{words} {_found(results, contrast, column)}"
        for column, words in ADVANTAGE.items()
        if column in results.config.outcomes or not named_alone
        for contrast in results.contrasts(column)
        if contrast.comparison.n and is_meant(results.cell(contrast.a), results.cell(contrast.b))
    ]


def _found(results: StudyResults, contrast: Contrast, column: str) -> str:
    found = contrast.comparison
    numbers = f"{signed(found.difference)} ({span(found.low, found.high, sign=True) or 'no spread'}"
    if column not in results.config.outcomes:
        return f"{numbers}; n = {found.n}), exploratory"
    if why := why_nothing_is_claimed(results, column, contrast):
        return f"{numbers}; n = {found.n}), {why}, so nothing is claimed"
    return f"{finding(contrast)}, {numbers}; n = {found.n})"
