"""What the loop over cells does between matrix products: elementwise steps for the rows of a wave.

Shapes and letters are those of `spairkit.models.cell_loop`, n for a wave's rows. What a step
fills comes last. An own input holds what is passed on, the box, what, nearness.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spairkit.boxes import xyxy_from_centre
from spairkit.kernels.constants import BOX, DEPTH_SCALE, LOGIT_LIMIT, STD_SCALE
from spairkit.models.densities import squash
from spairkit.models.wavefront import NEIGHBOURS


def wave_by_wave(
    sizes: list[int], step: Callable[..., None], *tensors: Tensor, fixed: tuple[Any, ...] = ()
) -> Callable[[int], None]:
    """`step(*fixed, *rows)` by number of the wave, of so many rows; `tensors` are [R, ...].

    Made once a pass: views that are made in the loop cost much more.
    """
    rows = by_wave(tensors, sizes)
    return lambda wave: step(*fixed, *rows[wave])


def by_wave(tensors: Sequence[Tensor], sizes: list[int]) -> list[tuple[Tensor, ...]]:
    """For each wave its rows of each tensor."""
    return list(zip(*(tensor.split_with_sizes(sizes) for tensor in tensors), strict=True))


def draw_where(
    constants: Tensor,  # [3, 4] scale, shift, to_pixels
    outputs: Tensor,  # [n, 8 + S] means, raws, passed on
    normal: Tensor,  # [n, M]
    corners: Tensor,  # [n, 4]
    samples: Tensor,  # [n, M]
    boxes: Tensor,  # [n, 4]
    depth_own: Tensor,  # [n, S + 4 + A]
) -> None:
    """where, its box, and what is passed on to depth."""
    scale, shift, to_pixels = constants
    passed = outputs.shape[1] - 2 * BOX
    mean, raw, passed_on = outputs.split_with_sizes([BOX, BOX, passed], dim=1)
    sample = torch.addcmul(
        mean, squash(raw), normal[:, :BOX], value=STD_SCALE, out=samples[:, :BOX]
    )
    placed = torch.addcmul(shift, squash(sample), scale)  # b~_y, b~_x, h, w
    pixels = torch.addcmul(corners, placed, to_pixels)
    boxes.copy_(xyxy_from_centre(*pixels.split_with_sizes([2, 2], dim=1)))
    torch.cat([passed_on, placed], dim=1, out=depth_own[:, : passed + BOX])


def draw_what(
    outputs: Tensor,  # [n, 2 A] means, raws
    normal: Tensor,  # [n, M]
    samples: Tensor,  # [n, M]
    depth_own: Tensor,  # [n, S + 4 + A]
) -> None:
    """what."""
    mean, raw = outputs.chunk(2, dim=1)
    sample = torch.addcmul(
        mean, squash(raw), normal[:, BOX:-1], value=STD_SCALE, out=samples[:, BOX:-1]
    )
    depth_own[:, -mean.shape[1] :] = sample


def draw_depth(
    outputs: Tensor,  # [n, 2 + S] mean, raw, passed on
    normal: Tensor,  # [n, M]
    depth_own: Tensor,  # [n, S + 4 + A]
    samples: Tensor,  # [n, M]
    presence_own: Tensor,  # [n, S + 4 + A + 1]
) -> None:
    """depth, and all that pres reads of its own."""
    passed = outputs.shape[1] - 2
    mean, raw, passed_on = outputs.split_with_sizes([1, 1, passed], dim=1)
    sample = torch.addcmul(mean, squash(raw), normal[:, -1:], value=STD_SCALE, out=samples[:, -1:])
    nearness = DEPTH_SCALE * squash(-sample)
    torch.cat([passed_on, depth_own[:, passed:], nearness], dim=1, out=presence_own)


def draw_presence(
    temperature: float,
    logits: Tensor,  # [n, 1]
    jitter: Tensor,  # [n, 1]
    presence_own: Tensor,  # [n, S + 4 + A + 1]
    presence: Tensor,  # [n, 1]
    vectors: Tensor,  # [n, V]
) -> None:
    """pres and the object vector."""
    logits = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    torch.add(jitter, logits, alpha=1 / temperature, out=presence).sigmoid_()
    placed = presence_own[:, presence_own.shape[1] - vectors.shape[1] + 1 :]
    torch.cat([placed, presence], dim=1, out=vectors)


def vector_back(
    grad_contexts: Tensor,  # [4 (R + B), V]
    uses: Tensor,  # [n, 4] the rows of it where the row's vector is read
    grad_vectors: Tensor,  # [n, V]
) -> None:
    """The gradient that reaches object vectors from later waves."""
    used = grad_contexts.index_select(0, uses.flatten())
    torch.sum(used.view(-1, len(NEIGHBOURS), used.shape[1]), dim=1, out=grad_vectors)


def depth_back(
    grad_presence_own: Tensor,  # [n, S + M]
    slope_nearness: Tensor,  # [n, 1]
    grad_means: Tensor,  # [n, M] so far, as are the raws'
    grad_raws: Tensor,  # [n, M]
    levers: Tensor,  # [n, M]
    grad_vectors: Tensor,  # [n, V] from later waves, and then from pres too
    grad_outputs: Tensor,  # [n, 2 + S]
) -> None:
    """From vectors and pres to the outputs of depth."""
    passed = grad_outputs.shape[1] - 2
    grad = grad_vectors[:, :-1].add_(grad_presence_own[:, passed:])
    grads = _moments_back(
        slice(-1, None), grad[:, -1:] * slope_nearness, grad_means, grad_raws, levers
    )
    torch.cat([*grads, grad_presence_own[:, :passed]], dim=1, out=grad_outputs)


def what_back(
    grad_depth_own: Tensor,  # [n, S + M - 1]
    grad_means: Tensor,  # [n, M]
    grad_raws: Tensor,  # [n, M]
    levers: Tensor,  # [n, M]
    grad_vectors: Tensor,  # [n, V] as `depth_back` leaves it, and then from depth too
    grad_outputs: Tensor,  # [n, 2 A]
) -> None:
    """From vectors and depth to the outputs of the encoder."""
    passed = grad_depth_own.shape[1] + 2 - grad_vectors.shape[1]
    grad = grad_vectors[:, :-2].add_(grad_depth_own[:, passed:])
    grads = _moments_back(slice(BOX, -1), grad[:, BOX:], grad_means, grad_raws, levers)
    torch.cat(grads, dim=1, out=grad_outputs)


def where_back(
    constants: Tensor,  # [3, 4] scale, shift, to_pixels
    grad_vectors: Tensor,  # [n, V] as `what_back` leaves it
    grad_depth_own: Tensor,  # [n, S + M - 1]
    grad_boxes: Tensor,  # [n, 4]
    slope_placed: Tensor,  # [n, 4]
    grad_means: Tensor,  # [n, M]
    grad_raws: Tensor,  # [n, M]
    levers: Tensor,  # [n, M]
    grad_outputs: Tensor,  # [n, 8 + S]
) -> None:
    """From vectors and boxes to the outputs of where, and what depth was passed."""
    grad_high, grad_low = grad_boxes.flip(1).split_with_sizes([2, 2], dim=1)  # y, x
    # corners are centre -+ size / 2
    grad_pixels = torch.cat([grad_low + grad_high, (grad_high - grad_low) / 2], dim=1)
    grad = torch.addcmul(grad_vectors[:, :BOX], grad_pixels, constants[2]) * slope_placed
    grads = _moments_back(slice(BOX), grad, grad_means, grad_raws, levers)
    passed = grad_depth_own[:, : grad_outputs.shape[1] - 2 * BOX]
    torch.cat([*grads, passed], dim=1, out=grad_outputs)


def _moments_back(
    columns: slice, grad: Tensor, grad_means: Tensor, grad_raws: Tensor, levers: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of means and raws, now that `grad` has reached their samples too."""
    raws = torch.addcmul(grad_raws[:, columns], grad, levers[:, columns])
    return grad_means[:, columns] + grad, raws
