"""The table of a comparison on digits, and advice on the model to use."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from spairkit.boxes import box_iou
from spairkit.config import DataConfig
from spairkit.data.datasets import described, evaluation_batches, open_dataset
from spairkit.experiments.compare import FIGURES, read_figures
from spairkit.experiments.intervals import Interval, t_interval
from spairkit.experiments.published import FIGURE_2, Published
from spairkit.experiments.settings import (
    MODELS,
    WITHOUT_WEIGHTS,
    Settings,
    Task,
    config_of,
)
from spairkit.metrics import PROTOCOLS
from spairkit.storage.checkpoints import environment

_BATCH_SIZE = 32
_PAPER_SIZES = (48, 48, 14, 0)


@dataclass(frozen=True)
class Cell:
    """The result of one model at one number of objects."""

    figures: dict[str, Interval]
    """Means over the seeds by name of the figure."""
    steps: int
    """Updates per run; for ConnComp, thresholds."""
    seconds: float | None
    """Mean training time per run; None if it was not measured."""
    given_count: bool = False
    """Whether the model is given the number of objects in each image."""
    search: str = "off"
    """The mode of its search; see `config.SearchConfig`."""
    published_ap_spair: Published | None = None
    """The paper's AP on comparable images; None if there is none."""


@dataclass(frozen=True)
class Row:
    """The results of all models at one number of objects."""

    objects: int
    """Objects per image."""
    overlapping: float
    """Share of the true boxes that overlap another box of their image."""
    measured_on: str
    """A description of the test images."""
    models: dict[str, Cell]
    """Results by model."""


def tabulate(settings: Settings, folder: Path) -> list[Row]:
    """The table of a comparison whose runs are all evaluated.

    Raises:
        InputError: the figures of a run cannot be read.
    """
    rows = []
    for objects in settings.objects:
        data = config_of(settings, Task(settings.models[0], objects, 0)).data
        sizes = (*data.whole_size, data.glyph_size, data.glyph_jitter)
        is_papers = sizes == _PAPER_SIZES
        cells: dict[str, Cell] = {}
        for model in settings.models:
            tasks = [Task(model, objects, seed) for seed in range(settings.seeds)]
            runs = [read_figures(folder / "runs" / task.name) for task in tasks]
            seconds = [run["seconds"] for run in runs if "seconds" in run]
            config = config_of(settings, tasks[0])
            cells[model] = Cell(
                figures={name: t_interval([run[name] for run in runs]) for name in FIGURES},
                steps=int(runs[0]["steps"]),
                seconds=fmean(seconds) if seconds else None,
                given_count=config.model.count_is_given,
                search=config.search.mode,
                published_ap_spair=FIGURE_2.get(model, {}).get(objects) if is_papers else None,
            )
        rows.append(Row(objects, _overlapping(data), described(data, "test"), cells))
    return rows


def advice(rows: Sequence[Row]) -> list[str]:
    """The model to use for each row, and the rule and limits of this choice."""
    lines = []
    for row in rows:
        chosen, share = _choose(row), 100 * row.overlapping
        lines.append(
            f"{row.objects} per image ({share:.0f} % of the boxes overlap another): "
            f"{MODELS[chosen]}, AP {row.models[chosen].figures['ap']}"
        )
    lines.append(
        "rule: the highest mean AP wins; among models whose 95 % interval overlaps the winner's, "
        "one that needs no training, or else the fastest to train. Seeds vary weights and "
        "noise, not the test images"
    )
    if models := models_given_counts(rows):
        lines.append(
            f"{models} given the true counts, which are unknown for new images, and not chosen if "
            "there is another model"
        )
    if any(len(cell.figures["ap"].values) == 1 for row in rows for cell in row.models.values()):
        lines.append("one seed gives no intervals: small differences may be chance")
    return lines


def models_given_counts(rows: Sequence[Row]) -> str:
    """`AIR and DAIR are` or `AIR is`; empty if no model is given the count."""
    given = {model for row in rows for model, cell in row.models.items() if cell.given_count}
    names = [name for model, name in MODELS.items() if model in given]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}" if names else ""


def summary(settings: Settings, rows: Sequence[Row]) -> dict[str, Any]:
    """The content of results.json: the table and notes on how to read it."""
    return {
        "settings": asdict(settings),
        "budget": settings.described_budget(),
        "rows": [asdict(row) for row in rows],
        "advice": advice(rows),
        "interval": "95 % by Student's t over the seeds",
        "protocols": {name: PROTOCOLS[name] for name in FIGURES},
        "published": "Fig. 2 of the SPAIR paper, read off the plot: EMNIST digits, ap_spair",
        "environment": environment(),
    }


def _choose(row: Row) -> str:
    """The model to use, by the rule that `advice` states."""
    fair = {model: cell for model, cell in row.models.items() if not cell.given_count}
    cells = fair or row.models
    best = max((cell.figures["ap"] for cell in cells.values()), key=lambda ap: ap.mean)
    equals = [model for model, cell in cells.items() if cell.figures["ap"].high >= best.low]
    return min(equals, key=lambda m: (m not in WITHOUT_WEIGHTS, cells[m].seconds or math.inf))


def _overlapping(data: DataConfig) -> float:
    overlapping = objects = 0
    for batch in evaluation_batches(open_dataset(data, "test"), _BATCH_SIZE):
        for item in batch.truth():
            others = box_iou(item.boxes, item.boxes).fill_diagonal_(0)
            overlapping += int((others > 0).any(1).sum())
            objects += len(item)
    return overlapping / max(objects, 1)
