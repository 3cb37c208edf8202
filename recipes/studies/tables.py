"""Tables of the study's report, as text that both templates lay out."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from studies.contrast import Contrast
from studies.outcomes import OUTCOMES, outcome_of
from studies.results import StudyResults
from studies.statistics import Interval, Summary
from timm_igkd.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from timm_igkd.report import tables
from timm_igkd.report.tables import DASH, MINUS, NARROW, count

Answer = tuple[str, list[str]]  # a question, and sentences

CELL_COLUMNS = ("top1", "corruption_top1", "transfer_balanced_top1", "ece", "agreement", "ig_correlation")


class Entry(NamedTuple):
    """A cell of a table: its number, and what stands smaller below or behind it."""

    main: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """A table with row headings, which `columns` does not count; a row without entries heads those below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Entry]]]
    note: str = ""


def number(value: float, digits: int = 2) -> str:
    """Return a number with a real minus sign, or a dash for NaN."""
    if not math.isfinite(value):
        return DASH if math.isnan(value) else "∞"
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 2) -> str:
    """Return a difference with its sign, or a dash for NaN."""
    return DASH if math.isnan(value) else tables.signed(value, digits)


def span(low: float, high: float, digits: int = 2, sign: bool = False) -> str:
    """Return an interval in words, or nothing where it is undefined."""
    if math.isnan(low) or math.isnan(high):
        return ""
    show = signed if sign else number
    return f"{show(low, digits)} to {show(high, digits)}"


def unit_of(points: float) -> str:
    """Return the unit of a number of percentage points."""
    return "point" if points == 1 else "points"


def probability(p: float) -> str:
    """Return a p value to three decimals."""
    return DASH if math.isnan(p) else "<0.001" if p < 0.0005 else f"{p:.3f}"


def summary_entry(summary: Summary, digits: int, n_runs: int) -> Entry:
    """Return a cell's mean, with its deviation and intervals, and n where it is not that of the cell's runs."""
    parts = []
    if summary.n > 1:
        parts.append(f"sd {number(summary.sd, digits)}")
    parts.append(span(summary.low, summary.high, digits))
    if not math.isnan(summary.bca_low):
        parts.append(f"BCa {span(summary.bca_low, summary.bca_high, digits)}")
    if summary.n not in (n_runs, 0):
        parts.append(f"n {summary.n}")
    return Entry(number(summary.mean, digits), "; ".join(part for part in parts if part))


def cells_table(results: StudyResults) -> Table:
    """Return mean, sd and interval of every cell in every outcome that was measured, with its size."""
    shown = [OUTCOMES[column] for column in CELL_COLUMNS if results.is_measured(column)]
    rows = []
    for name in results.cells:
        n_runs = len(results.runs[name])
        entries = [Entry(str(n_runs))]
        entries += [summary_entry(results.summary(name, item.column), item.digits, n_runs) for item in shown]
        parameters, compression = results.constant(name, "num_parameters"), results.constant(name, "compression")
        entries.append(Entry(DASH if math.isnan(parameters) else count(parameters)))
        entries.append(Entry(DASH if math.isnan(compression) else f"{compression:.2f}×"))
        macs, latency = results.constant(name, "macs"), results.constant(name, "latency_ms_1")
        entries.append(Entry(DASH if math.isnan(macs) else f"{macs / 1e6:.1f}{NARROW}M"))
        entries.append(Entry(DASH if math.isnan(latency) else f"{latency:.2f}{NARROW}ms"))
        rows.append((name, entries))
    columns = ["Runs", *(f"{item.short}{', ' + item.unit if item.unit else ''}" for item in shown)]
    columns += ["Parameters", "Compression", "MACs", "Latency, one image"]
    note = f"Means over seeds with their standard deviation and 95{NARROW}% t interval"
    if sizes := {results.resample_sizes(name): None for name in results.cells if results.is_resampled(name)}:
        note += "; runs on random subsets share images, so their variance of the mean is "
        note += " or ".join(_resampled_variance(*of_cell) for of_cell in sizes)
    elif any(len(runs) >= 20 for runs in results.runs.values()):
        note += "; from 20 seeds also the BCa bootstrap interval"
    note += ". No interval where a cell has one run or runs that do not differ."
    return Table("Cells", columns, rows, f"{note} {exploratory_note(results)}".strip())


