"""What a study says in plain words, computed from its contrasts; an effect is claimed only where the plan allows it."""

import math

from studies.beside_paper import beside_paper
from studies.cells import has_aligned_overlay, is_aligned_against_control, is_overlay_against_none
from studies.contrast import Contrast
from studies.cost import cost_against_teacher
from studies.results import LEAST_SEEDS, StudyResults
from studies.tables import Answer, has_subsets, probability, signed, span, unit_of
from timm_igkd.report.tables import NARROW

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
    more = (_alignment, _others, beside_paper, _failures)
    found += [answer for ask in more if (answer := ask(results))]
    cost = cost_against_teacher(results)
    if not found:
        nothing = "No pre-specified contrast, so nothing is claimed."
        if results.config.contrasts:
            nothing = "No contrast named in advance answers a question by itself, so nothing is claimed."
        found = [("What follows from the numbers?", [nothing])]
    return [*found, ("How much smaller and faster is the student?", cost)] if cost else found


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
    if column == "top1" and (dose := _dose(results)):
        sentences.append(dose)
    return question, [sentence for sentence in sentences if sentence]


def _dose(results: StudyResults) -> str:
    """Return how often an image is overlaid in the training of a primary study's aligned arm."""
    if results.config.purpose != "primary":
        return ""
    doses = {(c.overlay_prob * c.epochs, c.epochs) for c in results.config.cells.values() if has_aligned_overlay(c)}
    told = " or ".join(f"{dose:g} of {epochs}" for dose, epochs in sorted(doses))
    return f"On average an image is overlaid in {told} epochs."


def robustness(results: StudyResults) -> str:
    """Return as a clause whether a complete primary study shows robustness: a gain over none and over blank overlays.

    An overlay is itself a loss of contrast; a blank one is that alone.
    """
    gains: dict[str, Contrast] = {}
    for contrast in results.contrasts("corruption_top1"):
        a, b = results.cell(contrast.a), results.cell(contrast.b)
        is_blank = is_aligned_against_control(a, b) and b.overlay_source == "blank"
        if (is_blank or is_overlay_against_none(a, b)) and not why_nothing_is_claimed(
            results, "corruption_top1", contrast
        ):
            gains["blank ones" if is_blank else "none"] = contrast
    if len(gains) < 2:
        return ""
    lacking = [name for name, c in gains.items() if not (c.is_significant and c.comparison.difference > 0)]
    small = {name: c.equivalence.bound for name, c in gains.items() if c.equivalence and c.is_equivalent}
    how = "not shown" if lacking else "shown"
    if limited := [name for name in small if not lacking or name in lacking]:  # the smaller gain is the robustness
        over = "" if len(limited) == len(gains) else f" over {limited[0]}"
        bound = _points(small[limited[0]])
        how += f", a gain of {bound} is ruled out{over}" if lacking else f", by less than {bound}{over}"
    parts = [f"over {name} {signed(gains[name].comparison.difference)}" for name in sorted(gains, reverse=True)]
    return f"robustness, a gain over no overlays and over blank ones both, is {how} ({', '.join(parts)} points)"


def _alignment(results: StudyResults) -> Answer | None:
    found, shown = [], []
    for column in QUESTIONS:
        if column not in results.config.outcomes:
            continue
        against = [
            contrast
            for contrast in results.contrasts(column)
            if is_aligned_against_control(results.cell(contrast.a), results.cell(contrast.b)) and contrast.comparison.n
        ]
        found += [verdict(results, contrast, column) for contrast in against]
        shown += [
            f"{ADVANTAGE[column]} is {finding(contrast)}"
            for contrast in against
            if results.cell(contrast.b).overlay_source == "shuffled"
            and not why_nothing_is_claimed(results, column, contrast)
        ]
    if not found:
        return None
    if shown:
        controls = {cell.overlay_source for cell in results.config.cells.values()}
        found.insert(
            0,
            "For this teacher, alignment is tested by aligned minus shuffled, the same maps of other images: "
            f"{'; '.join(shown)}. Permuted and blank also differ in texture and brightness.",
        )
        if not controls & {"sobel", "random_teacher"}:
            found.append(
                "That it has to be integrated gradients is not tested: no edges and no untrained network's maps are "
                "among the arms."
            )
    return "Does it matter that the maps are aligned with their images?", found


