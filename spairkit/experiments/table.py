"""What a comparison found: a table, and which detector it speaks for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from spairkit.boxes import box_iou
from spairkit.config import DataConfig
from spairkit.data.datasets import described, evaluation_batches, open_dataset
from spairkit.experiments.folder import FIGURES, measured_figures
from spairkit.experiments.intervals import Interval, t_interval
from spairkit.experiments.published import FIGURE_2, Published
from spairkit.experiments.settings import MODELS, Settings, Task, config_of, to_json
from spairkit.metrics import PROTOCOLS
from spairkit.storage.checkpoints import environment

_BATCH_SIZE = 32


@dataclass(frozen=True)
class Cell:
    """One model at one number of objects."""

    figures: dict[str, Interval]
    steps: int
    """Updates of a run; for ConnComp, thresholds."""
    seconds: float | None
    """Of training, mean over the runs; None where it was not timed."""
    told: bool = False
    """Whether the model is told how many objects there are."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        figures = {name: interval.to_json() for name, interval in self.figures.items()}
        return {**figures, "steps": self.steps, "seconds": self.seconds, "told": self.told}


@dataclass(frozen=True)
class Row:
    """All models at one number of objects."""

    objects: int | None
    overlapping: float
    """Share of the true boxes that overlap another one of their image."""
    measured_on: str
    """The test images in words."""
    cells: dict[str, Cell]
    is_papers: bool = True
    """Whether the images are such as the paper measured: digits of 14 px on 48 x 48 pixels."""

    def published(self, model: str) -> Published | None:
        """The paper's figure, where there is one."""
        return FIGURE_2[model].get(self.objects or 0) if self.is_papers else None


def tabulated(settings: Settings, folder: Path) -> list[Row]:
    """The table of a comparison all of whose runs are measured.

    Raises:
        InputError: a run's figures cannot be read.
    """
    rows = []
    for number in settings.objects or (None,):
        cells: dict[str, Cell] = {}
        for model in settings.models:
            tasks = [Task(model, number, seed) for seed in range(settings.seeds)]
            measured = [measured_figures(folder / "runs" / task.name) for task in tasks]
            seconds = [item["seconds"] for item in measured if "seconds" in item]
            cells[model] = Cell(
                figures={name: t_interval([item[name] for item in measured]) for name in FIGURES},
                steps=int(measured[0]["steps"]),
                seconds=sum(seconds) / len(seconds) if seconds else None,
                told=config_of(settings, tasks[0]).model.told,
            )
        data = config_of(settings, Task(settings.models[0], number, 0)).data
        sizes = (data.image_height, data.image_width, data.glyph_size, data.glyph_jitter)
        is_papers = data.name != "folder" and sizes == (48, 48, 14, 0)
        rows.append(Row(number, _overlapping(data), described(data, "test"), cells, is_papers))
    return rows


def advice(rows: Sequence[Row]) -> list[str]:
    """Which detector to use: a line for each row, and the rules behind them."""
    lines = []
    by_components: list[float] = []
    by_others: list[float] = []
    for row in rows:
        model, why = _choice(row)
        (by_components if model == "conncomp" else by_others).append(row.overlapping)
        where = "these images" if row.objects is None else f"{row.objects} to an image"
        share = f"{100 * row.overlapping:.0f} % of the boxes overlap another"
        lines.append(f"{where} ({share}): {MODELS[model]}, {why}")
    if by_components and max(by_components) < min(by_others, default=1.0):
        lines.append(
            "ConnComp needs no training and a plain background, and is the choice where objects "
            f"seldom touch: here up to {100 * max(by_components):.0f} % of the boxes overlap"
        )
    lines.append(
        "the rules: the highest mean AP wins; where 95 % intervals overlap the winner's, the "
        "model that is fitted soonest. Seeds are of weights and noise, the test images the same"
    )
    if any(row.objects is None for row in rows):
        lines.append(
            "measured on all of the images, those for training included; a threshold that ConnComp "
            "fitted has seen their boxes, which favours it"
        )
    if told := told_models(rows):
        lines.append(
            f"{told} told the true numbers of objects, which nobody knows of new images: "
            "compared, and never the choice beside others"
        )
    if any(len(cell.figures["ap"].values) == 1 for row in rows for cell in row.cells.values()):
        lines.append("one seed gives no intervals: small differences may be chance")
    return lines


def told_models(rows: Sequence[Row]) -> str:
    """`AIR and DAIR are`, or `AIR is`; empty where no model is told the count."""
    told = {model for row in rows for model, cell in row.cells.items() if cell.told}
    names = [name for model, name in MODELS.items() if model in told]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}" if names else ""


def summary(settings: Settings, rows: Sequence[Row]) -> dict[str, Any]:
    """All of the result as plain values, with what it takes to read it."""
    table = []
    for row in rows:
        models = {}
        for model, cell in row.cells.items():
            published = row.published(model)
            models[model] = {
                **cell.to_json(),
                "published_ap_spair": asdict(published) if published else None,
            }
        table.append(
            {
                "objects": row.objects,
                "overlapping": row.overlapping,
                "measured_on": row.measured_on,
                "models": models,
            }
        )
    return {
        "settings": to_json(settings),
        "budget": settings.budget,
        "rows": table,
        "advice": advice(rows),
        "interval": "95 % by Student's t over the seeds",
        "protocols": {name: PROTOCOLS[name] for name in FIGURES},
        "published": "Fig. 2 of the SPAIR paper, read off: EMNIST digits, ap_spair",
        "environment": environment(),
    }


def _choice(row: Row) -> tuple[str, str]:
    """The model to use, and why: see `advice`."""
    every = {model: cell.figures["ap"] for model, cell in row.cells.items()}
    scores = {model: ap for model, ap in every.items() if not row.cells[model].told} or every

    def cost(model: str) -> tuple[bool, float]:
        seconds = row.cells[model].seconds
        return model != "conncomp", inf if seconds is None else seconds

    def mean(model: str) -> float:
        return scores[model].mean

    def scored(model: str) -> str:
        return f"{MODELS[model]}'s {shown(every[model])}"

    best = max(scores, key=mean)
    equals = [model for model in scores if scores[model].high >= scores[best].low]
    chosen = min(equals, key=cost)
    why = f"AP {shown(every[chosen])}"
    if ties := [model for model in equals if model != chosen]:
        why += f", not to be told from {scored(max(ties, key=mean))}, and cheaper"
    elif others := [model for model in scores if model != best]:
        why += f", before {scored(max(others, key=mean))}"
    for model, ap in every.items():
        if model not in scores and ap.low > every[chosen].high:
            why += f"; {scored(model)} is higher, but it is told the count"
    return chosen, why


def shown(interval: Interval) -> str:
    """`0.797 ± 0.012`, or the mean alone."""
    if interval.half_width is None:
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} ± {interval.half_width:.3f}"


def _overlapping(data: DataConfig) -> float:
    """Share of the true boxes of the test images that overlap another one of their image."""
    overlapping = objects = 0
    for batch in evaluation_batches(open_dataset(data, "test"), _BATCH_SIZE):
        for item in batch.truth():
            others = box_iou(item.boxes, item.boxes).fill_diagonal_(0)
            overlapping += int((others > 0).any(1).sum())
            objects += len(item)
    return overlapping / max(objects, 1)
