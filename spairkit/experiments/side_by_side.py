"""Pictures of a few images with the boxes of each model."""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import matplotlib
import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from spairkit.config import DataConfig
from spairkit.data.datasets import open_dataset
from spairkit.data.folder import ImageFolder
from spairkit.detector import Detector
from spairkit.experiments.found import Found
from spairkit.experiments.settings import MODELS, Settings, config_of
from spairkit.names import printable, printable_lines
from spairkit.report.colours import COLOURS
from spairkit.report.curves import STYLE

MAX_IMAGES = 4
_PANEL_INCHES = 3.2
_LINE = 0.7
_SIDE = 360  # of the part of an image that is shown, in prepared pixels: some 30 objects
_TRUE = "white"


@dataclass(frozen=True)
class Panel:
    """One image, and the boxes that each model found in it."""

    name: str
    image: Tensor  # [3, H, W] in [0, 1]
    found: Mapping[str, Tensor]  # [n, 4] xyxy, px, by the model's name
    true: Tensor | None  # [n, 4]


def draw_folder(settings: Settings, runs: Mapping[str, Sequence[Found]], note: str) -> bytes:
    """The picture of an evaluated comparison: up to four images, evenly chosen, and first seeds.

    Args:
        settings: of the comparison, on a folder.
        runs: from `folder.runs_of`.
        note: printed below.

    Raises:
        InputError: an image is damaged.
    """
    first = {model: found[0] for model, found in runs.items()}
    files = next(iter(first.values())).files
    number = min(MAX_IMAGES, len(files))
    chosen = {files[i * len(files) // number]: i * len(files) // number for i in range(number)}
    config = config_of(settings, settings.tasks()[0])
    dataset = open_dataset(config.data, "test")
    assert isinstance(dataset, ImageFolder)
    panels = []
    for name, _, image, true in dataset.images():
        if name in chosen:
            found = {MODELS[model]: run.boxes[chosen[name]] for model, run in first.items()}
            panels.append(Panel(name, image, found, None if true is None else true.boxes))
    return draw_side_by_side(panels, round(_SIDE / config.prepare.scale), note)


def first_panels(data: DataConfig, detectors: Mapping[str, Detector], number: int) -> list[Panel]:
    """The first images of a folder, with the boxes that each detector finds.

    Raises:
        InputError: the folder or an image cannot be read.
    """
    dataset = open_dataset(data, "test")
    assert isinstance(dataset, ImageFolder)
    panels = []
    for name, _, image, true in islice(dataset.images(), number):
        found = {title: item.detect(image).boxes for title, item in detectors.items()}
        panels.append(Panel(name, image, found, None if true is None else true.boxes))
    return panels


def draw_side_by_side(panels: Sequence[Panel], side: int, note: str) -> bytes:
    """A row for each image and a column for each model, as a PNG; true boxes are white and dashed.

    Images are shown from their 0.5 to their 99.8 percentile. Of an image larger than `side` pixels
    the part with the most boxes is shown.

    Args:
        panels: at least one, of the same models.
        side: of the part of an image, in pixels.
        note: printed below.
    """
    models = list(panels[0].found)
    size = (_PANEL_INCHES * len(models), _PANEL_INCHES * len(panels) + 0.4)
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        grid = figure.subplots(len(panels), len(models), squeeze=False)
        for row, panel in zip(grid, panels, strict=True):
            top, left = _window(panel, side)
            image = panel.image[:, top : top + side, left : left + side]
            low, high = np.percentile(image.numpy(), [0.5, 99.8])
            shown = ((image - low) / max(high - low, 1e-6)).clamp(0, 1).permute(1, 2, 0).numpy()
            height, width = shown.shape[:2]
            for axes, model, colour in zip(row, models, COLOURS, strict=False):
                axes.imshow(shown, extent=(left, left + width, top + height, top))
                if panel.true is not None:
                    _draw(axes, panel.true, edgecolor=_TRUE, linestyle=(0, (2, 2)))
                _draw(axes, panel.found[model], edgecolor=np.divide(colour, 255))
                axes.set(xlim=(left, left + width), ylim=(top + height, top), xticks=[], yticks=[])
                known = "" if panel.true is None else f" of {len(panel.true)}"
                axes.set_title(f"{model}: {len(panel.found[model])}{known}", fontsize=8)
            is_whole = (height, width) == panel.image.shape[1:]
            name = f"{printable(panel.name)}{'' if is_whole else ' (a part)'}"
            row[0].set_ylabel(name, fontsize=6, parse_math=False)
        figure.supxlabel(printable_lines(note), fontsize=7, color="#596070", parse_math=False)
        buffer = io.BytesIO()
        # the font lacks most scripts in which images are named
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png", metadata={"Software": "spairkit"})
    return buffer.getvalue()


def _draw(axes: matplotlib.axes.Axes, boxes: Tensor, **style: Any) -> None:
    patches = [Rectangle((x1, y1), x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes.tolist()]
    collection = PatchCollection(patches, facecolor="none", linewidth=_LINE, **style)
    axes.add_collection(collection, autolim=False)


def _window(panel: Panel, side: int) -> tuple[int, int]:
    """Upper left corner of the part of the image in which most boxes have their centres."""
    height, width = panel.image.shape[1:]
    boxes = np.concatenate([boxes.numpy() for boxes in panel.found.values()])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2

    def inside(corner: tuple[int, int]) -> int:
        offset = centres - (corner[1], corner[0])
        return int(((offset >= 0) & (offset < side)).all(1).sum())

    tops, lefts = (
        range(0, max(length - side, 0) + 1, max(side // 2, 1)) for length in (height, width)
    )
    return max(((top, left) for top in tops for left in lefts), key=inside)
