"""Updates of SPAIR's training beside the plain version of the same step, in one run.

The steps are those of `training`, at the weights that training begins with and without training
wheels; the plain version has another model in it (`plain`) and torch's ordinary Adam. Both are
checked against each other first, and nothing is timed when they differ.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from spairkit.benchmarks.plain import COPIES, PlainAdam, PlainSPAIR
from spairkit.benchmarks.timing import free_bytes, peak_bytes
from spairkit.config import Config, SPAIRConfig
from spairkit.data.datasets import Dataset, open_dataset
from spairkit.data.scenes import Batch
from spairkit.errors import InputError
from spairkit.models.loading import build
from spairkit.models.spair import SPAIR
from spairkit.training.distributed import World
from spairkit.training.process import computing_in
from spairkit.training.trainer import Trainer
from spairkit.training.update_graph import WARM_UP, RecordingTrainer, make_trainer

Way = Literal["spairkit", "plain"]

PARTS = {
    "data": "scenes of a batch",
    "noise": "noise for all samples, background",
    "backbone": "features of all cells, forward",
    "cells": "where, what, depth and pres of all cells, forward",
    "decoder": "object maps, forward",
    "render": "the image, forward",
    "kl": "all KL terms and the likelihood, forward",
    "backward": "gradients of all of these",
    "optimiser": "clipping, gradient noise, Adam",
}
"""Parts of an update, and what each of them is."""

_TOLERANCE, _CHECKED_FLOOR = 1e-3, 1e-2
_MIN_ROUNDS, _PATIENCE_SECONDS = 3, 60
_UPDATES = 8  # whose scenes are made at once, where they are small


@dataclass(frozen=True, kw_only=True)
class Case:
    """A SPAIR's update at one size.

    Raises:
        InputError: the config is of another model.
    """

    config: Config
    batch: int
    cells: int
    """Along each side of a square image."""

    def __post_init__(self) -> None:
        if not isinstance(self.config.model, SPAIRConfig):
            raise InputError(
                f"only the updates of spair are timed, not of {self.config.model.kind}"
            )

    def sized(self) -> Config:
        """The config at this size."""
        assert isinstance(self.config.model, SPAIRConfig)
        side = self.cells * self.config.model.cell
        data = replace(self.config.data, image_height=side, image_width=side)
        train = replace(self.config.train, batch_size=self.batch, training_wheels=0)
        return replace(self.config, data=data, train=train)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What an update takes; medians in milliseconds, of wall time unless it says CPU time."""

    preset: str
    batch: int
    cells: int
    """In an image."""
    way: Way
    note: str = ""
    """Why there are no figures, or what they are not of."""
    repeats: int = 0
    step_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    cpu_ms: float | None = None
    """CPU time of all threads."""
    backbone_ms: float | None = None
    """The own forward and backward of this way's backbone, in turn with the steps; CPUs only."""
    backbone_cpu_ms: float | None = None
    updates_per_second: float | None = None
    images_per_second: float | None = None
    cell_us: float | None = None
    """Microseconds for a cell of an image."""
    times_backbone: float | None = None
    """The step over the backbone's own forward and backward ..."""
    times_backbone_cpu: float | None = None
    """... and the same of CPU time."""
    times_plain_backbone: float | None = None
    """The step over the plain version's backbone, which is torch's own convolutions ..."""
    times_plain_backbone_cpu: float | None = None
    """... and the same of CPU time."""
    ratio: float | None = None
    """Times slower than spairkit."""
    rest_ratio: float | None = None
    """Likewise of everything but the backbone's own forward and backward ..."""
    rest_ratio_cpu: float | None = None
    """... and the same of CPU time."""
    peak_bytes: int | None = None
    """Memory above what was there before; None where the system does not tell."""
    parts_ms: dict[str, float] = field(default_factory=dict)
    """By name in `PARTS`; each is launched, and waited for, so they may sum to much more."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What is being done, and how much of it is."""

    case: Case
    doing: str
    done: float = 0
    total: float | None = None
    """In the unit of `done`; None where nobody knows."""


Report = Callable[[Progress], None]


def run(
    cases: list[Case],
    device: torch.device,
    seconds: float,
    report: Report = lambda _: None,
) -> Iterator[Figure]:
    """Checks every case, then yields two figures for each: ours, and the plain version's.

    Args:
        cases: what to time.
        device: where.
        seconds: to spend on a case, at least; three rounds, if they take no longer than a minute.
        report: is told what begins and how far it is, never while a clock runs.

    Raises:
        InputError: the data of a config cannot be read.
        RuntimeError: the plain version computes something else; no figure has been taken.
    """
    for case in cases:
        report(Progress(case=case, doing="checking"))
        with computing_in("float32", device):
            check(case, device)
    for case in cases:
        with computing_in(case.config.train.precision, device):
            yield from _figures(case, device, seconds, report)


