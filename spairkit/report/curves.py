"""Line charts and histograms as SVG, to stand inside a page."""

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# a chart is as good in another font; a stale cache of fonts names a dozen on stderr
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
"""Okabe and Ito's, which colour-blind people tell apart on white."""

MAX_POINTS = 300
"""Of a line; longer ones are averaged in equal stretches."""

MAX_BARS = 16
"""Of a histogram."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "spairkit",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#b8bcc4",
    "axes.labelcolor": "#596070",
    "xtick.color": "#596070",
    "ytick.color": "#596070",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
"""Of every chart, as matplotlib's settings."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line(records: Sequence[Mapping[str, Any]], key: str, name: str, x: str = "step") -> Line:
    """The numbers under `key` over those under `x`, in the order of the records."""
    pairs = [(record.get(x), record.get(key)) for record in records]
    points = [(float(x), float(y)) for x, y in pairs if is_plottable(x) and is_plottable(y)]
    stretch = -(-len(points) // MAX_POINTS) or 1
    means = [
        [sum(column) / len(part) for column in zip(*part, strict=True)]
        for part in (points[i : i + stretch] for i in range(0, len(points), stretch))
    ]
    return Line(name, [place for place, _ in means], [value for _, value in means])


def chart(
    lines: Sequence[Line], *, x_label: str, y_label: str, share: bool = False
) -> Markup | None:
    """The lines that have points, as an SVG element; None where none has.

    Args:
        lines: five at most.
        x_label: what x is.
        y_label: what y is, with its unit.
        share: whether y lies in [0, 1]. Otherwise y is logarithmic where the lines are positive
            and span more than a factor of 20.
    """
    drawn = [item for item in lines if item.x]
    if not drawn:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(x_label, y_label, 2.9)
        for item, colour in zip(drawn, COLOURS, strict=False):
            marker = "o" if len(item.x) <= 30 else None
            axes.plot(item.x, item.y, color=colour, lw=1.6, marker=marker, ms=3.5, label=item.name)
        values = [y for item in drawn for y in item.y]
        if share:
            axes.set_ylim(0, 1.02)
        elif min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        figure.legend(loc="outside upper left", ncols=len(drawn), frameon=False, handlelength=1.4)
        return _svg(figure)


def histogram(counts: Sequence[int], *, x_label: str, y_label: str) -> Markup:
    """The number of times that each count, or each of some 16 ranges of counts, occurs, as SVG.

    Args:
        counts: one at least, from 0.
        x_label: what is counted.
        y_label: where it is counted.
    """
    least, most = min(counts), max(counts)
    width = -(-(most - least + 1) // MAX_BARS)
    heights: dict[int, int] = {}
    for count in counts:
        start = least + (count - least) // width * width
        heights[start] = heights.get(start, 0) + 1
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(x_label, y_label, 1.9)
        centres = [start + (width - 1) / 2 for start in heights]
        axes.bar(centres, list(heights.values()), width=0.85 * width, color=COLOURS[0])
        axes.set_xlim(least - width, most + width)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        return _svg(figure)


def _axes(x_label: str, y_label: str, height: float) -> tuple[Figure, Axes]:
    """An empty chart with whole numbers on the x-axis; `height` is in inches."""
    figure = Figure(figsize=(4.8, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#e8eaee", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _svg(figure: Figure) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # the names in it are ours: nothing in a chart comes from a file
    return Markup(text[text.index("<svg") :])


def is_plottable(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number, and one that an axis can hold."""
    return isinstance(value, (int, float)) and -1e30 < value < 1e30
