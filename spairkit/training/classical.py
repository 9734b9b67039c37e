"""Runs of models without weights: ConnComp tries thresholds in turn, Watershed has none to try.

ConnComp's thresholds are all tried on the same training images (docs/model.md 9).
"""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from statistics import fmean

import numpy as np
import numpy.typing as npt
import torch

from spairkit.config import Config, ConnCompConfig, WatershedConfig
from spairkit.data.datasets import Dataset, evaluation_batches, open_splits, prepared
from spairkit.data.folder import ImageFolder
from spairkit.data.scenes import Batch
from spairkit.detections import Detections, Truth
from spairkit.detector import Detector
from spairkit.metrics import ap_spair, average_precision, count_accuracy, count_error
from spairkit.models.conncomp import ConnComp, find_components
from spairkit.models.watershed import Watershed
from spairkit.preparation import otsu
from spairkit.storage.checkpoints import environment
from spairkit.storage.runs import Run
from spairkit.training.validation import Step, Validation, box_figures, draw

LOWEST, HIGHEST = 0.01, 3.0
"""The ends of the grid, as in the authors' code."""

_MAX_PIXELS = 1 << 24  # of the training images together
_MAX_DISTANCES = 1 << 28  # of scenes whose background is known: their pixels are not kept
_BATCH_SIZE = 32


def fit_classical(
    config: Config,
    run: Run,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Step | Validation]:
    """Fits ConnComp, or saves a Watershed, in the folder of `run`, from its last checkpoint on.

    For ConnComp it takes the first `model.images` training images, up to 16 million pixels, or 268
    million of scenes whose background is not fitted: scenes, or whole files with known boxes. They
    give the background, if it is fitted, and each of
    `train.steps` thresholds is tried on them. The best one is kept, the lowest of equals. A given
    threshold, or Otsu's, needs no trial. Without known boxes "fit" is Otsu's too.

    Arguments and events are those of `spairkit.training.loop.fit`; there is one validation, at the
    end, whose figures include the threshold.

    Raises:
        InputError: the data cannot be read, or the folder cannot be written.
        ValueError: the model of `config` has weights.
    """
    if isinstance(config.model, ConnCompConfig):
        yield from _fit_threshold(config, config.model, run, device, stop)
    elif not isinstance(config.model, WatershedConfig):
        raise ValueError(f"config.model must have no weights, got {type(config.model).__name__}")
    elif run.latest() is None:
        _, validation = open_splits(config, device)
        steps, started = config.train.steps, time.perf_counter()
        model = Watershed(config.model).to(device)
        yield Step(steps, steps, None, time.perf_counter() - started)
        yield _concluded(config, run, model, validation, {}, {})


def _fit_threshold(
    config: Config,
    settings: ConnCompConfig,
    run: Run,
    device: torch.device,
    stop: Callable[[], bool],
) -> Iterator[Step | Validation]:
    train, validation = open_splits(config, device)
    started = time.perf_counter()
    fits_background = settings.background in ("mode", "median")
    few = fits_background or isinstance(train, ImageFolder)
    batches: Iterable[Batch] = (
        prepared(batch, config.prepare)
        for batch in _training_batches(
            train, settings.images, config.train.seed, _MAX_PIXELS if few else _MAX_DISTANCES
        )
    )
    model = ConnComp(settings).to(device)
    if fits_background:
        batches = list(batches)
        pixels = torch.cat([batch.images.transpose(0, 1).flatten(1) for batch in batches], dim=1)
        model.fit_background(pixels[None, :, None])
    distances, truth = [], []
    for batch in batches:
        distances.append(model.distance(batch.images).cpu())
        truth += batch.truth()
    grid = np.linspace(LOWEST, HIGHEST, config.train.steps)
    scores = _resumed(run, grid)
    steps = len(grid)
    if len(scores) == steps:
        return
    run.truncate_metrics(len(scores))

    def state() -> dict[str, torch.Tensor]:
        tried = {
            "thresholds": torch.from_numpy(grid[: len(scores)]),
            "scores": torch.tensor(scores),
        }
        return {name: value.double() for name, value in tried.items()}

    fits = settings.threshold == "fit" and train.has_truth
    if fits:
        while len(scores) < steps:
            threshold = float(grid[len(scores)])
            found = [
                item
                for distance in distances
                for item in find_components((distance >= threshold).numpy(), settings.min_area)
            ]
            scores.append(_score(settings.criterion, found, truth))
            model.set_threshold(float(grid[int(np.argmax(scores))]))
            step = len(scores)
            record = {"threshold": threshold, settings.criterion: abs(scores[-1])}
            run.log({"kind": "step", "step": step, **record})
            yield Step(step, steps, None, time.perf_counter() - started)
            if step < steps and stop():
                _save(run, step, model, {}, state(), is_best=False)
                return
    elif isinstance(settings.threshold, str):
        values = torch.cat([distance.flatten() for distance in distances]).double().numpy()
        # just above it, so that distances that are all equal are background
        model.set_threshold(float(np.nextafter(np.float32(otsu(values)), np.float32(4))))
    if not fits:
        scores = [0.0] * steps
        yield Step(steps, steps, None, time.perf_counter() - started)
    yield _concluded(config, run, model, validation, {"threshold": float(model.threshold)}, state())


