"""Speed and memory of training updates compared with plain torch: `spairkit bench train`."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spairkit.benchmarks import timing
from spairkit.benchmarks.plain import COPIES, PlainSPAIR, PlainTrainer
from spairkit.benchmarks.timing import Figure
from spairkit.config import Config, SPAIRConfig
from spairkit.data.datasets import open_dataset
from spairkit.errors import InputError
from spairkit.models.loading import build
from spairkit.training.loop import Trainer as Trainer
from spairkit.training.process import computing_in

_TOLERANCE, _CHECKED_FLOOR = 1e-3, 1e-2
_GRAPH_WARM_UP = 4  # updates after which training on a GPU replays a CUDA graph
_BURST, _SHORT_SECONDS = 8, 0.5  # updates per sample, where they are this short


def sized(config: Config, batch: int, cells: int) -> Config:
    """The config for `batch` square images of `cells` x `cells` cells, without training wheels.

    Without training wheels every update reaches every weight. Raises InputError for models other
    than SPAIR.
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
    configs: list[Config], device: torch.device, seconds: float, report: Callable[[str], None]
) -> Iterator[Figure]:
    """Checks every config, then yields two figures for each: spairkit's and the plain version's.

    At least `seconds` are spent on each config. `report` receives a line at the start of each step.
    Raises RuntimeError before anything is timed if the plain version gives other results.
    """
    for config in configs:
        report(f"{_name(config)}: checking")
        with computing_in("float32", device):
            check(config, device)
    for config in configs:
        with computing_in(config.train.precision, device):
            yield from _figures(config, device, seconds, report)


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


def _name(config: Config) -> str:
    assert isinstance(config.model, SPAIRConfig)
    cells = (config.data.image_height // config.model.cell) ** 2
    return f"{config.preset} {config.train.batch_size}x{cells}"


def _figures(
    config: Config, device: torch.device, seconds: float, report: Callable[[str], None]
) -> Iterator[Figure]:
    name, batch = _name(config), config.train.batch_size
    report(f"{name}: timing")
    # two datasets, because each prepares the scenes of several updates at once
    scenes = [open_dataset(config.data, "train", device) for _ in range(2)]
    ours = Trainer(config, run=None, train=scenes[0], device=device)
    trainers: dict[str, Any] = {"spairkit": ours}
    needed = 4 * COPIES * batch * int(name.split("x")[-1]) * config.data.image_height**2
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
        backbone = _backbone_call(trainer.model.backbone, images, config.train.precision == "bf16")
        clocks[f"{way} backbone"], eager = timing.device_clock(backbone, device)
        notes[way] = f"backbone {eager}" if eager else ""
    taken = timing.take_turns(clocks, seconds)
    for way in trainers:
        ms, backbone_ms = taken[way]["median_ms"], taken[f"{way} backbone"]["median_ms"]
        yield Figure(
            case=name,
            way=way,
            times=ms / taken["spairkit"]["median_ms"],
            peak_mib=peaks[way],
            note=notes[way],
            more={
                "updates/s": 1e3 / ms,
                "images/s": batch * 1e3 / ms,
                "backbone ms": backbone_ms,
                "x backbone": ms / backbone_ms,
            },
            **taken[way],
        )


def _backbone_call(backbone: Any, images: Tensor, bf16: bool) -> timing.Call:
    """The forward and backward pass of a backbone."""
    parameters = list(backbone.parameters())

    def call() -> object:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            features = backbone(images)
        return torch.autograd.grad(features, parameters, torch.ones_like(features))

    call()
    return call
