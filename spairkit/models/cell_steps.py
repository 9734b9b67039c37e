"""Elementwise steps of the loop over cells, between its matrix products, for the rows of a wave.

Letters as in `spairkit.models.cell_loop`, n the rows of a wave. A step fills its last arguments.

- `constants` [3, 4]: scale, shift and pixels for each unit of placed, of y, x, h, w
- `outputs` [n, ...] of a network: means, raws, features passed on; `grad_outputs` their gradients
- `normal`, `samples`, `grad_means`, `grad_raws`, `levers` [n, M]: where, what, depth
- `corners`, `boxes`, `grad_boxes`, `slope_placed` [n, 4]; `vectors`, `grad_vectors` [n, V]
- `depth_own` [n, S + 4 + A], `presence_own` [n, S + M]: the own inputs of depth and pres, which are
  features passed on, box, what, and for pres nearness; `grad_...` their gradients
- `logits`, `jitter`, `presence`, `slope_nearness` [n, 1]
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spairkit.boxes import xyxy_from_centre
from spairkit.kernels.constants import BOX, DEPTH_SCALE, LOGIT_LIMIT, STD_SCALE
from spairkit.models.densities import squash
from spairkit.models.wavefront import NEIGHBOURS

_WHERE, _WHAT, _DEPTH = slice(BOX), slice(BOX, -1), slice(-1, None)  # columns of samples


def wave_by_wave(
    sizes: list[int], step: Callable[..., None], *tensors: Tensor, fixed: tuple[Any, ...] = ()
) -> Callable[[int], None]:
    """A function of the wave's number that calls `step(*fixed, *rows)` with its rows of `tensors`.

    Built once for each pass: creating views inside the loop costs far more.
    """
    rows = by_wave(tensors, sizes)
    return lambda wave: step(*fixed, *rows[wave])


def by_wave(tensors: Sequence[Tensor], sizes: list[int]) -> list[tuple[Tensor, ...]]:
    """For each wave, of `sizes` rows, its rows of each tensor [R, ...]."""
    return list(zip(*(tensor.split_with_sizes(sizes) for tensor in tensors), strict=True))


def draw_where(
    constants: Tensor, outputs: Tensor, normal: Tensor, corners: Tensor,
    samples: Tensor, boxes: Tensor, depth_own: Tensor,
) -> None:  # fmt: skip
    """Samples where and places its box; passes box and features on to depth."""
    scale, shift, to_pixels = constants
    passed = outputs.shape[1] - 2 * BOX
    mean, raw, passed_on = outputs.split_with_sizes([BOX, BOX, passed], dim=1)
    sample = _draw(mean, raw, normal, samples, _WHERE)
    placed = torch.addcmul(shift, squash(sample), scale)  # b~_y, b~_x, h, w
    pixels = torch.addcmul(corners, placed, to_pixels)
    boxes.copy_(xyxy_from_centre(*pixels.split_with_sizes([2, 2], dim=1)))
    torch.cat([passed_on, placed], dim=1, out=depth_own[:, : passed + BOX])


def draw_what(outputs: Tensor, normal: Tensor, samples: Tensor, depth_own: Tensor) -> None:
    """Samples what and passes it on to depth."""
    mean, raw = outputs.chunk(2, dim=1)
    depth_own[:, -mean.shape[1] :] = _draw(mean, raw, normal, samples, _WHAT)


def draw_depth(
    outputs: Tensor, normal: Tensor, depth_own: Tensor, samples: Tensor, presence_own: Tensor
) -> None:
    """Samples depth; fills all own inputs of pres."""
    passed = outputs.shape[1] - 2
    mean, raw, passed_on = outputs.split_with_sizes([1, 1, passed], dim=1)
    nearness = DEPTH_SCALE * squash(-_draw(mean, raw, normal, samples, _DEPTH))
    torch.cat([passed_on, depth_own[:, passed:], nearness], dim=1, out=presence_own)


def draw_presence(
    temperature: float, logits: Tensor, jitter: Tensor, presence_own: Tensor,
    presence: Tensor, vectors: Tensor,
) -> None:  # fmt: skip
    """Samples pres; fills the object vectors."""
    logits = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    torch.add(jitter, logits, alpha=1 / temperature, out=presence).sigmoid_()
    placed = presence_own[:, presence_own.shape[1] - vectors.shape[1] + 1 :]
    torch.cat([placed, presence], dim=1, out=vectors)


def _draw(mean: Tensor, raw: Tensor, normal: Tensor, samples: Tensor, columns: slice) -> Tensor:
    """mean + 2 squash(raw) noise, written to columns of `samples`."""
    out = samples[:, columns]
    return torch.addcmul(mean, squash(raw), normal[:, columns], value=STD_SCALE, out=out)


def vector_back(
    grad_contexts: Tensor,  # [4 (R + B), V]
    uses: Tensor,  # [n, 4] rows of `grad_contexts` that belong to readers of the vector
    grad_vectors: Tensor,
) -> None:
    """The gradient of object vectors from later waves."""
    used = grad_contexts.index_select(0, uses.flatten())
    torch.sum(used.view(-1, len(NEIGHBOURS), used.shape[1]), dim=1, out=grad_vectors)


def depth_back(
    grad_presence_own: Tensor, slope_nearness: Tensor, grad_means: Tensor, grad_raws: Tensor,
    levers: Tensor, grad_vectors: Tensor, grad_outputs: Tensor,
) -> None:  # fmt: skip
    """From vectors and pres to the outputs of depth; `grad_vectors` then includes pres."""
    passed = grad_outputs.shape[1] - 2
    grad = grad_vectors[:, :-1].add_(grad_presence_own[:, passed:])
    grads = _moments_back(_DEPTH, grad[:, -1:] * slope_nearness, grad_means, grad_raws, levers)
    torch.cat([*grads, grad_presence_own[:, :passed]], dim=1, out=grad_outputs)


def what_back(
    grad_depth_own: Tensor, grad_means: Tensor, grad_raws: Tensor, levers: Tensor,
    grad_vectors: Tensor, grad_outputs: Tensor,
) -> None:  # fmt: skip
    """From vectors and depth to the outputs of the encoder; `grad_vectors` then includes depth."""
    passed = grad_depth_own.shape[1] + 2 - grad_vectors.shape[1]
    grad = grad_vectors[:, :-2].add_(grad_depth_own[:, passed:])
    grads = _moments_back(_WHAT, grad[:, BOX:], grad_means, grad_raws, levers)
    torch.cat(grads, dim=1, out=grad_outputs)


def where_back(
    constants: Tensor, grad_vectors: Tensor, grad_depth_own: Tensor, grad_boxes: Tensor,
    slope_placed: Tensor, grad_means: Tensor, grad_raws: Tensor, levers: Tensor,
    grad_outputs: Tensor,
) -> None:  # fmt: skip
    """From vectors and boxes to the outputs of where, with the features passed on to depth."""
    grad_high, grad_low = grad_boxes.flip(1).split_with_sizes([2, 2], dim=1)  # y, x
    # corners are centre -+ size / 2
    grad_pixels = torch.cat([grad_low + grad_high, (grad_high - grad_low) / 2], dim=1)
    grad = torch.addcmul(grad_vectors[:, :BOX], grad_pixels, constants[2]) * slope_placed
    grads = _moments_back(_WHERE, grad, grad_means, grad_raws, levers)
    passed = grad_depth_own[:, : grad_outputs.shape[1] - 2 * BOX]
    torch.cat([*grads, passed], dim=1, out=grad_outputs)


def _moments_back(
    columns: slice, grad: Tensor, grad_means: Tensor, grad_raws: Tensor, levers: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of means and raws, with `grad` added to those of their samples."""
    raws = torch.addcmul(grad_raws[:, columns], grad, levers[:, columns])
    return grad_means[:, columns] + grad, raws