def _concluded(
    config: Config,
    run: Run,
    model: ConnComp | Watershed,
    validation: Dataset,
    figures: dict[str, float],
    state: dict[str, torch.Tensor],
) -> Validation:
    """Validates and saves the model at the last step."""
    detector, steps = Detector(model, config), config.train.steps
    batches = evaluation_batches(validation, _BATCH_SIZE)
    counts = [len(item) for batch in batches for item in detector.detect_batch(batch.images)]
    figures = figures | {"found": fmean(counts)}
    if validation.has_truth:
        figures = figures | box_figures(detector, validation, _BATCH_SIZE)
    picture = draw(detector, validation, run, steps)
    run.log({"kind": "validation", "step": steps, **figures, "is_best": True})
    _save(run, steps, model, figures, state, is_best=True)
    return Validation(steps, figures, picture, is_best=True)


def _save(
    run: Run,
    step: int,
    model: ConnComp | Watershed,
    figures: dict[str, float],
    state: dict[str, torch.Tensor],
    *,
    is_best: bool,
) -> None:
    run.save(
        step=step,
        model=model.state_dict(),
        optimiser=state,
        metrics=figures,
        environment=environment(),
        is_best=is_best,
    )


def _training_batches(dataset: Dataset, images: int, seed: int, pixels: int) -> Iterator[Batch]:
    """At least one batch, within the limits on images and pixels."""
    if isinstance(dataset, ImageFolder):
        source = evaluation_batches(dataset, 1)
    else:
        first = seed << 32  # the scenes that training of this seed begins with
        area = dataset.config.image_height * dataset.config.image_width
        size = max(min(_BATCH_SIZE, pixels // area), 1)
        source = (
            dataset.batch(torch.arange(first + i, first + min(i + size, images)))
            for i in range(0, images, size)
        )
    num_pixels = 0
    for number, batch in enumerate(islice(source, images)):
        num_pixels += batch.images[:, 0].numel()
        if number and num_pixels > pixels:
            break
        yield batch


def _resumed(run: Run, grid: npt.NDArray[np.float64]) -> list[float]:
    """The scores of thresholds tried before the resumption; empty if the grid differs."""
    checkpoint = run.latest()
    state = (checkpoint.optimiser if checkpoint else None) or {}
    tried, scores = (state.get(name, torch.zeros(0)).tolist() for name in ("thresholds", "scores"))
    same = len(tried) == len(scores) and tried == grid[: len(tried)].tolist()
    return scores if same else []


def _score(criterion: str, found: list[Detections], truth: list[Truth]) -> float:
    """The criterion, negated if lower is better."""
    if criterion == "ap":
        return average_precision(found, truth)
    if criterion == "ap_spair":
        return ap_spair(found, truth, whole_pixels=True)
    counts = [len(item) for item in found], [len(item) for item in truth]
    return count_accuracy(*counts) if criterion == "count_accuracy" else -count_error(*counts)
