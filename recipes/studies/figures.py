"""Figures of the study's report, as inline SVG in the page's colours: (SVG, what it shows in words)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from studies.compression import Figure, colour, compression
from studies.outcomes import Outcome, outcome_of
from studies.results import StudyResults
from studies.statistics import normality
from studies.tables import by_kind, number, probability, signed
from timm_igkd.evaluation.corruptions import CORRUPTIONS
from timm_igkd.report.figures import ROLES, render_svg

SHOWN = ("top1", "corruption_top1", "transfer_balanced_top1")
MOST_CELLS = 20  # more are in the table, and those of several sizes in their own figure
MOST_CONNECTED = 8  # cells between which seeds are connected; more would be a tangle
_INTERVAL = {"linewidth": 3.2, "solid_capstyle": "butt"}
_SMALL = 8.5
_PATCH = {
    "facecolor": ROLES["page"],
    "edgecolor": "none",
    "alpha": 0.8,
    "pad": 0.6,
}  # keeps a number legible over lines


def _measured(results: StudyResults) -> list[Outcome]:
    return [outcome_of(column) for column in SHOWN if results.is_measured(column)]


def _rows_of(panels: Sequence[Any], labels: Sequence[str], colours: Sequence[str] | None = None) -> None:
    """Make the panels' common vertical axis one row a label, from the top."""
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.4, -0.7)
    for axes in panels:
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        axes.xaxis.get_major_locator().set_params(nbins=5)
    for index, text in enumerate(panels[0].get_yticklabels()):
        text.set_color(colours[index] if colours else ROLES["ink"])


def distributions(results: StudyResults, name: str) -> Figure | None:
    """Show every seed of every cell as a dot, connected between neighbouring cells, with mean and interval."""
    outcomes, cells = _measured(results), results.cells
    if not outcomes or len(cells) > MOST_CELLS:
        return None
    connected = len(cells) <= MOST_CONNECTED

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(outcomes), sharey=True, squeeze=False)[0]
        for axes, outcome in zip(panels, outcomes, strict=True):
            values = [results.values(cell, outcome.column) for cell in cells]
            if connected:
                _connect_seeds(axes, values)
            for row, cell in enumerate(cells):
                _draw_cell(
                    axes, row, list(values[row].values()), results.summary(cell, outcome.column), colour(results, cell)
                )
            axes.set_title(f"{outcome.title}, {outcome.unit}", loc="left", fontsize=9.5, pad=8)
            axes.margins(x=0.14)
        _rows_of(panels, cells, [colour(results, cell) for cell in cells])

    size = (1.6 + 2.6 * len(outcomes), 0.75 + 0.42 * len(cells))
    means = "; ".join(f"{cell} {number(results.summary(cell, outcomes[0].column).mean)}" for cell in cells)
    dots = "Dots: seeds, connected" if connected else "Dots: seeds"
    words = f"{dots}; bars: 95 % intervals. Mean {outcomes[0].title.lower()}: {means}."
    return render_svg(f"{name}-cells", size, draw), words


def _connect_seeds(axes: Any, values: Sequence[dict[int, float]]) -> None:
    for seed in sorted(set().union(*values)):
        points = [(column[seed], row) for row, column in enumerate(values) if seed in column]
        axes.plot(*zip(*points, strict=True), color=ROLES["line"], linewidth=0.7, zorder=1)


def _draw_cell(axes: Any, row: int, values: list[float], summary: Any, shade: str) -> None:
    edge = {"markeredgecolor": ROLES["page"], "markeredgewidth": 0.6}  # seeds stay visible on their interval
    axes.plot(values, [row] * len(values), "o", color=shade, markersize=4, zorder=4.5, **edge)
    if not values:
        return
    axes.plot([summary.low, summary.high], [row, row], color=shade, zorder=3, **_INTERVAL)
    axes.plot(summary.mean, row, "|", color=shade, markersize=13, markeredgewidth=1.8, zorder=4)
    axes.annotate(
        number(summary.mean),
        (summary.mean, row),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=_SMALL,
        color=shade,
        zorder=5,
        bbox=_PATCH,
    )


def contrasts(results: StudyResults, name: str) -> Figure | None:
    """Show the contrasts named in advance: each seed's difference, their mean and interval, and zero."""
    outcomes = [
        outcome for outcome in _measured(results) if any(c.comparison.n for c in results.contrasts(outcome.column))
    ]
    if not results.config.contrasts or not outcomes:
        return None
    labels = [f"{a}\n− {b}" for a, b in results.config.contrasts]

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(outcomes), sharey=True, squeeze=False)[0]
        for axes, outcome in zip(panels, outcomes, strict=True):
            axes.axvline(0, color=ROLES["ink"], linewidth=1, linestyle=(0, (3, 2)), zorder=1)
            is_named = outcome.column in results.config.outcomes
            for row, contrast in enumerate(results.contrasts(outcome.column)):
                differences = results.differences(contrast.a, contrast.b, outcome.column)
                shade = ROLES["student" if contrast.is_significant and is_named else "muted"]
                _draw_difference(axes, row, differences, contrast, shade)
            title = outcome.title if is_named else f"{outcome.title}\n(exploratory)"
            axes.set_title(title, loc="left", fontsize=9.5, pad=8)
            axes.set_xlabel("difference, points")
            axes.margins(x=0.14)
        _rows_of(panels, labels)

    size = (1.9 + 2.5 * len(outcomes), 0.95 + 0.62 * len(labels))
    words = "; ".join(f"{c.name} {signed(c.comparison.difference)}" for c in results.contrasts(outcomes[0].column))
    return render_svg(f"{name}-contrasts", size, draw), (
        "Dots: seeds; bars: 95 % intervals, not adjusted; p: Holm-adjusted, blue below 0.05 in outcomes named in "
        f"advance. {outcomes[0].title}: {words}."
    )


