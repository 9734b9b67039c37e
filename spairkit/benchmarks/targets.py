"""How long training takes until its validation figures first reach given ones, over seeds."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from spairkit.config import Config, DataConfig
from spairkit.data.datasets import open_dataset
from spairkit.errors import DivergedError, InputError
from spairkit.experiments.published import FIGURE_2
from spairkit.storage.runs import Run
from spairkit.training.loop import Validation, fit

PAPER_AP = {digits: published.mean for digits, published in FIGURE_2["spair"].items()}
"""`ap_spair` that SPAIR had on images of so many digits."""


@dataclass(frozen=True, kw_only=True)
class Reached:
    """When a figure was first seen to be reached; a time includes the validations before it."""

    step: int
    minutes: float
    cpu_minutes: float


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One training."""

    seed: int
    targets: dict[str, float]
    first: dict[str, Reached | None]
    """For each target when it was first reached, and None where it never was."""
    all: Reached | None
    """When all were reached at one validation: there training ends."""
    broken_off: bool
    """Whether it was stopped before its end; neither a success nor a failure."""
    best: dict[str, float]
    """The highest figure of any validation, for each target; 0 before the first."""
    steps: int
    minutes: float
    """In all."""
    cpu_minutes: float


def check_truth(data: DataConfig) -> None:
    """Refuses data of which no AP is known.

    Raises:
        InputError: they cannot be read or say nothing of boxes.
    """
    if not open_dataset(data, "validation").has_truth:
        raise InputError(
            f"{data.path}: AP needs known boxes, and there is no annotations.json (COCO)"
        )


def paper_target(data: DataConfig) -> float:
    """The paper's `ap_spair` for as many digits as the data have at most.

    Raises:
        InputError: the paper has none for that number.
    """
    if data.max_objects not in PAPER_AP:
        raise InputError(
            f"the paper has no AP for {data.max_objects} objects, but for "
            f"{', '.join(map(str, PAPER_AP))}; give --ap"
        )
    return PAPER_AP[data.max_objects]


def attempts(
    config: Config,
    targets: Mapping[str, float],
    seeds: list[int],
    device: torch.device,
    report: Callable[[int, int, Validation | None], None] = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Attempt]:
    """One training for each seed, in a temporary folder, until all targets are reached.

    Args:
        config: ends a training that does not reach them.
        targets: figures of validations and what they must be at least.
        seeds: `train.seed` of each.
        device: where.
        report: is told seed and step, and of validations.
        stop: asked after every update; when it says yes the training under way is broken off and
            yielded as such, and no other begins.

    Raises:
        InputError: the data cannot be read or say nothing of boxes.
    """
    check_truth(config.data)
    for seed in seeds:
        if stop():
            return
        seeded = replace(config, train=replace(config.train, seed=seed))
        yield _attempt(seeded, targets, device, report, stop)


def success_rate(attempts: Sequence[Attempt]) -> float | None:
    """Share that reached all targets, of those not broken off; None where there are none."""
    ended = [attempt for attempt in attempts if not attempt.broken_off]
    return sum(attempt.all is not None for attempt in ended) / len(ended) if ended else None


def _attempt(
    config: Config,
    targets: Mapping[str, float],
    device: torch.device,
    report: Callable[[int, int, Validation | None], None],
    stop: Callable[[], bool],
) -> Attempt:
    seed, step = config.train.seed, 0
    first: dict[str, Reached | None] = dict.fromkeys(targets)
    best = dict.fromkeys(targets, 0.0)
    every: list[Reached] = []
    stopped = False
    begin, begin_cpu = time.perf_counter(), time.process_time()

    def now() -> Reached:
        return Reached(
            step=step,
            minutes=(time.perf_counter() - begin) / 60,
            cpu_minutes=(time.process_time() - begin_cpu) / 60,
        )

    def ends() -> bool:
        nonlocal stopped
        stopped = not every and stop()
        return bool(every) or stopped

    with tempfile.TemporaryDirectory(prefix="spairkit-") as folder:
        run = Run.create(Path(folder) / "run", config)
        try:
            with run.lock():
                for event in fit(config, run, device, ends):
                    step = event.step
                    validation = event if isinstance(event, Validation) else None
                    if validation:
                        figures = {name: validation.figures[name] for name in targets}
                        best = {name: max(best[name], figures[name]) for name in targets}
                        reached = {name for name in targets if figures[name] >= targets[name]}
                        first |= {name: now() for name in reached if first[name] is None}
                        if len(reached) == len(targets):
                            every.append(now())
                    report(seed, step, validation)
        except DivergedError:
            pass  # a failure like any other
    end = now()
    return Attempt(
        seed=seed,
        targets=dict(targets),
        first=first,
        all=every[0] if every else None,
        broken_off=stopped and step < config.train.steps,
        best=best,
        steps=step,
        minutes=end.minutes,
        cpu_minutes=end.cpu_minutes,
    )
