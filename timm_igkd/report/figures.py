"""Figures of a report: drawings as SVG, inline in the page's colours or as files, and images as data URIs."""

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from timm_igkd.errors import InputError
from timm_igkd.evaluation.calibration import ReliabilityBins
from timm_igkd.report.run_files import History

# Drawn in these colours, then replaced by the page's CSS variables, so that one drawing serves light and dark mode.
ROLES = {
    "ink": "#010203",
    "muted": "#010204",
    "line": "#010205",
    "student": "#010206",
    "teacher": "#010207",
    "page": "#010208",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "timm-igkd",
    "font.size": 9,
    "axes.edgecolor": ROLES["line"],
    "axes.labelcolor": ROLES["muted"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": ROLES["line"],
    "grid.linewidth": 0.6,
    "xtick.color": ROLES["line"],
    "ytick.color": ROLES["line"],
    "xtick.labelcolor": ROLES["muted"],
    "ytick.labelcolor": ROLES["muted"],
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": ROLES["ink"],
    "legend.handlelength": 1.8,
    "text.color": ROLES["ink"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


_MARGIN = 8  # points around a drawing in a file of its own


def require_matplotlib(what: str = "the report page") -> None:
    """Raise InputError with the remedy where matplotlib, which `what` needs, is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"{what} needs matplotlib, which is not installed; pip install 'timm-igkd[demo]'") from error


def render_svg(name: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """Draw into a figure and return SVG to place in HTML, in the colours of the page.

    Args:
        name: keeps the ids of a page apart.
        size: width and height in inches.
        draw: gets the figure; it draws in the colours of `ROLES`.

    Raises:
        InputError: matplotlib is missing.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg, count=1
    )
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r"font-family:[^;\"]*;?", "", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for role, colour in ROLES.items():
        svg = svg.replace(colour, f"var(--{role})")
    return _compact(svg)


def svg_file(svg: str, colours: Mapping[str, str]) -> str:
    """Return a drawing of `render_svg` as a file of its own, on a background, for readers that know no CSS variables.

    Args:
        colours: role -> colour.
    """
    width, height = (float(size) + 2 * _MARGIN for size in re.findall(r"[\d.]+", svg)[2:4])  # of the viewBox
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-_MARGIN} {-_MARGIN} {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="sans-serif">'
        f'<rect x="{-_MARGIN}" y="{-_MARGIN}" width="100%" height="100%" fill="var(--page)"/>'
    )
    svg = opening + svg.partition(">")[2]
    return re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], svg) + "\n"


def _compact(svg: str) -> str:
    """Return a drawing without what no eye sees: line breaks, and digits beyond a hundredth of a point."""
    svg = re.sub(r">\s+<", "><", svg.strip())
    return re.sub(r'="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", " ".join(found[0].split())), svg)


def _series(history: History | None, column: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (epochs, values) of a column where it has a number, or None where it has none."""
    if history is None or column not in history or "epoch" not in history:
        return None
    known = np.isfinite(history[column])
    return (history["epoch"][known], history[column][known]) if known.any() else None


def _draw_lines(
    axes: Any, lines: Sequence[tuple[tuple[np.ndarray, np.ndarray] | None, str, str, str]], label: str
) -> None:
    """Draw (series, legend, role, line style) tuples; a single epoch becomes a dot."""
    for series, legend, role, style in lines:
        if series is not None:
            faint = style == ":"
            axes.plot(
                *series,
                style,
                color=ROLES[role],
                label=legend,
                marker="o" if len(series[0]) == 1 else "",
                markersize=4,
                linewidth=1.1 if faint else 1.6,
            )
    axes.set_title(label, loc="left", fontsize=9.5, color=ROLES["ink"], pad=8)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="best")


def learning_curves(student: History, teacher: History | None) -> list[tuple[str, str]]:
    """Return (SVG, description) of accuracy, cross-entropy and, after a distillation, the terms of the loss."""
    panels = [
        (
            "accuracy",
            "Top-1 accuracy (%)",
            [
                (_series(teacher, "val_top1"), "teacher, validation", "teacher", "--"),
                (_series(student, "val_top1"), "student, validation", "student", "-"),
                (_series(student, "top1_train"), "student, training", "student", ":"),
            ],
        ),
        (
            "cross-entropy",
            "Cross-entropy with the labels",
            [
                (_series(teacher, "val_loss"), "teacher, validation", "teacher", "--"),
                (_series(student, "val_loss"), "student, validation", "student", "-"),
                (_series(student, "task_loss"), "student, training", "student", ":"),
            ],
        ),
        (
            "loss-terms",
            "Terms of the student's training loss",
            [
                (_series(student, "loss"), "total, weighted", "ink", "-"),
                (_series(student, "distill_loss"), "distillation", "student", "--"),
                (_series(student, "attention_loss"), "attention transfer", "teacher", "-."),
                (_series(student, "explanation_loss"), "explanations", "teacher", ":"),
            ],
        ),
    ]
    figures = []
    for name, title, lines in panels:
        present = [line for line in lines if line[0] is not None]
        if not present or (name == "loss-terms" and len(present) < 2):
            continue

        def draw(figure: Any, lines: Any = lines, title: str = title, name: str = name) -> None:
            axes = figure.add_subplot()
            _draw_lines(axes, lines, title)
            values = np.concatenate([line[0][1] for line in lines if line[0] is not None])
            if name != "accuracy" and values.min() > 0 and values.max() / values.min() > 30:
                axes.set_yscale("log")

        ends = "; ".join(
            f"{legend}: {series[1][0]:.4g} to {series[1][-1]:.4g}" for series, legend, _, _ in present if series
        )
        figures.append((render_svg(name, (3.5, 2.7), draw), f"{title} by epoch, first to last. {ends}."))
    return figures


def reliability_diagram(name: str, role: str, bins: ReliabilityBins) -> str:
    """Return the SVG of accuracy by confidence above the share of images in each bin."""

    def draw(figure: Any) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        filled = bins.counts > 0
        width = 1 / len(bins.counts)
        left = bins.edges[:-1][filled]
        upper.plot([0, 1], [0, 1], "--", color=ROLES["muted"], linewidth=0.9)
        upper.bar(left, bins.accuracy[filled], width * 0.86, align="edge", color=ROLES[role], alpha=0.35)
        upper.plot(
            bins.confidence[filled],
            bins.accuracy[filled],
            "o",
            color=ROLES[role],
            markersize=4,
            label="mean of the bin",
        )
        upper.set(ylim=(0, 1.04), xlim=(0, 1), ylabel="accuracy")
        lower.bar(left, bins.counts[filled] / bins.counts.sum(), width * 0.86, align="edge", color=ROLES[role])
        lower.set(ylim=(0, 1), xlabel="confidence", ylabel="share")

    return render_svg(name, (3.6, 3.4), draw)


def data_uri(image: Image.Image) -> str:
    """Return a PNG data URI of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
