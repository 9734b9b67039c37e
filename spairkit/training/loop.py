"""The training loop: `fit` yields events and prints nothing.

Everything random is a function of (seed, step): the data, the sampling noise, the gradient noise.
On a CPU, with the same number of threads, a run that is killed and resumed is therefore
bit-identical to an uninterrupted one.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from spairkit import presets
from spairkit.backends import chosen_backend, computing_in
from spairkit.config import ClassicalConfig, Config
from spairkit.config_values import from_toml, merge, nested, to_toml
from spairkit.data.datasets import data_settings, open_dataset, open_splits
from spairkit.data.files import changed_files, data_files, sha256_of_files
from spairkit.data.folder import ImageFolder
from spairkit.detector import Detector, chosen_device, load
from spairkit.errors import DivergedError, InputError
from spairkit.images import skipped_files
from spairkit.names import printable
from spairkit.report.objects import write_objects
from spairkit.report.signs import Signs, signs_of, write_signs
from spairkit.storage.runs import Run, record_data, recorded_data
from spairkit.survey import Survey, preparation, survey_of
from spairkit.training.calibration import calibrate, calibrates
from spairkit.training.classical import fit_classical
from spairkit.training.distributed import World
from spairkit.training.process import keep_freed_memory
from spairkit.training.restarts import Restart as Restart
from spairkit.training.restarts import is_judged, restart_of
from spairkit.training.update_graph import make_trainer
from spairkit.training.validation import Step as Step
from spairkit.training.validation import Validation as Validation

Event = Step | Validation | Restart

REPORT_EVERY = 20
"""Updates between two `Step`s with losses: reading losses waits for the device."""

_SECONDS_BETWEEN_LINES = 5  # of `train`
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

    The run's folder has a report.html, as after `spairkit train`.

    If time runs out before the first validation, it is the detector of the last checkpoint.

    Args:
        data: a folder of images, an MNIST file or the name of a dataset; None takes the preset's.
        preset: "quick", "laptop" or "paper".
        set: settings laid over the preset, by dotted key: {"model.background": "mode"}.
        minutes: stops after so long, with a checkpoint; `spairkit train --resume` continues.
        out: the run's folder; None makes the next runs/<data>-<preset>-N.
        device: "auto" takes a GPU if there is one.
        verbose: print progress to stderr.

    Raises:
        InputError: settings or data cannot be used, or the folder cannot be written.
        DivergedError: an `InputError`: the losses are no longer finite; lower train.learning_rate.

    Warns:
        UserWarning: there are signs that the training has failed (docs/own-images.md).
    """
    device = chosen_device(device)
    if minutes is not None and not minutes > 0:
        raise InputError(f"minutes must be above 0, got {minutes}")
    if not isinstance(set or {}, Mapping) or not all(isinstance(key, str) for key in set or {}):
        raise TypeError('set must be a dict such as {"model.background": "mode"}')
    layers = [data_settings(os.fspath(data)) if data is not None else {}, nested(set or {})]
    given = merge(*layers)
    # a preparation may need the contrast that is measured
    config = presets.resolve(preset, {k: v for k, v in given.items() if k != "prepare"})
    survey = survey_of(config, chosen=preparation(given))
    measured = survey.settings(config.model, given) if survey else {}
    config = presets.resolve(preset, measured, given)
    check(config, device, 1)
    images, _ = open_splits(config)  # mistakes show before a run is made
    if isinstance(images, ImageFolder) and images.skipped:
        warnings.warn(skipped_files(images.skipped, images.num_files), stacklevel=2)
    run = Run.create(None if out is None else Path(out), config)
    began = said = time.monotonic()

    def stop() -> bool:
        return minutes is not None and time.monotonic() - began >= 60 * minutes

    def say(text: str) -> None:
        nonlocal said
        if verbose:
            said = time.monotonic()
            print(printable(text), file=sys.stderr, flush=True)

    if survey:
        lines = survey.lines(config.prepare, preparation(given))
        for line in lines + [f"warning: {doubt}" for doubt in survey.doubts()]:
            say(line)
    say(f"training in {run.path} on {device.type}, {config.train.steps} steps")
    with run.lock():
        for event in fit(config, run, device, stop):
            if isinstance(event, Restart):
                say(str(event))
            elif isinstance(event, Validation):
                figures = ", ".join(f"{name} {value:.3f}" for name, value in event.figures.items())
                say(f"step {event.step}: {figures}")
            elif time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
                say(f"step {event.step} of {event.steps}")
        if calibrates(run):
            say("calibrating the search")
            calibrate(run, device)
    detector = load(run.path, device)
    signs = _reported(run, detector, survey)
    for warning in signs.warnings:
        say(f"warning: {warning}")
    if signs.failures:
        warnings.warn(
            f"the training of {printable(run.path)} failed, do not use what it finds: "
            f"{'; '.join(signs.failures)}",
            stacklevel=2,
        )
    return detector


def _reported(run: Run, detector: Detector, survey: Survey | None) -> Signs:
    """The signs of failure of a run that has ended; writes its report."""
    from spairkit.report.page import write_report  # needs Matplotlib, and training does not

    dataset = open_dataset(run.config.data, "test", detector.device)
    objects = write_objects(run.path, detector, dataset)
    last = run.checkpoints[0][0] if run.checkpoints else 0
    signs = signs_of(detector, objects, survey, last)
    write_signs(run.path, signs)
    write_report(run.path)
    return signs


