"""Compiles the CPU kernels of training before their first use, so that progress can be shown.

Each kernel runs once on the smallest input there is, which compiles it or loads it from the cache.
"""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spairkit.kernels.constants import BOX


class Compiling(NamedTuple):
    """A kernel that is about to be compiled."""

    done: int
    """Work behind it, in the units of `total`: about a tenth of a second each, without a cache."""
    total: int
    name: str


def warm_up(names: Collection[str] | None = None) -> Iterator[Compiling]:
    """Compiles kernels one after the other; each is announced before the work on it begins.

    Args:
        names: of `KERNELS`; all by default.

    Raises:
        KeyError: there is no kernel of a name.
    """
    steps = [(name, *KERNELS[name]) for name in (KERNELS if names is None else names)]
    total, done = sum(work for _, work, _ in steps), 0
    for name, work, run in steps:
        yield Compiling(done, total, name)
        with torch.enable_grad():
            run()
        done += work


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float32)


def _cells_forward() -> Tensor:
    from spairkit.kernels.cells_cpu import Grid, Numbers
    from spairkit.kernels.cells_op import encode_cells_cpu

    # one cell, and one unit of everything else: h, A and S of `cells_cpu`
    size, passed, side = BOX + 2, 1, 2
    vector = size + 1
    beyond = np.ones((1, 4), np.int64)
    grid = Grid(np.array([0, 1]), np.array([0]), beyond, beyond, 1)
    numbers = Numbers(np.ones((3, 4), np.float32), 1, side, np.float32(1.0), True, False)
    weights = [_ones(3, 4 * vector)]
    heads = [(0, 2 * BOX + passed), (passed + BOX + 1, 2 + passed), (passed + size, 1)]
    for own, outputs in heads:
        weights += [_ones(1, own), _ones(1, 1), _ones(1), _ones(outputs, 1), _ones(outputs)]
    weights += [_ones(1, 3 * side * side), _ones(1), _ones(2, 1), _ones(2)]
    weights = [weight.requires_grad_() for weight in weights]
    images, products = _ones(1, 3, 4, 4), _ones(1, 1, 3)
    noise = _ones(1, 1, size), _ones(1, 1)
    return encode_cells_cpu(grid, numbers, images, products, *noise, _ones(vector), weights)


def _render() -> None:
    from spairkit.kernels.render_cpu import render_backward_cpu, render_cpu

    boxes = torch.tensor([[[0.0, 0.0, 2.0, 2.0]]], dtype=torch.float32)
    inputs = _ones(1, 1, 2, 2, 4), boxes, _ones(1, 1), _ones(1, 1), _ones(1, 3, 2, 2)
    image, change, inverse, keep = render_cpu(*inputs, 0.0)
    render_backward_cpu(image, *inputs, change, inverse, keep, 0.0)


def _presence() -> None:
    from spairkit.kernels.presence_cpu import presence_kl_cpu

    presence_kl_cpu(_ones(1, 1), _ones(1, 1), torch.tensor(0.5, dtype=torch.float64))


def _appearance() -> None:
    from spairkit.kernels.appearance_cpu import squash_backward_cpu, squash_cpu

    inputs = _ones(1, 1), _ones(1), _ones(1)
    values = squash_cpu(*inputs)
    squash_backward_cpu(values, values, *inputs)


def _likelihood() -> None:
    from spairkit.kernels.likelihood_cpu import cross_entropy_backward_cpu, cross_entropy_cpu

    sums = cross_entropy_cpu(_ones(1, 1), _ones(1, 1), 1.0)
    cross_entropy_backward_cpu(sums, sums, _ones(1, 1), _ones(1, 1), 1.0)


def _divergences() -> None:
    from spairkit.kernels.normal_kl_cpu import weighted_kls_backward_cpu, weighted_kls_cpu

    inputs, group = (_ones(1, 1, 1), _ones(1, 1, 1), _ones(1, 1)), (1, 0.0, 1.0)
    sums = weighted_kls_cpu(*inputs, group)
    weighted_kls_backward_cpu(sums, sums, *inputs, group)


def _convolutions() -> None:
    from spairkit.kernels.convolution_cpu import convolve_backward_cpu, convolve_cpu

    inputs = _ones(1, 1, 4, 4), _ones(1, 1, 4, 4), _ones(1)
    values = convolve_cpu(*inputs)
    convolve_backward_cpu(values, values, *inputs)


KERNELS: dict[str, tuple[int, Callable[[], object]]] = {
    "cells, forward": (50, _cells_forward),
    "cells, backward": (50, lambda: _cells_forward().sum().backward()),
    "renderer": (27, _render),
    "count prior": (4, _presence),
    "appearance": (4, _appearance),
    "likelihood": (7, _likelihood),
    "divergences": (7, _divergences),
    "convolutions": (38, _convolutions),
}
"""What to compile by name: the work that it takes, and a function that causes it."""
