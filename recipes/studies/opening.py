"""The report's first sentences, for a reader who does not read on: what the complete primary study shows."""

import math
from collections.abc import Sequence

from studies.answers import (
    ADVANTAGE,
    is_aligned_against_control,
    is_overlay_against_none,
    robustness,
    why_nothing_is_claimed,
)
from studies.paper import ABLATION
from studies.results import Contrast, StudyResults
from studies.tables import signed, span
from timm_igkd.report.tables import NARROW

_LEAST_RUNS = 2


def opening(studies: Sequence[StudyResults]) -> str:
    """Return the report's first sentences.

    With a complete primary study three of them answer: does the overlay help accuracy, robustness and transfer; does
    alignment matter; what of the paper holds. Without one nothing is claimed.
    """
    done = sum(len(results.rows) for results in studies)
    planned = sum(results.num_planned for results in studies)
    counted = f"{done} of {planned} planned runs in {len(studies)} stud{'y' if len(studies) == 1 else 'ies'}."
    primary = [results for results in studies if results.config.purpose == "primary" and results.rows]
    if not primary:
        return f"{counted} No primary study has been run: nothing is claimed."
    if any(results.is_interim for results in primary):
        return f"{counted} The primary study is not complete: nothing is claimed yet."
    sentences = [
        sentence for results in primary for sentence in (_effect(results), _alignment(results), _paper(results))
    ]
    return " ".join([*(sentence for sentence in sentences if sentence), counted])


def _effect(results: StudyResults) -> str:
    parts = [
        f"{_found(results, contrast, column)} in {words}"
        for column, words in ADVANTAGE.items()
        for contrast in results.contrasts(column)
        if contrast.comparison.n >= _LEAST_RUNS
        and is_overlay_against_none(results.cell(contrast.a), results.cell(contrast.b))
    ]
    if parts and (robust := robustness(results)):
        parts.append(robust)
    return f"Overlays of aligned maps against none, for this teacher: {'; '.join(parts)}." if parts else ""


def _alignment(results: StudyResults) -> str:
    """Say what aligned minus shuffled shows: the same maps, of other images."""
    parts = [
        f"{_found(results, contrast, column)} in {words}"
        for column, words in ADVANTAGE.items()
        if column in results.config.outcomes
        for contrast in results.contrasts(column)
        if contrast.comparison.n >= _LEAST_RUNS
        and is_aligned_against_control(results.cell(contrast.a), results.cell(contrast.b))
        and results.cell(contrast.b).overlay_source == "shuffled"
    ]
    return f"Aligned maps against the same maps of other images: {'; '.join(parts)}." if parts else ""


def _paper(results: StudyResults) -> str:
    theirs = ABLATION["KD&IG"].mean - ABLATION["KD"].mean
    for contrast in results.contrasts("top1"):
        found = contrast.comparison
        pair = results.cell(contrast.a), results.cell(contrast.b)
        if is_overlay_against_none(*pair) and pair[1].distill_loss_weight > 0 and not math.isnan(found.p):
            place = "inside" if found.low <= theirs <= found.high else "outside"
            return (
                f"The paper's {signed(theirs)} points for overlays beside KD, of another network, with maps of other "
                f"images, lie {place} our interval."
            )
    return ""


def _found(results: StudyResults, contrast: Contrast, column: str) -> str:
    numbers = contrast.comparison
    interval = (
        f"{signed(numbers.difference)} points, 95{NARROW}% interval "
        f"{span(numbers.low, numbers.high, sign=True)}, n = {numbers.n}"
    )
    if why_nothing_is_claimed(results, column):
        return f"not named in advance ({interval})"
    if contrast.is_significant:
        return f"{'higher' if numbers.difference > 0 else 'lower'} ({interval})"
    if contrast.is_equivalent and contrast.equivalence is not None:
        return f"equivalent within ±{contrast.equivalence.bound:g} points ({interval})"
    return f"no difference shown ({interval})"
