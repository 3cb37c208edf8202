"""The figure of accuracy against compression, with the paper's means beside ours."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from study_paper import COMPRESSION, PARAMETERS, TEACHER_PARAMETERS, arm_name, paper_results
from study_results import StudyResults
from timm_igkd.report_figures import ROLES, render_svg

Figure = tuple[str, str]  # SVG, and what it shows in words


def colour(results: StudyResults, cell: str) -> str:
    """Return the colour of a cell: aligned overlay, control overlay, or none."""
    settings = results.cell(cell)
    if settings.overlay_prob == 0:
        return ROLES["ink"]
    return ROLES["student" if settings.overlay_source == "aligned" else "teacher"]


def _arms(results: StudyResults) -> dict[str, list[str]]:
    """Return cells that differ in nothing but their size, under a common name, smallest compression first."""
    groups: dict[str, list[str]] = {}
    for cell in results.cells:
        settings = results.cell(cell)
        groups.setdefault(repr(replace(settings, drop=0, save=False, student_args={})), []).append(cell)
    named = {}
    for cells in groups.values():
        cells.sort(key=lambda cell: results.constant(cell, "compression"))
        label = cells[0].partition(", drop ")[0]  # a grid's name
        named[arm_name(results.cell(cells[0])) if label in cells and len(cells) > 1 else label] = cells
    return named


def compression(results: StudyResults, name: str) -> Figure | None:
    """Show accuracy against compression with intervals, and the arms' differences from the first; the paper beside."""
    arms = {arm: cells for arm, cells in _arms(results).items() if len(cells) > 1}
    if not arms:
        return None
    styles = dict(zip(arms, _styles(results, arms), strict=True))
    is_paper = any(
        paper_results(results.config, results.cell(cell), results.constant(cell, "num_parameters"))
        for cells in arms.values()
        for cell in cells
    )

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        reference = next(iter(arms))
        for arm, cells in arms.items():
            _draw_levels(left, results, cells, styles[arm], arm)
            if arm != reference:
                _draw_gaps(right, results, cells, arms[reference], styles[arm])
        if is_paper:
            _draw_paper(left, right, results, arms, styles)
        right.axhline(0, color=ROLES["ink"], linewidth=1, linestyle=(0, (3, 2)), zorder=1)
        left.set_title("Clean accuracy, %", loc="left", fontsize=9.5, pad=8)
        right.set_title(f"Difference from {reference}, points", loc="left", fontsize=9.5, pad=8)
        ticks = sorted({results.constant(cell, "compression") for cells in arms.values() for cell in cells})
        for axes in (left, right):
            _compression_axis(axes, ticks)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)

    words = "Clean accuracy against compression, with 95 % intervals" + (
        ", the paper's means hollow." if is_paper else "."
    )
    return render_svg(f"{name}-compression", (8.4, 4.2), draw), words


def _styles(results: StudyResults, arms: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Return colour and marker of each arm; arms of one colour differ in their markers."""
    markers, used = "osD^vP*X", {}
    styles = []
    for cells in arms.values():
        shade = colour(results, cells[0])
        used[shade] = used.get(shade, -1) + 1
        styles.append({"color": shade, "marker": markers[used[shade] % len(markers)]})
    return styles


def _draw_levels(axes: Any, results: StudyResults, cells: Sequence[str], style: dict[str, Any], label: str) -> None:
    found = [results.summary(cell, "top1") for cell in cells]
    x = [results.constant(cell, "compression") for cell in cells]
    for cell, size in zip(cells, x, strict=True):
        values = list(results.values(cell, "top1").values())
        axes.plot([size] * len(values), values, "o", color=style["color"], markersize=2, alpha=0.4, markeredgewidth=0)
    axes.vlines(x, [s.low for s in found], [s.high for s in found], color=style["color"], linewidth=2)
    axes.plot(x, [s.mean for s in found], **style, markersize=4.5, linewidth=1.1, label=label)


def _draw_gaps(
    axes: Any, results: StudyResults, cells: Sequence[str], reference: Sequence[str], style: dict[str, Any]
) -> None:
    others = {results.cell(cell).drop: cell for cell in reference}
    pairs = [(cell, others[results.cell(cell).drop]) for cell in cells if results.cell(cell).drop in others]
    found = [results.compare(a, b, "top1") for a, b in pairs]
    shift = {"o": 1.0, "s": 1.05, "D": 0.95, "^": 1.1}.get(style["marker"], 0.9)
    x = [
        results.constant(a, "compression") * shift * (1.03 if style["color"] == ROLES["teacher"] else 0.98)
        for a, _ in pairs
    ]
    axes.vlines(x, [c.low for c in found], [c.high for c in found], color=style["color"], linewidth=2)
    axes.plot(x, [c.difference for c in found], **style, markersize=4.5, linewidth=0.8)


def _draw_paper(
    left: Any, right: Any, results: StudyResults, arms: dict[str, list[str]], styles: dict[str, Any]
) -> None:
    """Add the paper's means of the arms that are ours too, hollow and without a line."""
    for arm, cells in arms.items():
        paper_arm = arm_name(results.cell(cells[0]))
        drops = [drop for drop in PARAMETERS if (paper_arm, drop) in COMPRESSION]
        x = [TEACHER_PARAMETERS / PARAMETERS[drop] for drop in drops]
        hollow = styles[arm] | {"markerfacecolor": "none", "linestyle": "none", "markersize": 6, "alpha": 0.8}
        left.plot(x, [COMPRESSION[paper_arm, drop].mean for drop in drops], **hollow, label=f"{arm}, paper")
        base = arm_name(results.cell(next(iter(arms.values()))[0]))
        if arm != next(iter(arms)) and drops:
            right.plot(x, [COMPRESSION[paper_arm, d].mean - COMPRESSION[base, d].mean for d in drops], **hollow)


def _compression_axis(axes: Any, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(ticks, [f"{tick:.3g}" if tick < 100 else f"{tick:.0f}" for tick in ticks])
    axes.set_xlabel("times fewer parameters than the teacher")