def check(case: Case, device: torch.device) -> None:
    """Compares losses and gradients of both versions on two images.

    The likelihood's floor is raised for it: the gradient at a white pixel that is drawn almost
    black is the inverse of what is drawn, and float32 rounding would be most of it.

    Raises:
        RuntimeError: they differ; the message says where and by how much.
    """
    config = replace(case, batch=2).sized()
    assert isinstance(config.model, SPAIRConfig)
    config = replace(config, model=replace(config.model, likelihood_floor=_CHECKED_FLOOR))
    images = open_dataset(config.data, "train", device).batch(torch.arange(2)).images
    model = _model(config, device)
    found = _losses_and_gradients(model, images)
    wanted = _losses_and_gradients(_plain(model), images)
    for name, expected in wanted.items():
        error = float((found[name] - expected).norm() / (expected.norm() + 1e-12))
        if not error < _TOLERANCE:
            raise RuntimeError(
                f"{config.preset}: the plain step is off by {error:.1e} in {name}, so nothing is "
                "timed"
            )


def _figures(case: Case, device: torch.device, seconds: float, report: Report) -> Iterator[Figure]:
    report(Progress(case=case, doing="warming up"))
    config = case.sized()
    assert isinstance(config.model, SPAIRConfig)
    number = case.cells**2
    labels: dict[str, Any] = {"preset": config.preset, "batch": case.batch, "cells": number}
    ours = _trainer(config, device)
    trainers: dict[Way, Trainer] = {"spairkit": ours}
    side = config.data.image_height
    needed = 4 * COPIES * case.batch * number * side**2
    if needed < 0.7 * free_bytes(device):
        train = open_dataset(config.data, "train", device)
        trainers["plain"] = Trainer(config, None, train, device)
        _make_plain(trainers["plain"])
    calls: dict[str, Callable[[], object]] = {way: t.update for way, t in trainers.items()}
    peaks = {way: peak_bytes(call, device) for way, call in calls.items()}  # and a warm-up
    data, data_cpu = _scenes_ms(ours.train, case.batch, device)
    batch = ours.train.batch(torch.arange(case.batch))
    same: Any = _SameBatch(batch)
    recorded = isinstance(ours, RecordingTrainer)
    makes_scenes = isinstance(ours, RecordingTrainer) and ours.makes_scenes
    timed_apart = [way for way in trainers if way == "plain" or not makes_scenes]
    for way in timed_apart:
        trainers[way].train = same
    if recorded:
        for _ in range(WARM_UP + 1):
            ours.update()
    else:
        for way, trainer in trainers.items():
            calls[_backbone(way)] = _backbone_call(trainer, batch.images)
            calls[_backbone(way)]()

    def report_seconds(spent: float) -> None:
        doing = f"timing for at least {seconds:g} s"
        report(Progress(case=case, doing=doing, done=min(spent, seconds), total=seconds))

    wall, cpu, repeats = _medians(calls, device, seconds, report_seconds)
    for way in timed_apart:
        wall[way] = [data + ms for ms in wall[way]]
        cpu[way] = [data_cpu + ms for ms in cpu[way]]
    # on a GPU the backbone alone, kernel by kernel, cannot be set against a graph
    backbone, backbone_cpu = (
        {way: times.get(_backbone(way), [math.nan] * 3)[1] for way in ("spairkit", "plain")}
        for times in (wall, cpu)
    )
    rest, rest_cpu = (
        {way: times[way][1] - own[way] for way in trainers}
        for times, own in ((wall, backbone), (cpu, backbone_cpu))
    )
    played = not isinstance(ours, RecordingTrainer) or ours.graph.plays
    for way, trainer in trainers.items():
        low, step, high = wall[way]

        def report_updates(done: int, doing: str = f"timing the parts of {way}") -> None:
            report(Progress(case=case, doing=doing, done=done, total=repeats))

        yield Figure(
            **labels,
            way=way,
            note="" if played or way == "plain" else "no CUDA graph: it could not be recorded",
            repeats=repeats,
            step_ms=step,
            p20_ms=low,
            p80_ms=high,
            cpu_ms=cpu[way][1],
            backbone_ms=_known(backbone[way]),
            backbone_cpu_ms=_known(backbone_cpu[way]),
            updates_per_second=1e3 / step,
            images_per_second=1e3 * case.batch / step,
            cell_us=1e3 * step / (case.batch * number),
            times_backbone=_ratio(step, backbone[way]),
            times_backbone_cpu=_ratio(cpu[way][1], backbone_cpu[way]),
            times_plain_backbone=_ratio(step, backbone["plain"]),
            times_plain_backbone_cpu=_ratio(cpu[way][1], backbone_cpu["plain"]),
            ratio=step / wall["spairkit"][1],
            rest_ratio=_ratio(rest[way], rest["spairkit"]),
            rest_ratio_cpu=_ratio(rest_cpu[way], rest_cpu["spairkit"]),
            peak_bytes=peaks[way],
            parts_ms=_parts(trainer, same, device, repeats, report_updates) | {"data": data}
            if not isinstance(trainer, RecordingTrainer)
            else {},
        )
    if "plain" not in trainers:
        yield Figure(**labels, way="plain", note=f"needs about {needed / 2**30:.0f} GiB")


def _model(config: Config, device: torch.device) -> SPAIR:
    model = build(config).to(device)
    assert isinstance(model, SPAIR)
    return model


