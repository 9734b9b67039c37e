"""Benchmarks of training: `spairkit bench train` and `spairkit bench time-to-ap`.

The first compares updates of SPAIR with plain torch, the second measures the minutes until
validation first reaches given figures.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spairkit.backends import computing_in
from spairkit.benchmarks import timing
from spairkit.benchmarks.plain import COPIES, PlainSPAIR, PlainTrainer
from spairkit.benchmarks.timing import Figure
from spairkit.config import Config, DataConfig, SPAIRConfig
from spairkit.data.datasets import open_dataset
from spairkit.errors import DivergedError, InputError
from spairkit.experiments.published import FIGURE_2
from spairkit.models.loading import build
from spairkit.storage.runs import Run
from spairkit.training.distributed import World
from spairkit.training.loop import Event, Validation, fit
from spairkit.training.update_graph import make_trainer

PAPER_AP = {digits: published.mean for digits, published in FIGURE_2["spair"].items()}
"""AP paper that the authors published for SPAIR, for each number of digits in an image."""

_TOLERANCE, _CHECKED_FLOOR = 1e-3, 1e-2
_GRAPH_WARM_UP = 4  # updates after which training on a GPU replays a CUDA graph
_BURST, _SHORT_SECONDS = 8, 0.5  # updates per sample, where they are this short


def sized(config: Config, batch: int, cells: int) -> Config:
    """The config for `batch` images of `cells` x `cells` cells, without training wheels.

    Raises InputError for models other than SPAIR.
    """
    if not isinstance(config.model, SPAIRConfig):
        raise InputError(
            f"model.kind = {config.model.kind!r} cannot be benchmarked, because only spair has a "
            "plain version to compare with; use spair"
        )
    side = cells * config.model.cell
    data = replace(config.data, image_height=side, image_width=side)
    train = replace(config.train, batch_size=batch, training_wheels=0)
    return replace(config, data=data, train=train)


def run(
    cases: dict[str, Config], device: torch.device, seconds: float, report: Callable[[str], None]
) -> Iterator[Figure]:
    """Checks every case, then yields two figures for each: spairkit's and the plain version's.

    At least `seconds` are spent on each case. `report` receives a line at the start of each step.
    Raises RuntimeError before anything is timed if the plain version gives other results.
    """
    for name, config in cases.items():
        report(f"{name}: checking")
        with computing_in("float32", device):
            check(config, device)
    for name, config in cases.items():
        with computing_in(config.train.precision, device):
            yield from _figures(name, config, device, seconds, report)


def check(config: Config, device: torch.device) -> None:
    """Compares the losses and gradients of both versions on two images.

    The likelihood floor is raised. Otherwise the gradient at a white pixel that is drawn almost
    black, which is the inverse of the drawn value, would consist mostly of rounding errors.
    Raises RuntimeError where the versions differ.
    """
    assert isinstance(config.model, SPAIRConfig)
    config = replace(config, model=replace(config.model, likelihood_floor=_CHECKED_FLOOR))
    images = open_dataset(config.data, "train", device).batch(torch.arange(2)).images
    model: Any = build(config).to(device)
    model.backend = config.train.backend
    found = losses_and_gradients(model, images)
    for name, expected in losses_and_gradients(PlainSPAIR.like(model), images).items():
        error = float((found[name] - expected).norm() / (expected.norm() + 1e-12))
        if not error < _TOLERANCE:
            raise RuntimeError(
                f"{config.preset}: spairkit and the plain version differ by {error:.1e} in {name}; "
                "nothing was timed"
            )


def losses_and_gradients(model: Any, images: Tensor) -> dict[str, Tensor]:
    """All terms of the loss and the gradients of all parameters, by name, with fixed noise."""
    noise = torch.Generator(images.device).manual_seed(0)
    losses = model(images, success=0.9, generator=noise)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(losses.total.mean(), list(parameters.values()))
    terms = {name: term.detach() for name, term in losses.terms().items()}
    return terms | dict(zip(parameters, gradients, strict=True))


def _figures(
    name: str, config: Config, device: torch.device, seconds: float, report: Callable[[str], None]
) -> Iterator[Figure]:
    report(f"{name}: timing")
    assert isinstance(config.model, SPAIRConfig)
    batch, side = config.train.batch_size, config.data.image_height
    # two datasets, because each prepares the scenes of several updates at once
    scenes = [open_dataset(config.data, "train", device) for _ in range(2)]
    ours = make_trainer(config, None, scenes[0], device, World())
    trainers: dict[str, Any] = {"spairkit": ours}
    needed = 4 * COPIES * batch * (side // config.model.cell) ** 2 * side**2
    if needed < 0.7 * timing.free_bytes(device):
        plain: Any = PlainSPAIR.like(ours.model)  # type: ignore[arg-type]
        trainers["plain"] = PlainTrainer(config, plain, scenes[1])
    else:
        report(f"{name}: skipping the plain version, which needs about {needed / 2**30:.0f} GiB")
    # of the first updates, which are launched eagerly: a CUDA graph keeps its memory
    peaks = {way: timing.peak_mib(trainer.update, device) for way, trainer in trainers.items()}
    images = scenes[1].batch(torch.arange(batch)).images
    clocks: dict[str, timing.Clock] = {}
    notes: dict[str, str] = {}
    for way, trainer in trainers.items():
        for _ in range(_GRAPH_WARM_UP if device.type == "cuda" else 0):
            trainer.update()
        short = timing.host_clock(trainer.update, device)() < _SHORT_SECONDS
        clocks[way] = timing.host_clock(trainer.update, device, _BURST if short else 1)
        bf16 = config.train.precision == "bf16"
        backbone = partial(_pass, trainer.model.backbone, images, bf16)
        backbone()
        clocks[f"{way} backbone"], eager = timing.device_clock(backbone, device)
        notes[way] = f"backbone {eager}" if eager else ""
    taken = timing.take_turns(clocks, seconds)
    for way in trainers:
        ms, alone = taken[way]["median_ms"], taken[f"{way} backbone"]["median_ms"]
        more = {"updates/s": 1e3 / ms, "images/s": batch * 1e3 / ms}
        more |= {"backbone ms": alone, "x backbone": ms / alone}
        times, peak = ms / taken["spairkit"]["median_ms"], peaks[way]
        note = notes[way]
        yield Figure(
            case=name, way=way, times=times, peak_mib=peak, note=note, more=more, **taken[way]
        )


def _pass(backbone: Any, images: Tensor, bf16: bool) -> None:
    """Forward and backward through a backbone alone."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        features = backbone(images)
    torch.autograd.grad(features, list(backbone.parameters()), torch.ones_like(features))


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
    report: Callable[[Event], None] = lambda _: None,
) -> Attempt:
    """Trains in a temporary folder until one validation reaches all targets.

    `report` receives every update and every validation.
    """
    step, reached = 0, False
    best = dict.fromkeys(targets, 0.0)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="spairkit-") as folder, suppress(DivergedError):
        run = Run.create(Path(folder) / "run", config)
        with run.lock():
            for event in fit(config, run, device):
                step = event.step
                if isinstance(event, Validation):
                    figures = {name: event.figures[name] for name in targets}
                    best = {name: max(best[name], figures[name]) for name in targets}
                    reached = all(figures[name] >= targets[name] for name in targets)
                report(event)
                if reached:
                    break
    return Attempt(
        seed=config.train.seed,
        targets=targets,
        best=best,
        reached=reached,
        step=step,
        minutes=(time.perf_counter() - begin) / 60,
        cpu_minutes=(time.process_time() - begin_cpu) / 60,
    )