def _draw_difference(axes: Any, row: int, differences: np.ndarray, contrast: Any, shade: str) -> None:
    found = contrast.comparison
    below = np.full(len(differences), row + 0.17)
    axes.plot(differences, below, "o", color=shade, markersize=3.2, alpha=0.4, markeredgewidth=0, zorder=2)
    axes.plot([found.low, found.high], [row, row], color=shade, zorder=3, **_INTERVAL)
    axes.plot(found.difference, row, "o", color=shade, markersize=6.5, zorder=4)
    axes.annotate(
        f"{signed(found.difference)}, p {probability(contrast.holm_p)}",
        (found.difference, row),
        xytext=(0, 7),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=_SMALL,
        color=ROLES["ink"],
        bbox=_PATCH,
    )


def corruptions(results: StudyResults, name: str) -> Figure | None:
    """Show each contrast by kind of corruption: mean difference over severities with its t interval."""
    pairs = [(a, b) for a, b in results.config.contrasts if by_kind(results, a, next(iter(CORRUPTIONS)))]
    pairs = [(a, b) for a, b in pairs if _kind_difference(results, a, b, next(iter(CORRUPTIONS))).n]
    if not pairs:
        return None
    kinds = list(CORRUPTIONS)

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(pairs), sharey=True, sharex=True, squeeze=False)[0]
        for axes, (a, b) in zip(panels, pairs, strict=True):
            axes.axvline(0, color=ROLES["ink"], linewidth=1, linestyle=(0, (3, 2)), zorder=1)
            for row, kind in enumerate(kinds):
                found = _kind_difference(results, a, b, kind)
                axes.plot([found.low, found.high], [row, row], color=ROLES["muted"], zorder=3, **_INTERVAL)
                axes.plot(found.difference, row, "o", color=ROLES["ink"], markersize=5, zorder=4)
            axes.set_title(f"{a}\n− {b}", loc="left", fontsize=9, pad=8)
            axes.set_xlabel("points")
        _rows_of(panels, [kind.replace("_", " ") for kind in kinds])

    size = (1.3 + 1.85 * max(2, len(pairs)), 1.1 + 0.3 * len(kinds))
    words = (
        f"Differences by kind of corruption, mean over severities; exploratory: {len(kinds) * len(pairs)} intervals of "
        "95 %, not adjusted."
    )
    return render_svg(f"{name}-corruptions", size, draw), words


def _kind_difference(results: StudyResults, a: str, b: str, kind: str) -> Any:
    return results.compare_runs(a, b, by_kind(results, a, kind), by_kind(results, b, kind))


def quantiles(results: StudyResults, name: str) -> Figure | None:
    """Show normal Q-Q plots of the differences of each contrast (or of each cell), from n = 20."""
    column = results.config.outcomes[0]
    samples = {f"{a} −\n{b}": results.differences(a, b, column) for a, b in results.config.contrasts}
    if not samples:
        samples = {cell: np.array(list(results.values(cell, column).values())) for cell in results.cells}
    found = {label: fit for label, values in samples.items() if (fit := normality(values)) is not None}
    found = dict(list(found.items())[:8])
    if not found:
        return None

    def draw(figure: Any) -> None:
        columns = min(4, len(found))
        grid = figure.subplots(-(-len(found) // columns), columns, squeeze=False).flat
        for axes, (label, fit) in zip(grid, found.items(), strict=False):
            ends = np.array([fit.theoretical[0], fit.theoretical[-1]])
            axes.plot(ends, fit.intercept + fit.slope * ends, color=ROLES["muted"], linewidth=0.9)
            axes.plot(fit.theoretical, fit.ordered, "o", color=ROLES["student"], markersize=3.5, alpha=0.7)
            axes.set_title(label, loc="left", fontsize=9, pad=8)
            axes.set_xlabel(f"normal quantiles\nShapiro-Wilk p {probability(fit.p)}")
        for axes in list(grid):
            axes.set_visible(False)

    words = f"Normal Q-Q plots of {outcome_of(column).title.lower()}; reported, never used to choose the test."
    return render_svg(f"{name}-quantiles", (8.4, 2.6 * -(-len(found) // 4)), draw), words


FIGURES: tuple[tuple[str, Callable[[StudyResults, str], Figure | None]], ...] = (
    ("Contrasts", contrasts),
    ("All cells", distributions),
    ("Robustness by corruption", corruptions),
    ("Accuracy against compression", compression),
    ("Normality", quantiles),
)
