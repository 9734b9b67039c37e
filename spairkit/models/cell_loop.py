"""The loop over the cells of a batch as one compiled call, for float32.

The mathematics is that of `SPAIR.encode_wave`, which defines it and runs everywhere else. There a
wave takes about 90 small operations; `spairkit.kernels.cells_op` (Numba) and, in training only,
`spairkit.kernels.cells_triton_op` walk all waves in one call forward and one backward. With Numba
and without gradients a row has the same bits beside any other rows.
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from spairkit.backends import Backend, compiled_backend
from spairkit.config import SPAIRConfig
from spairkit.kernels.constants import BOX
from spairkit.models.glimpses import pixel_frames
from spairkit.models.latents import Latents, Noise, unpack
from spairkit.models.networks import LateralNetwork
from spairkit.models.parts import Part
from spairkit.models.wavefront import Wavefront

if TYPE_CHECKING:
    from spairkit.kernels import cells_layout
    from spairkit.kernels.cells_cpu import Grid, Numbers


def cells_backend(
    images: Tensor, encoder: nn.Sequential, relaxed: bool, backend: Backend = "auto"
) -> Literal["torch", "cpu", "triton"]:
    """The implementation of the loop over cells; "torch" is the plain loop.

    As `spairkit.backends.compiled_backend`. Numba needs a hidden layer in the encoder; Triton only
    trains. Neither has gradients to images, or through presences of 0 or 1.

    Raises:
        ValueError: as `chosen_backend`.
    """
    trains = torch.is_grad_enabled()
    if trains and (images.requires_grad or not relaxed):
        return "torch"
    chosen = compiled_backend(backend, images)
    fits = len(_lines(encoder)) > 1 if chosen == "cpu" else trains
    return chosen if fits else "torch"


def encode_cells(
    images: Tensor,  # [B, 3, H, W]
    products: Tensor,  # [B, K, 3 h] first layers applied to features, cells in raster order
    noise: Noise | None,
    edge: Tensor | None,  # [V] the object beyond the rim; None without lateral connections
    networks: tuple[LateralNetwork, LateralNetwork, LateralNetwork],  # where, depth, pres
    first: Sequence[Sequence[Tensor]],  # their first weights for context, and for own inputs
    encoder: nn.Sequential,
    config: SPAIRConfig,
    front: Wavefront,
    training_wheels: bool,
    relaxed: bool,
    part: Part | Sequence[Part] | None,
    backend: Literal["cpu", "triton"],
) -> Latents:
    """Latents in raster order, their means without noise; gradients reach all but images and noise.

    With training wheels only the weights of `encoder` get gradients, through what.

    Raises:
        RuntimeError: a second derivative was requested.
    """
    # the context has no columns without lateral connections, and where has no inputs of its own
    of_context, of_own = first
    weights = [torch.cat(list(of_context))]
    for network, own in zip(networks, of_own, strict=True):
        weights += [own]
        for line in (network.second, network.last):
            weights += [line.weight, line.bias]
    if training_wheels:
        # autograd has to know that they get no gradient
        weights = [weight.detach() for weight in weights]
        products, edge = products.detach(), None if edge is None else edge.detach()
    for line in _lines(encoder):
        weights += [line.weight, line.bias]
    products = products.to(images.dtype)  # from bfloat16, under autocast
    if noise is None:
        normal = images.new_zeros(*products.shape[:2], BOX + config.what + 1)
        jitter = images.new_zeros(products.shape[:2])
    else:
        normal, jitter = noise.normal, noise.logistic
    given = products, normal, jitter, edge, weights
    if backend == "cpu":
        from spairkit.kernels.cells_op import encode_cells_cpu

        numbers = _numbers(config, images, training_wheels, hard=not relaxed)
        frames = pixel_frames(images, part)
        latents = encode_cells_cpu(_grid(front), numbers, images, frames, *given)
    else:
        from spairkit.kernels.cells_triton_op import encode_cells_triton

        settings = _triton_numbers(config, images, training_wheels)
        latents = encode_cells_triton(settings, images, *given)
    return unpack(latents, config.what)


def _lines(encoder: nn.Sequential) -> list[nn.Linear]:
    return [module for module in encoder if isinstance(module, nn.Linear)]


@cache
def _grid(front: Wavefront) -> "Grid":
    """The schedule as arrays for the compiled loop."""
    from spairkit.kernels.cells_cpu import Grid

    starts = np.array([wave.start for wave in front.waves] + [len(front.order)], np.int64)
    order, neighbours, followers = front.order, front.neighbours, front.followers
    tables = order.numpy(), neighbours.numpy(), followers.numpy()
    return Grid(starts, *tables, largest=int(np.diff(starts).max()))


def _numbers(config: SPAIRConfig, images: Tensor, training_wheels: bool, hard: bool) -> "Numbers":
    """The settings for the compiled loop."""
    from spairkit.kernels.cells_cpu import Numbers

    # for y, x, h, w: scale and shift of placed = scale * sigmoid + shift, and pixels for each unit
    low, span = config.centre_min, config.centre_max - config.centre_min
    rows = ([span, span, 1.0, 1.0], [low, low, 0.0, 0.0], [config.cell] * 2 + [config.anchor] * 2)
    return Numbers(
        constants=np.array(rows, np.float32),
        columns=-(-images.shape[-1] // config.cell),
        size=config.object_size,
        temperature=np.float32(config.temperature),
        relu=config.activation == "relu",
        training_wheels=training_wheels,
        hard=hard,
        apart=not torch.is_grad_enabled(),
    )


def _triton_numbers(
    config: SPAIRConfig, images: Tensor, training_wheels: bool
) -> "cells_layout.Numbers":
    """The settings and the grid for the Triton loop."""
    from spairkit.kernels.cells_layout import Numbers

    height, width = images.shape[-2:]
    return Numbers(
        rows=-(-height // config.cell),
        columns=-(-width // config.cell),
        side=config.object_size,
        low=config.centre_min,
        span=config.centre_max - config.centre_min,
        cell=float(config.cell),
        anchor=config.anchor,
        temperature=config.temperature,
        relu=config.activation == "relu",
        training_wheels=training_wheels,
    )
