"""The Triton loop over cells: where the numbers of a cell lie, and which products it takes.

All numbers of a cell, [R = B K rows in raster order], lie side by side in one record, and their
gradients in the same columns of another. A segment may continue another: the features that where
passes on are the first inputs of depth, and those of depth the first inputs of pres.

    contexts   4 V         object vectors of the four earlier neighbours; none without them
    first      3 h         first layers of where, depth and pres
    where      h, 8 + S    second and last layer: moments of the box, features passed on
               4 + A       with the features the inputs of depth: box in cells and anchors, what
    depth      h, 2 + S    as where, with the moments of depth
               5 + A       with the features the inputs of pres: box, what, nearness
    glimpse    C P P
    encoder    each layer
    pres       h, 1        second and last layer

The products of a cell are data: both kernels walk a table, and serve networks of any depth.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from spairkit.kernels.constants import BOX

_ALIGNMENT = 16  # floats
HEADS = 3  # where, depth, pres
OF_HEAD = 5  # weights of each: own, then weight and bias of the second and of the last layer

BIAS, ADDED, PRODUCT = range(3)
"""What joins the products of a layer: a bias, what its outputs hold already, or `products`."""

NOTHING, WHERE, WHAT, DEPTH, PRES = range(5)
"""What is drawn from the outputs of a layer; in the backward pass the order is reversed."""


class Forward(NamedTuple):
    """One layer of the forward pass: outputs = activation(inputs @ weight.T + the rest)."""

    left: int  # column of the inputs
    inputs: int
    weight: int  # offset in the flat weights
    out: int  # column of the outputs
    outputs: int
    rest: int  # BIAS, ADDED or PRODUCT
    bias: int  # offset in the flat weights
    activated: int  # so many of the outputs have the activation
    then: int  # what is drawn


class Backward(NamedTuple):
    """One layer of the backward pass: gradient of inputs = gradient of outputs @ weight."""

    left: int  # column of the outputs, and of their gradient before the activation
    inputs: int  # number of outputs
    weight: int
    out: int  # column of the inputs
    outputs: int  # number of inputs
    is_activated: int  # whether the inputs are the activated outputs of a layer below
    before: int  # what was drawn from the outputs


class Numbers(NamedTuple):
    """Settings of the config, and the grid."""

    rows: int
    columns: int
    side: int  # of a glimpse
    low: float  # a box's centre in its cell is low + span * sigmoid(z), in cells
    span: float
    cell: float  # pixels
    anchor: float  # pixels
    temperature: float
    relu: bool  # or celu
    training_wheels: bool


class Columns(NamedTuple):
    """First column of each segment of the record; of a network, those of its layers."""

    contexts: int
    first: int
    where: tuple[int, int]
    depth: tuple[int, int]
    glimpse: int
    encoder: tuple[int, ...]
    pres: tuple[int, int]
    width: int


class Sizes(NamedTuple):
    """Numbers of units."""

    context: int  # 4 V, or 0 without lateral connections
    hidden: int
    passed: int
    what: int
    glimpse: int  # numbers of a glimpse
    encoder: tuple[int, ...]  # outputs of each layer

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> "Sizes":
        """From weights in the order of `spairkit.kernels.cells_op`."""
        context, *rest = weights
        encoder = rest[HEADS * OF_HEAD :: 2]
        return cls(
            context=context.shape[1],
            hidden=len(context) // HEADS,
            passed=len(rest[3]) - 2 * BOX,
            what=len(encoder[-1]) // 2,
            glimpse=encoder[0].shape[1],
            encoder=tuple(len(weight) for weight in encoder),
        )

    @property
    def own(self) -> tuple[int, int]:
        """Inputs of depth and of pres, besides those that they share."""
        inputs = self.passed + BOX + self.what
        return inputs, inputs + 1


@cache
def columns(sizes: Sizes) -> Columns:
    """The record of a cell; segments begin at multiples of 16."""
    end = 0

    def segment(width: int) -> int:
        nonlocal end
        begin = end
        end = begin + _padded(width)
        return begin

    depth, pres = sizes.own
    return Columns(
        contexts=segment(sizes.context),
        first=segment(HEADS * sizes.hidden),
        where=(segment(sizes.hidden), segment(2 * BOX + depth)),
        depth=(segment(sizes.hidden), segment(2 + pres)),
        glimpse=segment(sizes.glimpse),
        encoder=tuple(segment(outputs) for outputs in sizes.encoder),
        pres=(segment(sizes.hidden), segment(1)),
        width=end,
    )


class _Layer(NamedTuple):
    """A layer with columns of inputs and outputs; its weight is a number in the order of all."""

    left: int
    inputs: int
    weight: int
    out: int
    outputs: int
    rest: int
    draws: int
    stacked: bool  # whether its inputs are the outputs of a layer below


def _layers(sizes: Sizes) -> list[_Layer]:
    """All layers in the order in which they run, the context first."""
    at, h = columns(sizes), sizes.hidden
    layers = [_Layer(at.contexts, sizes.context, 0, at.first, HEADS * h, PRODUCT, NOTHING, False)]

    def head(number: int, begin: int, out: tuple[int, int], outputs: int, draws: int) -> None:
        weight = 1 + OF_HEAD * number
        below = at.first + number * h
        if number > 0:
            inputs = sizes.own[number - 1]
            layers.append(_Layer(begin, inputs, weight, below, h, ADDED, NOTHING, False))
        layers.append(_Layer(below, h, weight + 1, out[0], h, BIAS, NOTHING, True))
        layers.append(_Layer(out[0], h, weight + 3, out[1], outputs, BIAS, draws, True))

    head(0, 0, at.where, 2 * BOX + sizes.passed, WHERE)
    begin, inputs = at.glimpse, sizes.glimpse
    for i, (out, outputs) in enumerate(zip(at.encoder, sizes.encoder, strict=True)):
        weight = 1 + HEADS * OF_HEAD + 2 * i
        draws = WHAT if i == len(at.encoder) - 1 else NOTHING
        layers.append(_Layer(begin, inputs, weight, out, outputs, BIAS, draws, i > 0))
        begin, inputs = out, outputs
    head(1, at.where[1] + 2 * BOX, at.depth, 2 + sizes.passed, DEPTH)
    head(2, at.depth[1] + 2, at.pres, 1, PRES)
    return layers


class Packing(NamedTuple):
    """Where a weight [outputs, inputs] lies, and where its packed forms do."""

    weight: int
    outputs: int
    inputs: int
    forward: int  # [inputs, outputs]
    backward: int  # [outputs, inputs]


class Tables(NamedTuple):
    """What the kernels walk, as int32 on the device."""

    forward: Tensor  # [L, 9] `Forward`
    backward: Tensor  # [L, 7] `Backward`, from the last layer on
    packing: Tensor  # [L, 5] `Packing`
    forward_size: int  # of all packed weights
    backward_size: int


@cache  # without limit: a recorded CUDA graph reads from their addresses
@torch.inference_mode(False)  # the cache outlives the mode
def tables(
    sizes: Sizes, numbers: tuple[int, ...], training_wheels: bool, device: torch.device
) -> Tables:
    """The layers in order, and in the reverse order those that get gradients.

    Args:
        sizes: of the networks.
        numbers: of each weight, flat.
        training_wheels: whether only the encoder gets gradients.
        device: of the tables.
    """
    starts = [sum(numbers[:i]) for i in range(len(numbers))]
    forward, backward, packing = [], [], []
    size = back_size = 0
    for layer in _layers(sizes):
        bias = starts[layer.weight + 1] if layer.rest == BIAS else 0
        # where has no inputs of its own: its first layer is activated with the context's product
        activated = sizes.hidden if layer.rest == PRODUCT else layer.outputs
        rest = layer.rest, bias, 0 if layer.draws else activated, layer.draws
        out = layer.out, layer.outputs
        forward.append(Forward(layer.left, layer.inputs, size, *out, *rest))
        of_encoder = layer.weight > HEADS * OF_HEAD
        if (of_encoder or not training_wheels) and layer.inputs:
            ends = training_wheels and not layer.stacked
            back = layer.left, 0 if ends else layer.inputs, int(layer.stacked), layer.draws
            backward.append(Backward(*out, back_size, *back))
        shape = layer.outputs, layer.inputs
        packing.append(Packing(starts[layer.weight], *shape, size, back_size))
        size += layer.inputs * _padded(layer.outputs)
        back_size += layer.outputs * _padded(layer.inputs)

    def on_device(table: Sequence[tuple[int, ...]]) -> Tensor:
        return torch.tensor(table, dtype=torch.int32, device=device)

    layers = on_device(forward), on_device(backward[::-1])
    return Tables(*layers, on_device(packing), size, back_size)


def _padded(width: int) -> int:
    return -(-width // _ALIGNMENT) * _ALIGNMENT


def weight_gradients(
    sizes: Sizes,
    record: Tensor,  # [R, width]
    grads: Tensor,  # [R, width]
    dtype: torch.dtype,
    training_wheels: bool,
) -> list[Tensor | None]:
    """Gradients in the order of the weights: one product a layer over all rows, one sum for all.

    With training wheels only those of the encoder. Products take their factors in `dtype`.
    """
    sums = grads.sum(0)
    rounded, inputs = grads.to(dtype), record.to(dtype)
    result: list[Tensor | None] = [None] * (1 + HEADS * OF_HEAD + 2 * len(sizes.encoder))
    if not training_wheels:
        result[1] = grads.new_zeros(sizes.hidden, 0)
    for layer in _layers(sizes):
        if training_wheels and layer.weight <= HEADS * OF_HEAD:
            continue
        grad = rounded[:, layer.out : layer.out + layer.outputs].t()
        product = grad @ inputs[:, layer.left : layer.left + layer.inputs]
        result[layer.weight] = product.to(grads.dtype)
        if layer.rest == BIAS:
            result[layer.weight + 1] = sums[layer.out : layer.out + layer.outputs]
    return result