def _plain(model: Any) -> PlainSPAIR:
    """The plain version with weights of its own, equal to those of `model`."""
    plain = PlainSPAIR(model.config)
    plain.load_state_dict(model.state_dict())
    return plain.to(next(model.parameters()).device)


def _trainer(config: Config, device: torch.device) -> Trainer:
    train = open_dataset(config.data, "train", device)
    return make_trainer(config, None, train, device, World())


def _make_plain(trainer: Trainer) -> None:
    """Puts the plain version into a trainer that has made no update yet."""
    trainer.model = _plain(trainer.model)
    trainer.parameters = dict(trainer.model.named_parameters())
    rate = trainer.config.train.learning_rate
    trainer.optimiser = PlainAdam(trainer.parameters.values(), lr=rate)


def _losses_and_gradients(model: SPAIR, images: Tensor) -> dict[str, Tensor]:
    noise = torch.Generator(images.device).manual_seed(0)
    losses = model(images, success=0.9, generator=noise)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(losses.total.mean(), list(parameters.values()))
    terms = {name: term.detach() for name, term in losses.terms().items()}
    return {**terms, **dict(zip(parameters, grads, strict=True))}


def _backbone(way: str) -> str:
    return f"backbone of {way}"


def _backbone_call(trainer: Trainer, images: Tensor) -> Callable[[], object]:
    backbone: Any = trainer.model.backbone
    parameters = list(backbone.parameters())
    bf16 = trainer.config.train.precision == "bf16"

    def call() -> object:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            features = backbone(images)
        return torch.autograd.grad(features, parameters, torch.ones_like(features))

    return call


def _medians(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    report_seconds: Callable[[float], None],
) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    """20th, 50th and 80th percentile of wall and of CPU time, ms; the calls take turns."""
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    begin, rounds = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds or (
        rounds < (_MIN_ROUNDS if spent < _PATIENCE_SECONDS else 1)
    ):
        report_seconds(spent)
        for name, call in calls.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            _wait_for(device)
            cpu[name].append(1e3 * (time.process_time() - start_cpu))
            wall[name].append(1e3 * (time.perf_counter() - start))
        rounds += 1
    return _percentiles(wall), _percentiles(cpu), rounds


def _percentiles(times: dict[str, list[float]]) -> dict[str, list[float]]:
    return {
        name: [sorted(t)[len(t) // 5], statistics.median(t), sorted(t)[len(t) * 4 // 5]]
        for name, t in times.items()
    }


def _scenes_ms(dataset: Dataset, batch: int, device: torch.device) -> tuple[float, float]:
    """Wall and CPU time of the scenes of an update, of which several are made at once."""
    wall, cpu = [], []
    for turn in range(3):
        start, start_cpu = time.perf_counter(), time.process_time()
        for update in range(_UPDATES):
            first = (turn * _UPDATES + update) * batch
            dataset.batch(torch.arange(first, first + batch))
        _wait_for(device)
        cpu.append(1e3 * (time.process_time() - start_cpu) / _UPDATES)
        wall.append(1e3 * (time.perf_counter() - start) / _UPDATES)
    return statistics.median(wall), statistics.median(cpu)


class _SameBatch:
    """A dataset whose batches cost nothing."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def batch(self, indices: Tensor) -> Batch:
        return self._batch


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _ratio(time: float, other: float) -> float | None:
    """None where a difference of times is lost in their noise, or a clock is too coarse."""
    return time / other if other > 0 else None


def _parts(
    trainer: Trainer,
    same: Any,
    device: torch.device,
    repeats: int,
    report_updates: Callable[[int], None],
) -> dict[str, float]:
    """Median milliseconds of each part of an update, but for its scenes, which are the `same`."""
    model = trainer.model
    trainer.wheels = None
    trainer.train = same
    watched = [
        (model, "forward", "noise"),
        (model.backbone, "forward", "backbone"),
        (model, "_encode", "cells"),
        (model, "_decode", "decoder"),
        (model, "_render", "render"),
        (model, "_losses", "kl"),
        (Tensor, "backward", "backward"),
    ]
    times: dict[str, list[float]] = {name: [] for name in PARTS}
    for repeat in range(repeats):
        report_updates(repeat)
        watch = _Stopwatch(device)
        with ExitStack() as stack:
            for owner, attribute, name in watched:
                stack.enter_context(watch.watching(owner, attribute, name))
            with watch.part("optimiser"):
                trainer.update()
        for name in PARTS:
            times[name].append(1e3 * watch.seconds.get(name, 0.0))
    return {name: statistics.median(t) for name, t in times.items()}


class _Stopwatch:
    """Seconds of parts within parts: those of an inner one are not the outer one's."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._open: list[str] = []
        self._last = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    @contextmanager
    def watching(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """While it lasts, calls of the owner's method count as the part `name`."""
        original = getattr(owner, attribute)
        own = attribute in vars(owner)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            with self.part(name):
                return original(*arguments, **keywords)

        setattr(owner, attribute, watched)
        try:
            yield
        finally:
            if own:
                setattr(owner, attribute, original)
            else:
                delattr(owner, attribute)

    def _mark(self) -> None:
        _wait_for(self._device)
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
