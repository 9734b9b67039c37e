"""Calibrates the search of a trained model on validation scenes, whose objects are known."""

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from spairkit.backends import computing_in
from spairkit.boxes import box_iou
from spairkit.data.datasets import evaluation_batches, open_dataset, prepared
from spairkit.detections import Detections, Truth
from spairkit.detector import load
from spairkit.search.calibration import Calibration, fit_scores, fit_temperature
from spairkit.search.search import PosteriorSearch
from spairkit.storage.checkpoints import save_calibration
from spairkit.storage.runs import Run

IMAGES = 256
"""Validation scenes that are searched, at most."""

_BATCH_SIZE = 32
_REAL = 0.25  # IoU with a true box: objects that hide each other are boxed in part


def calibrates(run: Run) -> bool:
    """Whether the run has a search, and validation scenes whose objects are known by design.

    Ground truth of a folder of images is not used: a training on a folder needs no labels.
    """
    return run.config.search.mode != "off" and run.config.data.name != "folder"


def calibrate(
    run: Run, device: torch.device, progress: Callable[[int], None] | None = None
) -> Calibration:
    """Calibrates the search of the run's best checkpoint, and saves the calibration in it.

    Args:
        run: one for which `calibrates` is true.
        device: to search on.
        progress: called with the number of scenes done.

    Raises:
        InputError: there is no checkpoint, or it cannot be written.
    """
    detector = load(run.path, device)
    finder = detector.finder
    assert isinstance(finder, PosteriorSearch)
    dataset = open_dataset(run.config.data, "validation", device)
    saved: list[Tensor] = []
    real: list[Tensor] = []
    images: list[tuple[Tensor, Tensor, int]] = []
    for batch in evaluation_batches(dataset, _BATCH_SIZE):
        with computing_in("float32", device):
            found = finder.find(prepared(batch, run.config.prepare).images)
            described = finder.describe(found, 0.0, None)
        for b, (objects, truth) in enumerate(zip(described, batch.truth(), strict=True)):
            here = found.slots.saved[b].cpu()[(found.slots.present[b] > 0).cpu()]
            saved.append(here)
            real.append(matches(objects, here, truth))
            images.append((here, found.costs[b], len(truth)))
        if progress is not None:
            progress(min(len(images), IMAGES))
        if len(images) >= IMAGES:
            break
    if not sum(map(len, saved)):
        return Calibration()  # nothing was found
    midpoint, slope = fit_scores(
        torch.cat(saved).double().numpy(), np.asarray(torch.cat(real).numpy(), dtype=bool)
    )
    temperature = fit_temperature(images, Calibration(midpoint, slope))
    calibration = Calibration(midpoint, slope, temperature)
    save_calibration(run.path, asdict(calibration))
    return calibration


def matches(found: Detections, saved: Tensor, truth: Truth) -> Tensor:  # [n] bool
    """Whether each object has a true one of its own; matched greedily, by falling energy."""
    hit = torch.zeros(len(found), dtype=torch.bool)
    iou = box_iou(found.boxes, truth.boxes.cpu())
    for i in saved.argsort(descending=True, stable=True).tolist():
        if not len(truth):
            break
        best = int(iou[i].argmax())
        if iou[i, best] >= _REAL:
            hit[i] = True
            iou[:, best] = 0
    return hit