def check(config: Config, device: torch.device, processes: int) -> None:
    """Refuses settings that this device or number of processes cannot train with.

    Raises:
        InputError: the batch cannot be shared evenly among the processes, the model is trained by
            one process only, or the device does not support the precision or the backend.
    """
    if config.train.precision == "tf32" and device.type != "cuda":
        raise InputError(
            "train.precision = 'tf32' needs an NVIDIA GPU, but the device is "
            f"{device.type}; use 'float32' or 'bf16'"
        )
    if config.train.backend == "triton":
        if config.model.kind != "spair":
            raise InputError(f"train.backend = 'triton' is for SPAIR only, not {config.model.kind}")
        try:
            chosen_backend("triton", torch.empty(0, device=device), "the model")
        except ValueError as error:
            raise InputError(f"train.backend: {error}; use 'auto'") from None
    if processes > 1 and isinstance(config.model, ClassicalConfig):
        raise InputError(f"{config.model.kind} is fitted by one process; run without torchrun")
    if config.train.batch_size % processes:
        raise InputError(
            f"train.batch_size ({config.train.batch_size}) must be a multiple of the number of "
            f"processes ({processes}), which share each batch"
        )


def fit(
    config: Config,
    run: Run | None,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    world: World | None = None,
) -> Iterator[Event]:
    """Trains in the folder of `run`, resuming from its last checkpoint if there is one.

    Models without weights have no losses: `classical.fit_classical` yields the same events.

    Args:
        config: of the run.
        run: locked by the caller during the iteration. None on all ranks but 0, which alone reads
            and writes the run, and validates.
        device: of the model and the scenes.
        stop: called after every update, except one after which patience has run out; if it returns
            True, training ends with a checkpoint of that update. It must return the
            same on all ranks.
        world: the processes that share each batch; None for one process.

    Yields:
        A `Step` for every update and, if there is a run, a `Validation` every `validation_every`
        updates and at the end. Steps before a resumption are not yielded again. A `Restart` in
        place of a validation, if the training starts again with other settings (`train.retries`),
        which the run takes; the next step is the first one again.

    Raises:
        InputError: as `check`; the data cannot be read, or has no boxes to select by; a scene found
            no layout (on a GPU this is noticed when losses are reported or a checkpoint is due);
            the folder cannot be written; or another process has ended.
        DivergedError: the losses were not finite in the last 10 updates or more (noticed when
            losses are reported or a validation is due); the last good checkpoint is kept.
    """
    world = world or World()
    check(config, device, world.size)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.train.threads or threads)
    try:
        if device.type == "cpu":
            keep_freed_memory()
        if run:
            _note_data(config, run)
        if not isinstance(config.model, ClassicalConfig):
            yield from _fit(config, run, device, stop, world)
        elif run:
            yield from fit_classical(config, run, device, stop)
        else:
            raise ValueError(f"{config.model.kind} is fitted in a run; run must not be None")
    finally:
        torch.set_num_threads(threads)


def _note_data(config: Config, run: Run) -> None:
    """Records the files that the run is trained on, or warns if they are no longer the same."""
    now = sha256_of_files(data_files(config.data))
    before = recorded_data(run.path)
    if before is None:
        record_data(run.path, now)
    elif changes := changed_files(before, now):
        said = "the data have changed since the run began, so the result will differ"
        warnings.warn(printable(f"{run.path}: {said}: {changes}"), stacklevel=2)


def _fit(
    config: Config, run: Run | None, device: torch.device, stop: Callable[[], bool], world: World
) -> Iterator[Event]:
    """Trains, and starts again as long as there is reason to."""
    following: Config | None = config
    while following is not None:
        following = yield from _attempt(following, run, device, stop, world)


def _attempt(
    config: Config, run: Run | None, device: torch.device, stop: Callable[[], bool], world: World
) -> Generator[Event, None, Config | None]:
    """Trains to the end; or returns the config to start again with."""
    train, validation = open_splits(config, device)
    trainer = make_trainer(config, run, train, device, world)
    if run:
        run.truncate_metrics(trainer.step)
    settings = config.train

    def is_out_of_patience() -> bool:
        return 0 < settings.patience <= trainer.step - trainer.best_step

    if trainer.step % settings.validation_every == 0 and is_out_of_patience():
        return None  # it had ended here before
    started = time.perf_counter()
    while trainer.step < settings.steps:
        with computing_in(config.train.precision, device):
            losses = trainer.update()
        step, means = trainer.step, None
        validates = step % settings.validation_every == 0 or step == settings.steps
        reports = step % REPORT_EVERY == 0
        # reading values from the device waits for it, so this is not done after every update
        looks = validates or reports
        if looks:
            trainer.check_scenes()
        skipped = int(trainer.skipped) if looks else 0
        if skipped >= _MAX_SKIPPED:
            kept = f"the last good checkpoint is {run.path / 'last'}; " if run else ""
            raise DivergedError(
                f"the losses were not finite in {skipped} updates in a row, up to step {step}; "
                f"{kept}try a lower train.learning_rate"
            )
        if reports and not skipped:
            means = trainer.means(losses)
            if run:
                run.log({"kind": "step", "step": step, **means})
        yield Step(step, settings.steps, means, time.perf_counter() - started)
        if validates:
            if is_judged(config, step):
                restart = restart_of(trainer, validation) if run else None
                shared = world.from_first(to_toml(restart.config).encode() if restart else b"")
                if run and restart:
                    run.restart(restart.config, restart.record())
                    yield restart
                if shared:
                    return from_toml(shared.decode())
            result = trainer.validate(validation)
            if result:
                yield result
            if is_out_of_patience():
                return None
            if stop():
                return None
        elif stop():
            trainer.save(metrics={}, is_best=False)
            return None
    return None
