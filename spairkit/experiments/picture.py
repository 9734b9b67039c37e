"""The chart of a comparison on digits, in the manner of the paper's Fig. 2."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from spairkit.experiments.published import Published
from spairkit.experiments.settings import MODELS
from spairkit.experiments.table import Row
from spairkit.metrics import NAMES
from spairkit.report.curves import COLOURS, STYLE


def draw_comparison(rows: Sequence[Row], note: str) -> bytes:
    """AP paper (`ap_spair`) over the number of objects, as a PNG.

    Solid lines are our results with 95 % intervals, dashed lines the published ones.

    Args:
        rows: at least one row.
        note: a description of the images, printed below the chart.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
        axes = figure.add_subplot()

        def draw(intervals: Mapping[int, Published], **style: Any) -> None:
            points = list(intervals.values())
            ends = [[p.mean - p.low for p in points], [p.high - p.mean for p in points]]
            means = [p.mean for p in points]
            axes.errorbar(list(intervals), means, yerr=ends, marker="o", ms=4.5, **style)

        for model, colour in zip(MODELS, COLOURS, strict=False):
            cells = {row.objects: row.models[model] for row in rows if model in row.models}
            if not cells:
                continue
            ours = {objects: cell.figures["ap_spair"] for objects, cell in cells.items()}
            draw(ours, color=colour, label=MODELS[model], lw=1.8, capsize=3)
            paper = {n: p for n, cell in cells.items() if (p := cell.published_ap_spair)}
            if paper:
                look = {"lw": 1.2, "ls": "--", "mfc": "white", "capsize": 2, "alpha": 0.75}
                draw(paper, color=colour, label=f"{MODELS[model]} (paper, EMNIST)", **look)
        axes.set_ylim(0, 1.02)
        axes.set_xticks([row.objects for row in rows])
        axes.grid(axis="y", color="#e8eaee", lw=0.8)
        axes.set_axisbelow(True)
        if len(rows) > 1:
            axes.set_xlabel("objects per image")
        axes.set_ylabel(NAMES["ap_spair"])
        figure.legend(loc="outside right upper", frameon=False)
        figure.supxlabel(note, fontsize=7, color="#596070")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": "spairkit"})
    return buffer.getvalue()
