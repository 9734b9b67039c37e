"""Charts of results over the number of objects, with the published results dashed beside ours."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spairkit.experiments.published import Published
from spairkit.experiments.settings import MODELS
from spairkit.experiments.table import Row
from spairkit.metrics import NAMES
from spairkit.report.curves import COLOURS, STYLE

_COLUMNS = 3
_ONE, _EACH = (7.2, 4.4), (4.6, 3.6)  # inches of a chart alone, and of one of several
_PUBLISHED = {"lw": 1.2, "ls": "--", "mfc": "white", "capsize": 2, "alpha": 0.75}
_MOST_TICKS = 10


@dataclass(frozen=True)
class Line:
    """The results of one method over x: ours, and the published ones where there are any."""

    name: str
    ours: Mapping[Any, Published]
    """By x, a number; in a table that is not drawn also the name of a figure."""
    published: Mapping[Any, Published] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """Lines over one axis; also a table, with a row for each x of ours."""

    title: str
    x_label: str
    lines: Sequence[Line]
    """Five at most."""
    is_share: bool = True
    """Whether values lie in [0, 1]."""
    log_x: bool = False
    """Whether equal steps on the axis are equal factors."""

    def values(self) -> dict[str, Any]:
        """Plain values for `json.dumps`: by line and x."""
        return {
            line.name: {
                str(x): {"ours": plain(ours), "published": plain(line.published.get(x))}
                for x, ours in line.ours.items()
            }
            for line in self.lines
        }


def plain(value: Published | None) -> dict[str, Any] | None:
    """A mean with its interval for `json.dumps`."""
    return None if value is None else dict(vars(value))


def draw_charts(charts: Sequence[Chart], note: str) -> bytes:
    """Charts in rows of three, as a PNG.

    Solid lines are our results with 95 % intervals, dashed lines the published ones.

    Args:
        charts: at least one. Lines of one name have the same entry in the legend.
        note: printed below the charts.
    """
    columns = min(len(charts), _COLUMNS)
    rows = -(-len(charts) // columns)
    size = _ONE if len(charts) == 1 else (_EACH[0] * columns, _EACH[1] * rows + 0.8)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        places = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, chart in zip(places, charts, strict=False):
            _draw_chart(axes, chart)
            if len(charts) > 1:
                axes.set_ylabel("")
                axes.set_title(chart.title, fontsize=10, loc="left")
        for axes in places[len(charts) :]:
            axes.remove()
        known: dict[str, Any] = {}
        for axes in figure.axes:
            known |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        place: dict[str, Any] = {"loc": "outside right upper"}
        if len(charts) > 1:
            place = {"loc": "outside upper left", "ncols": min(len(known), columns + 1)}
        figure.legend(known.values(), known.keys(), frameon=False, **place)
        figure.supxlabel(note, fontsize=7, color="#596070", parse_math=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": "spairkit"})
    return buffer.getvalue()


def _draw_chart(axes: Axes, chart: Chart) -> None:
    def draw(intervals: Mapping[int, Published], **style: Any) -> None:
        points = list(intervals.values())
        ends = [[p.mean - p.low for p in points], [p.high - p.mean for p in points]]
        means = [p.mean for p in points]
        axes.errorbar(list(intervals), means, yerr=ends, marker="o", ms=4.5, **style)

    for line, colour in zip(chart.lines, COLOURS, strict=False):
        draw(line.ours, color=colour, label=line.name, lw=1.8, capsize=3)
        if line.published:
            draw(line.published, color=colour, label=f"{line.name} (paper, EMNIST)", **_PUBLISHED)
    if chart.is_share:
        axes.set_ylim(0, 1.02)
    else:
        axes.set_ylim(bottom=0)
    ticks = sorted({x for line in chart.lines for x in (*line.ours, *line.published)})
    if chart.log_x:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
        axes.tick_params(axis="x", labelsize="small")
    if len(ticks) <= _MOST_TICKS:
        axes.set_xticks(ticks, [_short(tick) for tick in ticks])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#e8eaee", lw=0.8)
    axes.set_axisbelow(True)
    if len(ticks) > 1:
        axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.title)


def draw_methods(
    ours: Mapping[str, Published],
    published: Mapping[str, Published],
    label: str,
    note: str,
    *,
    level: float | None = None,
) -> bytes:
    """One figure of several methods, in rows from top to bottom, as a PNG.

    Args:
        ours: our results by method, in [0, 1], with 95 % intervals.
        published: those of the paper, shown as rings, if there are any.
        label: of the axis.
        note: printed below.
        level: of a dotted line.
    """
    rows = {name: -place for place, name in enumerate(ours)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.4 + 0.34 * len(rows)), dpi=150, layout="constrained")
        axes = figure.subplots()
        for name, point in ours.items():
            ends = [[point.mean - point.low], [point.high - point.mean]]
            style: dict[str, Any] = {"marker": "o", "color": COLOURS[0], "capsize": 3}
            axes.errorbar([point.mean], [rows[name]], xerr=ends, **style)
            if name in published:
                style = {"marker": "o", "color": COLOURS[0], "mfc": "white", "ls": ""}
                axes.plot([published[name].mean], [rows[name]], **style)
        if level is not None:
            axes.axvline(level, color="#8b93a3", lw=0.8, ls=":")
        axes.set_yticks(list(rows.values()), list(rows))
        axes.set_ylim(0.5 - len(rows), 0.5)
        axes.set_xlim(0, 1.02)
        axes.grid(axis="x", color="#e8eaee", lw=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{label}; rings: the paper" if published else label)
        figure.supxlabel(note, fontsize=7, color="#596070", parse_math=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": "spairkit"})
    return buffer.getvalue()


def _short(tick: int) -> str:
    """1,000 as 1k."""
    return f"{tick // 1000}k" if tick and tick % 1000 == 0 else str(tick)


def draw_comparison(rows: Sequence[Row], note: str) -> bytes:
    """AP paper (`ap_spair`) over the number of objects, in the manner of the paper's Fig. 2.

    Args:
        rows: at least one row.
        note: a description of the images, printed below the chart.
    """
    lines = []
    for model, name in MODELS.items():
        cells = {row.objects: row.models[model] for row in rows if model in row.models}
        ours = {objects: cell.figures["ap_spair"] for objects, cell in cells.items()}
        paper = {n: p for n, cell in cells.items() if (p := cell.published_ap_spair)}
        if cells:
            lines.append(Line(name, ours, paper))
    return draw_charts([Chart(NAMES["ap_spair"], "objects per image", lines)], note)