def _others(results: StudyResults) -> Answer | None:
    """Return an exploratory study's contrasts that no other question is about, as with KD for longer."""
    told = []
    for column in QUESTIONS if results.config.purpose == "exploratory" else ():
        for contrast in results.contrasts(column):
            a, b = results.cell(contrast.a), results.cell(contrast.b)
            if not is_overlay_against_none(a, b) and not is_aligned_against_control(a, b):
                told.append(verdict(results, contrast, column))
    return ("What do the other contrasts show?", [text for text in told if text]) if any(told) else None


def verdict(results: StudyResults, contrast: Contrast, column: str) -> str:
    """Return what one contrast says, with numbers; empty where no seed is common.

    "primary" studies claim an effect where Holm's p is below 0.05; others, and outcomes that were not named in advance,
    never.
    """
    what = ADVANTAGE.get(column, column)
    if contrast.comparison.n == 0:
        return ""
    numbers = measured(contrast, "subsets" if has_subsets(results) else "seeds")
    if why := why_nothing_is_claimed(results, column, contrast):
        return f"{contrast.name}, {what}: {numbers}; {why}, so nothing is claimed."
    return f"For this teacher, on these test images, {contrast.name}, {what}: {finding(contrast)}, {numbers}."


def why_nothing_is_claimed(results: StudyResults, column: str, contrast: Contrast) -> str:
    """Return why a contrast is no claim; empty where it may be one."""
    if results.config.purpose != "primary":
        return "exploratory"
    if column not in results.config.outcomes:
        return "not named in advance"
    if results.is_interim:
        return "interim, the plan is not complete"
    return f"fewer than {LEAST_SEEDS} common seeds" if contrast.comparison.n < LEAST_SEEDS else ""


def finding(contrast: Contrast) -> str:
    """Return what a contrast of a primary study shows."""
    bound = contrast.equivalence.bound if contrast.equivalence else math.nan
    if contrast.is_significant:
        word = "higher" if contrast.comparison.difference > 0 else "lower"
        return f"{word}, by less than {_points(bound)}" if contrast.is_equivalent else word
    within = f"equivalent within ±{bound:g} {unit_of(bound)}"
    if contrast.is_equivalent:
        return within
    return f"not shown to differ{f', nor to be {within}' if contrast.equivalence else ''}"


def _points(bound: float) -> str:
    return f"the {bound:g} {unit_of(bound)} that matter{'s' if bound == 1 else ''}"


def measured(contrast: Contrast, unit: str = "") -> str:
    """Return a contrast's numbers: the 95 % interval with the test of a difference, the 90 % one with that of none.

    The intervals are of one contrast, the p values adjusted over all: they can say different things.
    """
    found, within = contrast.comparison, contrast.equivalence
    if math.isnan(found.p):
        why = "too few runs, or runs without spread, for an interval"
        return f"{signed(found.difference)} points (n = {found.n}; {why})"
    text = (
        f"{signed(found.difference)} points (95{NARROW}% interval {span(found.low, found.high, sign=True)}, not "
        f"adjusted; Holm-adjusted p {_equals(contrast.holm_p)}"
    )
    is_open = contrast.is_equivalent or not contrast.is_significant
    if within is not None and is_open and not math.isnan(contrast.equivalence_holm_p):
        interval = f"90{NARROW}% interval {span(within.low, within.high, sign=True)}"
        text += f"; TOST, Holm-adjusted p {_equals(contrast.equivalence_holm_p)}, {interval}"
    return f"{text}; n = {found.n}{f' {unit}' if unit else ''})"


def _equals(p: float) -> str:
    text = probability(p)
    return text if text.startswith("<") else f"= {text}"


def _failures(results: StudyResults) -> Answer | None:
    if not (counts := failures(results)):
        return None
    return "Did every run succeed?", [f"No: failed are {counts}. Their seeds are in no contrast of the arm."]


def failures(results: StudyResults) -> str:
    """Return how many runs of each arm of a primary study failed: where arms differ in it, the others are compared."""
    failed = {name: sum(map(results.is_failed, runs.values())) for name, runs in results.runs.items()}
    if results.config.purpose != "primary" or not any(failed.values()):
        return ""
    return ", ".join(f"{name} {count} of {len(results.runs[name])}" for name, count in failed.items())
