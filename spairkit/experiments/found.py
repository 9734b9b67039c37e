"""What a run of a comparison found in a folder of images: RUN/found.json, and test.json."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spairkit.data.datasets import described
from spairkit.data.folder import ImageFolder
from spairkit.detections import Detections, Truth
from spairkit.detector import Detector
from spairkit.errors import InputError
from spairkit.evaluation import CANDIDATE_THRESHOLD, report_on
from spairkit.experiments.shared_runs import read_json
from spairkit.images import same_sized
from spairkit.metrics import agreement
from spairkit.storage import durable
from spairkit.storage.runs import Run

FOUND = "found.json"

FIGURES = ("ap", "ap50", "f1", "count_error")
"""Figures of a run on annotated images."""

_THRESHOLD = 0.5  # scores of found objects are above it
_BATCH_SIZE = 32
_MAX_PIXELS = 1 << 22  # of a batch
_REMEDY = "delete it to measure again"


@dataclass(frozen=True)
class Found:
    """The objects that a run found in the images of a folder."""

    files: list[str]
    """Paths of the images in the folder."""
    boxes: list[Tensor]
    """[n, 4] xyxy in pixels of the file, for each image."""
    independent: list[Tensor]
    """The same, without what the search takes from a watershed; see `Detector.without_watershed`.
    Models are compared with each other by these."""
    true: list[int | None]
    """Number of true objects in each image; None where it is not annotated."""
    figures: dict[str, float]
    """Those of `FIGURES`; empty without annotations."""
    steps: int
    seconds: float | None
    """Duration of the training; None if it was not measured."""

    def detections(self) -> list[Detections]:
        """The independent boxes as detections, without scores."""
        return [
            Detections(
                boxes, torch.ones(len(boxes)), torch.zeros(len(boxes), 0), torch.zeros(len(boxes))
            )
            for boxes in self.independent
        ]


def save_found(run: Run, detector: Detector, dataset: ImageFolder, cost: dict[str, float]) -> None:
    """Finds the objects in all images and writes found.json; with annotations test.json before it.

    Args:
        run: its folder receives the files.
        detector: of the run.
        dataset: the images; figures are of those that are annotated.
        cost: `steps` and, if it was measured, `seconds`.

    Raises:
        InputError: an image is damaged, the detector needs counts, or a file cannot be written.
    """
    files: list[str] = []
    candidates: list[Detections] = []
    independent: list[Tensor] = []
    encoder = detector.without_watershed()
    truth: list[Truth | None] = []
    sources = (((name, true), image) for name, _, image, true in dataset.images())
    for group in same_sized(sources, _BATCH_SIZE, _MAX_PIXELS):
        names, truths = zip(*(source for source, _ in group), strict=True)
        counts = None
        if detector.count_is_given:
            counts = torch.tensor([len(true or ()) for true in truths])
        images = torch.stack([image for _, image in group])
        files += names
        truth += truths
        candidates += [
            replace(item, what=item.what[:, :0].clone(), label_image=None, labels=None)
            for item in detector.detect_batch(images, CANDIDATE_THRESHOLD, counts)
        ]
        if encoder is not detector:
            independent += [item.boxes for item in encoder.detect_batch(images, _THRESHOLD)]
    found = [item[item.scores > _THRESHOLD] for item in candidates]
    if encoder is detector:
        independent = [item.boxes for item in found]
    figures: dict[str, float] = {}
    known = [i for i, true in enumerate(truth) if true is not None]
    if known:
        known_truth = [item for item in truth if item is not None]
        report = report_on(
            [candidates[i] for i in known],
            known_truth,
            whole_pixels=detector.whole_pixels,
            measured_on=described(run.config.data, "test"),
            search=detector.search,
        )
        durable.write_text(run.path / "test.json", f"{json.dumps(report.to_json(), indent=2)}\n")
        overall = report.overall
        figures = {
            "ap": overall.ap,
            "ap50": overall.ap50,
            "f1": agreement([found[i] for i in known], known_truth).f1,
            "count_error": overall.count_error,
        }
    listed = [
        {
            "file": name,
            "boxes": item.boxes.tolist(),
            "independent": own.tolist(),
            "true": None if true is None else len(true),
        }
        for name, item, own, true in zip(files, found, independent, truth, strict=True)
    ]
    values = {"images": listed, "figures": figures, **cost}
    durable.write_text(run.path / FOUND, f"{json.dumps(values)}\n")


def read_found(run: Path) -> Found:
    """The objects of an evaluated run.

    Raises:
        InputError: its found.json cannot be used.
    """
    path = run / FOUND
    values = read_json(path, _REMEDY)
    try:
        seconds = values.get("seconds")
        found = Found(
            files=[str(item["file"]) for item in values["images"]],
            boxes=[_boxes(item["boxes"]) for item in values["images"]],
            independent=[_boxes(item["independent"]) for item in values["images"]],
            true=[None if item["true"] is None else int(item["true"]) for item in values["images"]],
            figures={name: _finite(values["figures"][name]) for name in values["figures"]},
            steps=int(values["steps"]),
            seconds=None if seconds is None else _finite(seconds),
        )
        if not set(found.figures) - set(FIGURES):
            return found
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        pass
    raise InputError(f"{path}: not the objects of a run; {_REMEDY}")


def _boxes(rows: Any) -> Tensor:
    boxes = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    if len(boxes) != len(rows) or not bool(boxes.isfinite().all()):
        raise ValueError("boxes must be rows of four numbers")
    return boxes


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("numbers must be finite")
    return number
