"""The figure of accuracy against compression, with the paper's means beside ours."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from studies.cells import Cell
from studies.paper import COMPRESSION, arm_name, paper_results
from studies.results import StudyResults
from timm_igkd.report.figures import ROLES, render_svg

Figure = tuple[str, str]  # SVG, and what it shows in words

_HOLLOW = {"markerfacecolor": "none", "linestyle": "none", "markersize": 7}


def colour(results: StudyResults, cell: str) -> str:
    """Return the colour of a cell: aligned overlay, control overlay, or none."""
    settings = results.cell(cell)
    if settings.overlay_prob == 0:
        return ROLES["ink"]
    return ROLES["student" if settings.overlay_source == "aligned" else "teacher"]


def _size(cell: Cell) -> tuple[int, str]:
    """Return the settings in which cells of one arm differ."""
    return cell.drop, repr(sorted(cell.student_args.items()))


def _arms(results: StudyResults) -> dict[str, list[str]]:
    """Return cells that differ in nothing but their size, under a common name, smallest compression first."""
    groups: dict[str, list[str]] = {}
    for cell in results.cells:
        settings = results.cell(cell)
        groups.setdefault(repr(replace(settings, drop=0, save=False, student_args={})), []).append(cell)
    labels = []
    for cells in groups.values():
        cells.sort(key=lambda cell: results.constant(cell, "compression"))
        label = cells[0].partition(", drop ")[0]  # a grid's name
        labels.append(_common_name(results.cell(cells[0])) if label in cells and len(cells) > 1 else label)
    named = {}
    for label, cells in zip(labels, groups.values(), strict=True):
        others = [other[0] for other in groups.values() if other is not cells]
        named[cells[0] if labels.count(label) > 1 or label in others else label] = cells
    return named


def _common_name(settings: Cell) -> str:
    """Return the paper's name of an arm, with what its overlays are where they are not the images' own maps."""
    is_control = settings.overlay_prob > 0 and settings.overlay_source != "aligned"
    return f"{arm_name(settings)} {settings.overlay_source}" if is_control else arm_name(settings)


def compression(results: StudyResults, name: str) -> Figure | None:
    """Show accuracy against compression with intervals, and the arms' differences from the first; the paper beside."""
    arms = {arm: cells for arm, cells in _arms(results).items() if len(cells) > 1}
    if not arms:
        return None
    styles = dict(zip(arms, _styles(results, arms), strict=True))
    papers = {arm: found for arm, cells in arms.items() if (found := _paper_means(results, cells))}
    ticks = sorted({results.constant(cell, "compression") for cells in arms.values() for cell in cells})
    reference, *others = arms

    def draw(figure: Any) -> None:
        figure.get_layout_engine().set(h_pad=0.12)
        grid = figure.add_gridspec(2 if others else 1, max(1, len(others)))
        levels = figure.add_subplot(grid[0, :])
        for arm, cells in arms.items():
            _draw_levels(levels, results, cells, styles[arm], arm)
        for arm, means in papers.items():
            levels.plot(list(means), list(means.values()), **styles[arm] | _HOLLOW, label=f"{arm}, paper")
        levels.set_title("Clean accuracy, %", loc="left", fontsize=9.5, pad=8)
        levels.legend(loc="lower left", ncols=2)
        _compression_axis(levels, ticks)
        first = None
        for column, arm in enumerate(others):
            first = axes = figure.add_subplot(grid[1, column], sharey=first)
            _draw_gaps(axes, results, arms[arm], arms[reference], styles[arm])
            both = [size for size in papers.get(arm, {}) if size in papers.get(reference, {})]
            axes.plot(both, [papers[arm][size] - papers[reference][size] for size in both], **styles[arm] | _HOLLOW)
            axes.set_title(f"{arm} − {reference}, points", loc="left", fontsize=9.5, pad=8)
            _compression_axis(axes, ticks[:: -(-len(ticks) * len(others) // 10)])

    words = "Clean accuracy against compression. Small dots: seeds; bars: 95 % intervals"
    words += "; hollow: the paper's means." if papers else "."
    return render_svg(f"{name}-compression", (8.8, 6.2 if others else 3.4), draw), words


def _paper_means(results: StudyResults, cells: Sequence[str]) -> dict[float, float]:
    """Return compression -> the paper's mean of the cells that repeat its runs."""
    found = {}
    for cell in cells:
        settings, parameters = results.cell(cell), results.constant(cell, "num_parameters")
        paper = COMPRESSION.get((arm_name(settings), settings.drop))
        if paper is not None and paper_results(results.config, settings, parameters):
            found[results.constant(cell, "compression")] = paper.mean
    return found


def _styles(results: StudyResults, arms: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Return colour and marker of each arm; arms of one colour differ in their markers."""
    markers, styles = "osD^vP*X", []
    used: dict[str, int] = {}
    for cells in arms.values():
        shade = colour(results, cells[0])
        used[shade] = used.get(shade, -1) + 1
        styles.append({"color": shade, "marker": markers[used[shade] % len(markers)]})
    return styles


def _draw_levels(axes: Any, results: StudyResults, cells: Sequence[str], style: dict[str, Any], label: str) -> None:
    found = [results.summary(cell, "top1") for cell in cells]
    x = [results.constant(cell, "compression") for cell in cells]
    for cell, size in zip(cells, x, strict=True):
        _draw_seeds(axes, size, list(results.values(cell, "top1").values()), style)
    axes.vlines(x, [s.low for s in found], [s.high for s in found], color=style["color"], linewidth=2)
    axes.plot(x, [s.mean for s in found], **style, markersize=4.5, linewidth=1.1, label=label)


def _draw_gaps(
    axes: Any, results: StudyResults, cells: Sequence[str], reference: Sequence[str], style: dict[str, Any]
) -> None:
    others = {_size(results.cell(cell)): cell for cell in reference}
    pairs = [(cell, others[size]) for cell in cells if (size := _size(results.cell(cell))) in others]
    found = [results.compare(a, b, "top1") for a, b in pairs]
    x = [results.constant(a, "compression") for a, _ in pairs]
    for (a, b), place in zip(pairs, x, strict=True):
        _draw_seeds(axes, place, list(results.differences(a, b, "top1")), style)
    axes.axhline(0, color=ROLES["ink"], linewidth=1, linestyle=(0, (3, 2)), zorder=1)
    axes.vlines(x, [c.low for c in found], [c.high for c in found], color=style["color"], linewidth=2.4)
    axes.plot(x, [c.difference for c in found], **style, markersize=4.5, linestyle="none")


def _draw_seeds(axes: Any, size: float, values: list[float], style: dict[str, Any]) -> None:
    """Draw the seeds a little to the right of their cell, which its bar would cover."""
    place = [size * 1.06] * len(values)
    axes.plot(place, values, "o", color=style["color"], markersize=2.2, alpha=0.45, markeredgewidth=0)


def _compression_axis(axes: Any, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(ticks, [f"{tick:.3g}×" if tick < 100 else f"{tick:.0f}×" for tick in ticks])
    axes.set_xlabel("fewer parameters than the teacher")
