"""The training loop: `fit` yields what happens, and prints nothing.

Everything random is a function of (seed, step): the data, the sampling noise, the gradient noise. A
run that is killed and resumed therefore ends with the same bits as one that is not.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from spairkit import presets
from spairkit.config import Config, ConnCompConfig
from spairkit.config_values import nested
from spairkit.data.datasets import data_settings, open_splits
from spairkit.detector import Detector, load
from spairkit.errors import DivergedError, InputError
from spairkit.storage.runs import Run
from spairkit.training.distributed import World
from spairkit.training.process import computing_in, keep_freed_memory
from spairkit.training.threshold import fit_threshold
from spairkit.training.update_graph import make_trainer
from spairkit.training.validation import Step as Step
from spairkit.training.validation import Validation as Validation

REPORT_EVERY = 20
"""Updates between two `Step`s that carry losses: reading them waits for the device."""

_MAX_SKIPPED = 10  # updates in a row, when they are counted


def train(
    data: str | os.PathLike[str] | None = None,
    *,
    preset: str = presets.DEFAULT,
    set: Mapping[str, Any] | None = None,
    minutes: float | None = None,
    out: str | os.PathLike[str] | None = None,
    device: torch.device | Literal["auto", "cpu", "cuda"] = "auto",
    verbose: bool = True,
) -> Detector:
    """Trains on images, without labels, and returns the detector of the best checkpoint.

    Args:
        data: a folder of images, an MNIST file or the name of a dataset; None takes the preset's.
        preset: "quick", "laptop" or "paper".
        set: settings laid over the preset, by dotted key: {"model.background": "mode"}.
        minutes: stops after so long, with a checkpoint; `spairkit train --resume` continues.
        out: the run's folder; None makes the next runs/<data>-<preset>-N.
        device: "auto" takes a GPU if there is one.
        verbose: print a line to stderr at every validation.

    Raises:
        InputError: settings or data cannot be used, or the folder cannot be written.
        DivergedError: as `fit`.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = [data_settings(os.fspath(data)) if data is not None else {}, nested(set or {})]
    config = presets.resolve(preset, *layers)
    device = torch.device(device)
    check(config, device, 1)
    open_splits(config)  # mistakes show before a run is made
    run = Run.create(None if out is None else Path(out), config)
    began = time.monotonic()

    def stop() -> bool:
        return minutes is not None and time.monotonic() - began >= 60 * minutes

    with run.lock():
        for event in fit(config, run, device, stop):
            if verbose and isinstance(event, Validation):
                figures = ", ".join(f"{name} {value:.3f}" for name, value in event.figures.items())
                print(f"{run.path}: step {event.step}: {figures}", file=sys.stderr, flush=True)
    return load(run.path, device)


def check(config: Config, device: torch.device, processes: int) -> None:
    """Refuses settings that cannot be trained with here, before anything is made.

    Raises:
        InputError: the batch cannot be shared out evenly among so many processes, or there is
            nothing to share; or the device does not have the precision.
    """
    if config.train.precision == "tf32" and device.type != "cuda":
        raise InputError(
            "train.precision = 'tf32' is for NVIDIA GPUs, and this would train on "
            f"{device.type}; use 'float32' or 'bf16'"
        )
    if processes > 1 and isinstance(config.model, ConnCompConfig):
        raise InputError("connected components are fitted by one process; leave out torchrun")
    if config.train.batch_size % processes:
        raise InputError(
            f"train.batch_size ({config.train.batch_size}) must be a multiple of the number of "
            f"processes ({processes}): it is that of all of them together"
        )


def fit(
    config: Config,
    run: Run | None,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    world: World | None = None,
) -> Iterator[Step | Validation]:
    """Trains in the folder of `run`, from its last checkpoint where it has one.

    ConnComp has no losses: `threshold_search.fit_threshold` fits it, by the same rules.

    Args:
        config: the run's.
        run: must be locked by the caller while this iterates. None in all processes but the
            first, which alone reads and writes it, and validates.
        device: where model and scenes live.
        stop: asked once after every update; when it says yes training ends with a checkpoint of
            that update, to be resumed some other time. All processes must be told the same.
        world: the processes that share each batch; None is this one alone.

    Yields:
        A `Step` for every update and, where there is a run, a `Validation` every
        `validation_every` updates and at the end. Steps that were made before a resumption are
        not yielded again.

    Raises:
        InputError: what `check` says; the data cannot be read, or has no boxes to select by; a
            scene found no layout, which on a GPU is seen when losses are next reported or a
            checkpoint is due; the folder cannot be written; or another process has ended.
        DivergedError: the losses were not finite in the last 10 updates or more, which is seen
            when they are next reported or a validation is due; the last good checkpoint is kept.
    """
    world = world or World()
    check(config, device, world.size)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if device.type == "cpu":
        keep_freed_memory()
    if isinstance(config.model, ConnCompConfig):
        assert run
        yield from fit_threshold(config, run, device, stop)
        return
    train, validation = open_splits(config, device)
    trainer = make_trainer(config, run, train, device, world)
    if run:
        run.truncate_metrics(trainer.step)
    settings = config.train
    started = time.perf_counter()
    while trainer.step < settings.steps:
        with computing_in(config.train.precision, device):
            losses = trainer.update()
        step, means = trainer.step, None
        validates = step % settings.validation_every == 0 or step == settings.steps
        reports = step % REPORT_EVERY == 0
        # to read what is on the device waits for it, so this is not done after every update
        looks = validates or reports
        if looks:
            trainer.check_scenes()
        skipped = int(trainer.skipped) if looks else 0
        if skipped >= _MAX_SKIPPED:
            kept = f"the last good checkpoint is {run.path / 'last'}; " if run else ""
            raise DivergedError(
                f"the losses were not finite {skipped} updates in a row, up to step {step}; "
                f"{kept}try a lower train.learning_rate"
            )
        if reports and not skipped:
            means = trainer.means(losses)
            if run:
                run.log({"kind": "step", "step": step, **means})
        yield Step(step, settings.steps, means, time.perf_counter() - started)
        if validates:
            result = trainer.validate(validation)
            if result:
                yield result
            if settings.patience and step - trainer.best_step >= settings.patience:
                return
            if stop():
                return
        elif stop():
            trainer.save(metrics={}, is_best=False)
            return
