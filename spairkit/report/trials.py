"""The chart of a sweep: the figure of each trial against each setting, as a PNG."""

import io
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spairkit.report.curves import COLOURS, STYLE, is_plottable

_COLUMNS = 3
_MAX_TICKS = 12
_MAX_LABEL = 16  # characters


def trials_chart(
    trials: Sequence[tuple[Mapping[str, Any], float]], name: str, log: Collection[str] = ()
) -> bytes | None:
    """One panel per setting with a dot per trial; the best trial has another colour.

    Args:
        trials: settings and figure of each trial, all with the same settings; the highest figure
            is the best.
        name: name of the figure.
        log: settings with a logarithmic axis.

    Returns:
        A PNG; None if there is nothing to draw.
    """
    trials = [trial for trial in trials if is_plottable(trial[1])]
    if not trials or not trials[0][0]:
        return None
    keys = list(trials[0][0])
    columns = min(_COLUMNS, len(keys))
    rows = math.ceil(len(keys) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * columns, 2.8 * rows), dpi=150, layout="constrained")
        for index, key in enumerate(keys):
            axes = figure.add_subplot(rows, columns, index + 1)
            _draw(axes, [values[key] for values, _ in trials], [value for _, value in trials])
            if key in log:
                axes.set_xscale("log")
            axes.grid(axis="y", color="#e8eaee", lw=0.8)
            axes.set_axisbelow(True)
            axes.set_xlabel(key)
            if index % columns == 0:
                axes.set_ylabel(name)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": "spairkit"})
    return buffer.getvalue()


def _draw(axes: Axes, settings: list[Any], figures: list[float]) -> None:
    choices = sorted(set(map(_label, settings)))
    if all(is_plottable(value) and not isinstance(value, bool) for value in settings):
        x = settings
        ticks = sorted(set(settings))
        if len(ticks) <= _MAX_TICKS // 2:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    else:
        x = [choices.index(_label(value)) for value in settings]
        if len(choices) <= _MAX_TICKS:
            axes.set_xticks(range(len(choices)), choices)
    best = figures.index(max(figures))
    axes.plot(x, figures, "o", color=COLOURS[0], ms=5, alpha=0.6, mew=0)
    axes.plot(x[best], figures[best], "o", color=COLOURS[1], ms=7, mew=0)


def _label(value: Any) -> str:
    # a dollar sign would start a formula
    return str(value).replace("$", r"\$")[:_MAX_LABEL]
