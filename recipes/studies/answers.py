"""What a study says in plain words, computed from its contrasts; an effect is claimed only where the plan allows it."""

import math
from dataclasses import replace

from studies.cells import Cell
from studies.cost import cost_against_teacher
from studies.paper import ABLATION, ABLATION_DROP, COMPRESSION, MONTE_CARLO, arm_name, paper_results
from studies.results import Contrast, StudyResults
from studies.tables import has_subsets, number, probability, signed, span
from timm_igkd.report.tables import NARROW

Answer = tuple[str, list[str]]  # a question, and sentences

QUESTIONS = {
    "top1": "Does the overlay help clean accuracy?",
    "corruption_top1": "Does it help robustness to corruption?",
    "transfer_balanced_top1": "Does it help on foreign images of the same classes?",
}
ADVANTAGE = {
    "top1": "clean accuracy",
    "corruption_top1": "accuracy under corruption",
    "transfer_balanced_top1": "balanced transfer accuracy",
}
NO_CONCLUSION = "This study checks the machinery: no conclusion is drawn from its numbers."


def answers(results: StudyResults) -> list[Answer]:
    """Return the study's questions with what its numbers say; a check of the machinery answers nothing."""
    if results.config.purpose == "check":
        return [("What follows from the numbers?", [NO_CONCLUSION])]
    found = [answer for column, question in QUESTIONS.items() if (answer := _overlay(results, column, question))]
    found += [answer for answer in (_alignment(results), _paper(results)) if answer]
    cost = cost_against_teacher(results)
    if not found:
        nothing = "No contrast named in advance answers a question by itself, so nothing is claimed."
        found = [("What follows from the numbers?", [nothing])]
    return [*found, ("How much smaller and faster is the student?", cost)] if cost else found


def _has_aligned_overlay(cell: Cell) -> bool:
    return cell.overlay_prob > 0 and cell.overlay_source == "aligned"


def is_overlay_against_none(a: Cell, b: Cell) -> bool:
    """Say whether a overlays images with their own maps, b overlays none, and nothing else differs."""
    without = replace(a, overlay_prob=0.0, overlay_source=b.overlay_source, save=b.save)
    return _has_aligned_overlay(a) and without == b


def is_aligned_against_control(a: Cell, b: Cell) -> bool:
    """Say whether a overlays images with their own maps, b with others as often, and nothing else differs."""
    return (
        _has_aligned_overlay(a)
        and b.overlay_source != "aligned"
        and replace(a, overlay_source=b.overlay_source, save=b.save) == b
    )


def _overlay(results: StudyResults, column: str, question: str) -> Answer | None:
    sentences = [
        verdict(results, contrast, column)
        for contrast in results.contrasts(column)
        if is_overlay_against_none(results.cell(contrast.a), results.cell(contrast.b))
    ]
    if not any(sentences):
        return None
    if column == "corruption_top1" and (robust := robustness(results)):
        sentences.insert(0, f"For this teacher, {robust}.")
    return question, [sentence for sentence in sentences if sentence]


def robustness(results: StudyResults) -> str:
    """Return as a clause whether a complete primary study shows robustness: a gain over none and over blank overlays.

    An overlay is itself a loss of contrast; a blank one is that alone.
    """
    if why_nothing_is_claimed(results, "corruption_top1"):
        return ""
    gains: dict[bool, bool] = {}  # over blank overlays, over none
    for contrast in results.contrasts("corruption_top1"):
        a, b = results.cell(contrast.a), results.cell(contrast.b)
        is_blank = is_aligned_against_control(a, b) and b.overlay_source == "blank"
        if is_blank or is_overlay_against_none(a, b):
            gains[is_blank] = contrast.is_significant and contrast.comparison.difference > 0
    if len(gains) < 2:
        return ""
    shown = "shown" if all(gains.values()) else "not shown"
    return f"robustness, a gain over none and over blank overlays both, is {shown}"


