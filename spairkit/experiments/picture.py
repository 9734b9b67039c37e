"""A comparison as a picture in the manner of the paper's Fig. 2."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from spairkit.experiments.settings import MODELS
from spairkit.experiments.table import Row
from spairkit.metrics import NAMES
from spairkit.report.curves import COLOURS, STYLE


def draw_comparison(rows: Sequence[Row], note: str) -> bytes:
    """AP paper (`ap_spair`) over the number of objects, as a PNG.

    Ours are solid lines with 95 % intervals; beside them, where the paper has a figure, stand its
    published ones, dashed with hollow marks.

    Args:
        rows: at least one.
        note: what was measured, for a line below.
    """
    numbers = [row.objects for row in rows]
    places = [float(i if number is None else number) for i, number in enumerate(numbers)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for model, colour in zip(MODELS, COLOURS, strict=False):
            known = [
                (x, row.cells[model])
                for x, row in zip(places, rows, strict=True)
                if model in row.cells
            ]
            if not known:
                continue
            figures = [cell.figures["ap_spair"] for _, cell in known]
            axes.errorbar(
                [x for x, _ in known],
                [interval.mean for interval in figures],
                yerr=[interval.half_width or 0.0 for interval in figures],
                color=colour,
                lw=1.8,
                marker="o",
                ms=4.5,
                capsize=3,
                label=MODELS[model],
            )
            paper = [(row.objects, item) for row in rows if (item := row.published(model))]
            if paper:
                means = [item.mean for _, item in paper]
                ends = [
                    [item.mean - item.low for _, item in paper],
                    [item.high - item.mean for _, item in paper],
                ]
                axes.errorbar(
                    [float(n or 0) for n, _ in paper],
                    means,
                    yerr=ends,
                    color=colour,
                    lw=1.2,
                    ls="--",
                    marker="o",
                    ms=4.5,
                    mfc="white",
                    capsize=2,
                    alpha=0.75,
                    label=f"{MODELS[model]}, published",
                )
        axes.set_ylim(0, 1.02)
        labels = ["all images" if number is None else str(number) for number in numbers]
        axes.set_xticks(places, labels)
        axes.grid(axis="y", color="#e8eaee", lw=0.8)
        axes.set_axisbelow(True)
        if len(rows) > 1:
            axes.set_xlabel("objects in an image")
        axes.set_ylabel(NAMES["ap_spair"])
        figure.legend(loc="outside right upper", frameon=False)
        figure.supxlabel(note, fontsize=7, color="#596070")
        buffer = io.BytesIO()
        metadata: dict[str, Any] = {"Software": None}
        figure.savefig(buffer, format="png", metadata=metadata)
    return buffer.getvalue()
