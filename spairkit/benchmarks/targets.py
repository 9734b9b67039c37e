"""Minutes of training until validation first reaches given figures: `spairkit bench time-to-ap`."""

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from spairkit.config import Config, DataConfig
from spairkit.data.datasets import open_dataset
from spairkit.errors import DivergedError, InputError
from spairkit.experiments.published import FIGURE_2
from spairkit.storage.runs import Run
from spairkit.training.loop import fit
from spairkit.training.validation import Step, Validation

PAPER_AP = {digits: published.mean for digits, published in FIGURE_2["spair"].items()}
"""AP paper that the authors published for SPAIR, for each number of digits in an image."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One training run, which ends as soon as one validation reaches every target."""

    seed: int
    targets: dict[str, float]
    best: dict[str, float]
    """For each target the highest figure of any validation."""
    reached: bool
    step: int
    """Updates at the end of the run."""
    minutes: float
    """Wall time of the run, validations included."""
    cpu_minutes: float


def target(data: DataConfig, ap: float | None) -> float:
    """The AP to reach: `ap`, or the published AP paper for `data.max_objects` digits.

    Raises InputError where the data have no true boxes, or the paper has no such AP.
    """
    if not open_dataset(data, "validation").has_truth:
        raise InputError(
            f"{data.path}: there is no annotations.json (COCO), and an AP needs true boxes; add "
            "that file or choose other data"
        )
    if ap is None and data.max_objects not in PAPER_AP:
        known = ", ".join(map(str, PAPER_AP))
        raise InputError(
            f"the paper has no AP for {data.max_objects} objects, only for {known}; give a target "
            "with --ap"
        )
    return PAPER_AP[data.max_objects] if ap is None else ap


def attempt(
    config: Config,
    targets: dict[str, float],
    device: torch.device,
    report: Callable[[Step | Validation], None] = lambda _: None,
) -> Attempt:
    """Trains in a temporary folder until one validation reaches all targets.

    `report` receives every update and every validation.
    """
    step, reached = 0, False
    best = dict.fromkeys(targets, 0.0)
    begin, begin_cpu = time.perf_counter(), time.process_time()

    def stop() -> bool:
        return reached

    with tempfile.TemporaryDirectory(prefix="spairkit-") as folder, suppress(DivergedError):
        run = Run.create(Path(folder) / "run", config)
        with run.lock():
            for event in fit(config, run, device, stop):
                step = event.step
                if isinstance(event, Validation):
                    figures = {name: event.figures[name] for name in targets}
                    best = {name: max(best[name], figures[name]) for name in targets}
                    reached = all(figures[name] >= targets[name] for name in targets)
                report(event)
    return Attempt(
        seed=config.train.seed,
        targets=targets,
        best=best,
        reached=reached,
        step=step,
        minutes=(time.perf_counter() - begin) / 60,
        cpu_minutes=(time.process_time() - begin_cpu) / 60,
    )