def _alignment(results: StudyResults) -> Answer | None:
    found, higher = [], []
    for column in QUESTIONS:
        if column not in results.config.outcomes:
            continue
        against = [
            contrast
            for contrast in results.contrasts(column)
            if is_aligned_against_control(results.cell(contrast.a), results.cell(contrast.b)) and contrast.comparison.n
        ]
        found += [verdict(results, contrast, column) for contrast in against]
        higher += [
            ADVANTAGE[column]
            for contrast in against
            if results.cell(contrast.b).overlay_source == "shuffled"
            and contrast.is_significant
            and contrast.comparison.difference > 0
        ]
    if not found:
        return None
    if results.config.purpose == "primary" and not results.is_interim:
        shown = f"shown to raise {' and '.join(higher)}" if higher else "not shown to raise anything"
        found.insert(
            0,
            f"For this teacher, alignment is {shown}: aligned minus shuffled, the same maps of other images, tests it. "
            "Permuted and blank also differ in texture and brightness.",
        )
    return "Does it matter that the maps are aligned with their images?", found


def verdict(results: StudyResults, contrast: Contrast, column: str) -> str:
    """Return what one contrast says, with interval and n; empty where no seed is common.

    "primary" studies claim an effect where Holm's p is below 0.05; others, and outcomes that were not named in advance,
    never.
    """
    found, what = contrast.comparison, ADVANTAGE.get(column, column)
    if found.n == 0:
        return ""
    if math.isnan(found.p):
        return (
            f"{contrast.name}, {what}: {signed(found.difference)} points (n = {found.n}); "
            "too few runs, or runs without spread, for an interval."
        )
    numbers = (
        f"{signed(found.difference)} points (95{NARROW}% interval {span(found.low, found.high, sign=True)}, "
        f"n = {found.n} {'subsets' if has_subsets(results) else 'seeds'}, Holm-adjusted p {_equals(contrast.holm_p)})"
    )
    if why := why_nothing_is_claimed(results, column):
        return f"{contrast.name}, {what}: {numbers}; {why}, so nothing is claimed."
    return f"For this teacher, on these test images, {_claim(contrast, what)}: {numbers}{_tost(contrast)}."


def why_nothing_is_claimed(results: StudyResults, column: str) -> str:
    """Return why a contrast is no claim; empty where it may be one."""
    if results.config.purpose != "primary":
        return "exploratory"
    if column not in results.config.outcomes:
        return "not named in advance"
    return "interim, the plan is not complete" if results.is_interim else ""


def _claim(contrast: Contrast, what: str) -> str:
    bound = contrast.equivalence.bound if contrast.equivalence else math.nan
    if contrast.is_significant:
        word = "higher" if contrast.comparison.difference > 0 else "lower"
        small = f", by less than the {bound:g} points that matter" if contrast.is_equivalent else ""
        return f"{contrast.a} has {word} {what} than {contrast.b}{small}"
    if contrast.is_equivalent:
        return f"{contrast.a} and {contrast.b} are equivalent in {what} within ±{bound:g} points"
    nor = f", nor equivalence within ±{bound:g} points" if contrast.equivalence else ""
    return f"no difference in {what} is shown between {contrast.a} and {contrast.b}{nor}"


def _tost(contrast: Contrast) -> str:
    if contrast.equivalence is None or math.isnan(contrast.equivalence_holm_p):
        return ""
    within = contrast.equivalence
    interval = f"90{NARROW}% interval {span(within.low, within.high, sign=True)}"
    return f"; TOST, Holm-adjusted p {_equals(contrast.equivalence_holm_p)}, {interval}"


def _equals(p: float) -> str:
    text = probability(p)
    return text if text.startswith("<") else f"= {text}"


def _paper(results: StudyResults) -> Answer | None:
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
    return ("What of the paper holds?", sentences) if sentences else None


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
    low, high = found.low, found.high
    place = "lies inside" if low <= theirs <= high else "lies outside"
    zero = "contains" if low <= 0 <= high else "excludes"
    return (
        f"Ours, {name} − {kd}: {signed(found.difference)} points (95{NARROW}% interval {span(low, high, sign=True)}, "
        f"n = {found.n}; not adjusted). The paper's {signed(theirs)} {place} our interval, which {zero} 0."
    )
