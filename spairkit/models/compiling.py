"""Compiles the CPU kernels of a model before its first update, so that progress can be shown.

for step in compiling(config.model, device):
    print(f"compiling {step.name}: {step.done / step.total:.0%}")

Each kernel runs once on small tensors, which compiles it or loads it from the cache on disk.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spairkit.backends import runs_compiled
from spairkit.config import ClassicalConfig, ModelConfig, SPAIRConfig
from spairkit.models.convolutions import convolve, takes_winograd
from spairkit.models.densities import (
    bernoulli_cross_entropy,
    normal_nll,
    scaled_squash,
    weighted_kls,
)
from spairkit.models.networks import Backbone
from spairkit.models.spair import SPAIR
from spairkit.presence import presence_kl
from spairkit.rendering import render

_FORWARD = "cells, forward"
_BERNOULLI, _NORMAL = "likelihood", "normal likelihood"
_CONVOLUTIONS = "convolutions"


class Compiling(NamedTuple):
    """A kernel that is about to be compiled."""

    done: int
    """Work behind it, in the units of `total`: about a tenth of a second each, without a cache."""
    total: int
    name: str


def compiling(config: ModelConfig, device: torch.device) -> Iterator[Compiling]:
    """Compiles every Numba kernel that training needs, or loads it from the cache on disk.

    Each is announced before the work on it begins. Nothing is compiled for other devices, without
    Numba, or for models without weights. With a warm cache it takes a fraction of a second.
    """
    on_cpu = runs_compiled(torch.empty(0, device=device, dtype=torch.float32))
    if not on_cpu or isinstance(config, ClassicalConfig):
        return
    names = [_BERNOULLI, "divergences"]
    if isinstance(config, SPAIRConfig):
        unused = [_BERNOULLI if config.likelihood == "normal" else _NORMAL]
        if not _any_winograd(config):
            unused.append(_CONVOLUTIONS)
        names = [name for name in KERNELS if name not in unused]
    total, done = sum(KERNELS[name][0] for name in names), 0
    for name in names:
        work, call = KERNELS[name]
        yield Compiling(done, total, name)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            value = call().sum()
            if name != _FORWARD:
                value.backward()
        done += work


def _any_winograd(config: SPAIRConfig) -> bool:
    """Whether a layer of the backbone is trained by Winograd's F(2, 2)."""
    with torch.device("meta"):
        backbone = Backbone(
            config.strides, config.backbone_channels, 1, config.pointwise_kernel, config.activation
        )
    layers = [layer for layer in backbone.layers if isinstance(layer, nn.Conv2d)]
    return any(map(takes_winograd, (layer.weight for layer in layers), backbone.strides))


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


def _encode() -> Tensor:
    """Encodes one cell by the smallest networks."""
    config = SPAIRConfig(hidden=1, passthrough=1, what=1, object_size=2, encoder_hidden=(1,))
    model = SPAIR(config)
    latents, _ = model._sample(torch.ones(1, 3, 12, 12), training_wheels=False, generator=None)
    return latents.mean


def _convolve() -> Tensor:
    return convolve(_ones(1, 64, 64, 64), _ones(128, 64, 4, 4), _ones(128), 2)


def _render() -> Tensor:
    box = torch.tensor([[[0.0, 0.0, 2.0, 2.0]]])
    return render(_ones(1, 1, 2, 2, 4), box, _ones(1, 1), _ones(1, 1), _ones(1, 3, 2, 2))


KERNELS: dict[str, tuple[int, Callable[[], Tensor]]] = {
    _FORWARD: (50, _encode),
    "cells, backward": (50, _encode),
    "renderer": (27, _render),
    "count prior": (4, lambda: presence_kl(_ones(1, 1), torch.ones(1, 1), 0.5)),
    "appearance": (4, lambda: scaled_squash(_ones(1, 1), torch.ones(1), torch.ones(1))),
    _BERNOULLI: (7, lambda: bernoulli_cross_entropy(_ones(1, 1), torch.ones(1, 1), 1.0)),
    _NORMAL: (7, lambda: normal_nll(_ones(1, 1), torch.ones(1, 1), torch.ones(()))),
    "divergences": (
        7,
        lambda: weighted_kls(_ones(1, 1, 1), _ones(1, 1, 1), _ones(1, 1), (1, 0.0, 1.0)),
    ),
    _CONVOLUTIONS: (40, _convolve),
}
"""For each name the work of compiling, and a function that calls the kernel."""