def _resampled_variance(n_left_out: int, n_train: int) -> str:
    """Return the formula of the variance of the mean that `resampling` takes for subsets of this size."""
    if n_left_out <= n_train:
        ratio, sizes, source = "left out/trained on", f"{count(n_left_out)}/{count(n_train)}", "(Nadeau and Bengio)"
    else:
        ratio, sizes = "trained on/left out", f"{count(n_train)}/{count(n_left_out)}"
        source = "(draws of less than half hardly overlap)"
    return f"(1/J + {ratio}) sd² {source}, {ratio} = {sizes}"


def exploratory_note(results: StudyResults) -> str:
    """Return what is said beside numbers of a primary study that its plan does not name."""
    if results.config.purpose != "primary":
        return ""
    named = " and ".join(outcome_of(column).title.lower() for column in results.config.outcomes)
    return f"All but {named} is exploratory."


def contrast_table(results: StudyResults, column: str) -> Table | None:
    """Return the contrasts named in advance in one outcome, or None where none was measured."""
    contrasts = results.contrasts(column)
    if not any(contrast.comparison.n for contrast in contrasts):
        return None
    outcome, with_images = outcome_of(column), column == "top1"
    if has_subsets(results):
        columns = ["Common subsets", "Difference, points", "Corrected p", "Holm p"]
        rows = [(contrast.name, _contrast_entries(contrast, None, False)[: len(columns)]) for contrast in contrasts]
    else:
        columns = ["Common seeds", "Difference, points", "Paired p", "Holm p", "Welch p", "Effect size d_z"]
        columns += ["Over seeds and test images"] if with_images else []
        bound = results.config.smallest_effect.get(column)
        columns += [] if bound is None else [f"TOST p, ±{bound:g} {unit_of(bound)}"]
        if wanted := results.effect_of_interest(column):
            columns += [f"Power at {wanted:g} {unit_of(wanted)}"]
        rows = []
        for contrast in contrasts:
            interval = results.bootstrap(contrast.a, contrast.b) if with_images else None
            rows.append((contrast.name, _contrast_entries(contrast, interval, with_images)))
    role = _role_of(results, column)
    return Table(
        f"{outcome.title}{f' ({role})' if role else ''}: contrasts",
        columns,
        rows,
        contrast_note(results) if column == results.config.outcomes[0] else "",
    )


def has_subsets(results: StudyResults) -> bool:
    """Say whether any contrast is one of Monte Carlo subsets."""
    return any(results.is_resampled(name) for pair in results.config.contrasts for name in pair)


def contrast_note(results: StudyResults) -> str:
    """Return how the numbers of the contrast tables are made."""
    family = len(results.config.contrasts)
    subsets = has_subsets(results)
    test = "Paired t test on common seeds"
    if subsets:
        test = "Corrected resampled t test (Nadeau and Bengio) on the differences over common subsets"
    first = (
        f"{test}, with its 95{NARROW}% interval, not adjusted; Holm over the {family} "
        f"contrast{'s' if family != 1 else ''} named in advance, for each outcome by itself"
    )
    outcomes = len(results.config.outcomes)
    several = f": 5{NARROW}% of false differences each, up to {5 * outcomes}{NARROW}% over all {outcomes}."
    first += several if outcomes > 1 else "."
    if subsets:
        return f"{first} Subsets overlap: tests, effect sizes and bootstraps of independent runs do not apply."
    return (
        f"{first} sd: of the differences, n − 1. Welch's test ignores the pairing. d_z: mean over that deviation, "
        "Hedges-corrected, its interval from the noncentral t. Over seeds and test images: two-level bootstrap "
        "interval, too narrow with few seeds. "
        f"{_tost_note(results)}"
        "Power of the paired test at the observed standard deviation of the differences."
    )


def _tost_note(results: StudyResults) -> str:
    if not results.config.smallest_effect:
        return ""
    return (
        "TOST: two one-sided tests of equivalence within the smallest difference of interest, with Holm's p over the "
        f"contrasts, an adjustment of its own beside that of the differences; and the 90{NARROW}% interval, not "
        "adjusted. "
    )


