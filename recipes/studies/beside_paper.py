"""What a study says of the paper: its differences beside ours, of runs that repeat it and of others."""

import math

from studies.cells import is_overlay_against_none
from studies.paper import (
    ABLATION,
    ABLATION_DROP,
    COMPRESSION,
    MONTE_CARLO,
    NUM_RUNS,
    arm_name,
    paper_gap,
    paper_results,
)
from studies.results import StudyResults
from studies.statistics import Comparison
from studies.tables import Answer, number, signed, span
from timm_igkd.report.tables import NARROW


def beside_paper(results: StudyResults) -> Answer | None:
    """Compare the paper's differences of KD&IG and KD at 4.12x with every pair of ours that repeats its settings."""
    if results.config.purpose == "check":
        return None
    repeated = [
        name
        for name in results.cells
        if results.cell(name).drop == ABLATION_DROP
        and paper_results(results.config, results.cell(name), results.constant(name, "num_parameters"))
    ]
    sentences = []
    for resampled, source, told in ((False, ABLATION, _ablation_in_words()), (True, MONTE_CARLO, _subsets_in_words())):
        names = [name for name in repeated if results.is_resampled(name) == resampled]
        theirs = source["KD&IG"].mean - source["KD"].mean
        found = [_beside_paper(results, name, kd, theirs) for name, kd in _pairs_of_overlay(results, names)]
        if any(found):
            sentences += [told, *(sentence for sentence in found if sentence)]
    if not sentences and (unlike := beside_unlike_paper(results)):
        sentences = [unlike]
    return ("What of the paper holds?", sentences) if sentences else None


def beside_unlike_paper(results: StudyResults) -> str:
    """Return as a sentence the paper's differences beside that of a primary study unlike it, or nothing."""
    for contrast in results.contrasts("top1"):
        a, b = results.cell(contrast.a), results.cell(contrast.b)
        theirs, found = paper_gap(), contrast.comparison
        if results.config.purpose == "primary" and found.n and is_overlay_against_none(a, b) and b.distill_loss_weight:
            other = COMPRESSION["KD&IG", ABLATION_DROP].mean - COMPRESSION["KD", ABLATION_DROP].mean
            return (
                f"The paper reports {signed(theirs.estimate)} points (95{NARROW}% interval by Welch "
                f"{span(theirs.low, theirs.high, sign=True)}, {NUM_RUNS} runs each) for overlays beside KD, and "
                f"{signed(other)} for the same arms in its table by compression; this is no repetition of it: with "
                "another network and recipe, and each image's own map, where its code has another image's, it is here "
                f"{signed(found.difference)} ({_interval(found)}){_place(found, theirs.estimate)}."
            )
    return ""


def _pairs_of_overlay(results: StudyResults, names: list[str]) -> list[tuple[str, str]]:
    """Return the pairs (KD&IG, KD) among cells that take the same logits."""
    arms = {name: arm_name(results.cell(name)) for name in names}
    return [
        (name, kd)
        for name in names
        for kd in names
        if (arms[name], arms[kd]) == ("KD&IG", "KD") and results.cell(name).logits == results.cell(kd).logits
    ]


def _ablation_in_words() -> str:
    theirs = ABLATION["KD&IG"].mean - ABLATION["KD"].mean
    best, best_alone = ABLATION["KD&IG"].best, ABLATION["Student"].best
    assert best is not None  # the paper tells both
    assert best_alone is not None
    other = COMPRESSION["KD&IG", ABLATION_DROP].mean - COMPRESSION["KD", ABLATION_DROP].mean
    return (
        f"At 4.12× the paper reports {number(ABLATION['KD&IG'].mean)}{NARROW}% for KD&IG and "
        f"{number(ABLATION['KD'].mean)}{NARROW}% for KD, "
        f"a difference of {signed(theirs)} points (its Welch p .037, paired p .069; ten runs each); "
        f"the same two arms in its table by compression: {signed(other)}. "
        f"Its headline of {number(best)} against {number(best_alone)} compares the best of ten runs."
    )


def _subsets_in_words() -> str:
    kd, overlaid = MONTE_CARLO["KD"], MONTE_CARLO["KD&IG"]
    return (
        f"Over {kd.n} subsets of 80{NARROW}% the paper reports {number(overlaid.mean)}{NARROW}% for KD&IG and "
        f"{number(kd.mean)}{NARROW}% for KD, a difference of {signed(overlaid.mean - kd.mean)} points."
    )


def _beside_paper(results: StudyResults, name: str, kd: str, theirs: float) -> str:
    found = results.compare(name, kd, "top1")
    if math.isnan(found.p):
        return ""
    zero = "contains" if found.low <= 0 <= found.high else "excludes"
    return (
        f"Ours, {name} − {kd}: {signed(found.difference)} points ({_interval(found)}){_place(found, theirs)}, which "
        f"{zero} 0."
    )


def _interval(found: Comparison) -> str:
    interval = span(found.low, found.high, sign=True)
    return (
        f"95{NARROW}% interval {interval}, not adjusted; n = {found.n}" if interval else f"n = {found.n}, no interval"
    )


def _place(found: Comparison, theirs: float) -> str:
    """Say where the paper's difference lies, as the end of a clause; empty without an interval."""
    if math.isnan(found.low):
        return ""
    where = "lies below" if theirs < found.low else "lies above" if theirs > found.high else "lies inside"
    return f"; the paper's {signed(theirs)} {where} our interval"