def _role_of(results: StudyResults, column: str) -> str:
    named = results.config.outcomes
    if column not in named:
        return "not named in advance"
    if results.config.purpose != "primary":
        return "exploratory"
    return {0: "primary outcome", 1: "key secondary outcome"}.get(named.index(column), "")


def _contrast_entries(contrast: Contrast, interval: Interval | None, with_images: bool) -> list[Entry]:
    found = contrast.comparison
    details = [span(found.low, found.high, sign=True), *([] if math.isnan(found.sd) else [f"sd {number(found.sd)}"])]
    entries = [
        Entry(str(found.n)),
        Entry(signed(found.difference), "; ".join(detail for detail in details if detail)),
        Entry(probability(found.p)),
        Entry(probability(contrast.holm_p)),
        Entry(probability(found.welch_p), span(found.welch_low, found.welch_high, sign=True)),
        Entry(number(found.effect), span(found.effect_low, found.effect_high)),
    ]
    if with_images:
        entries.append(Entry(DASH if interval is None else span(interval.low, interval.high, sign=True) or DASH))
    if contrast.equivalence is not None:
        within = contrast.equivalence
        detail = f"Holm {probability(contrast.equivalence_holm_p)}; {span(within.low, within.high, sign=True)}"
        entries.append(Entry(probability(within.p), detail))
    if contrast.wanted is None:
        return entries
    power = DASH if math.isnan(contrast.power) else f"{100 * contrast.power:.0f}{NARROW}%"
    details = []
    if not math.isnan(contrast.strict_power):
        details.append(f"{100 * contrast.strict_power:.0f}{NARROW}% in Holm's first step")
    if not math.isnan(contrast.needed):
        details.append(f"80{NARROW}% needs n = {_seeds(contrast.needed)}")
    return [*entries, Entry(power, "; ".join(details))]


def _seeds(needed: float) -> str:
    return "over 100,000" if math.isinf(needed) else count(needed)


def corruption_table(results: StudyResults) -> Table | None:
    """Return every cell's mean accuracy by kind of corruption over the severities, or None where none was measured."""
    names = [name for name in results.cells if results.values(name, "corruption_top1")]
    if not names:
        return None
    rows = [
        (name, [Entry(number(float(np.mean(list(by_kind(results, name, kind).values()))), 1)) for kind in CORRUPTIONS])
        for name in names
    ]
    n = count(results.constant(names[0], "corruption_n"))
    columns = [kind.replace("_", " ") for kind in CORRUPTIONS]
    note = f"Top-1 in % on {n} test images, mean over {len(SEVERITIES)} severities and all seeds. "
    note += "Single kinds are exploratory."
    return Table("Accuracy by corruption", columns, rows, note)


def by_kind(results: StudyResults, cell: str, kind: str) -> dict[int, float]:
    """Return seed -> accuracy under one kind of corruption, mean over its severities."""
    levels = [results.values(cell, f"corruption/{kind}/{severity}") for severity in SEVERITIES]
    seeds = set.intersection(*(set(level) for level in levels))
    return {seed: float(np.mean([level[seed] for level in levels])) for seed in sorted(seeds)}


def transfer_table(results: StudyResults) -> Table | None:
    """Return every cell's mean accuracy on the foreign images by class, or None where it was not measured."""
    found: dict[str, dict[str, float]] = {}
    for name in results.cells:
        runs = [
            json.loads(row["transfer_per_class"])
            for row in results.runs[name].values()
            if row["transfer_per_class"] and not results.is_failed(row)
        ]
        if runs:
            found[name] = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
    if not found:
        return None
    columns = list(next(iter(found.values())))
    rows = [
        (name, [Entry(number(classes.get(key, math.nan), 1)) for key in columns]) for name, classes in found.items()
    ]
    n = count(results.constant(next(iter(found)), "transfer_n"))
    note = f"Top-1 in % on {n} foreign images, mean over seeds; exploratory."
    teacher = results.constant(next(iter(found)), "teacher_transfer_top1")
    if not math.isnan(teacher):
        note += f" All of them together: the teacher {number(teacher)}{NARROW}%."
        note += " The paper's, on its own subset: 67.37." if "cifar10" in results.config.dataset else ""
    return Table("Transfer by class", columns, rows, note)
