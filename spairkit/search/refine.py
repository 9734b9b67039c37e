"""Refinement: gradient descent on all latents of the present objects at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from spairkit.models.slots import Slots
from spairkit.search.energy import Energy, Scene

CHECK_EVERY = 5
"""Iterations between two looks at the energies, which wait for the device."""

_PATIENCE = 4.0  # an image gives up if so many further falls like the last one miss its target
_RATE, _RATE_DECAY, _LEAST_RATE = 0.1, 0.97, 0.02
_MOMENTUM, _SCALE_MEMORY, _EPSILON = 0.8, 0.95, 1e-3  # Adam's


def refine(
    energy: Energy,
    scene: Scene,
    slots: Slots,
    free: Tensor | None = None,  # [B, N]
    *,
    tolerance: float,
    most: int,
    target: Tensor | None = None,  # [B]
    on_check: Callable[[float], None] | None = None,
) -> tuple[Slots, Tensor]:
    """Lowers the energy by Adam until it has converged, each image by itself.

    An image has converged when its energies of the last `CHECK_EVERY` iterations all lie within
    `tolerance` for each object that may change, or for one, of the lowest so far. The images that
    have not go on without the others.

    Args:
        free: 1 for the objects that may change, else 0; None: all.
        tolerance: nats.
        most: iterations, at most; 0 only measures the energy.
        target: an image also ends when it is unlikely to come below this energy, nats.
        on_check: called every `CHECK_EVERY` iterations with the share of `most` that is done.

    Returns:
        The state of each image with the lowest energy, and that energy [B] in nats.
    """
    if most == 0:
        with torch.no_grad():
            return slots, energy(scene, slots)
    latents, lowest = slots.latents.clone(), torch.full_like(slots.count, torch.inf)
    rows = torch.arange(len(latents), device=latents.device)  # images that go on
    goal = torch.full_like(lowest, torch.inf) if target is None else target
    moves = (slots.present if free is None else free * slots.present)[..., None]
    now, best, here, high = latents.clone(), latents.clone(), lowest.clone(), -lowest
    enough = tolerance * moves.sum((1, 2)).clamp(min=1)
    mean, scale = torch.zeros_like(now), torch.zeros_like(now)
    view, part = scene, slots
    for step in range(1, most + 1):
        now.requires_grad_()
        with torch.enable_grad():
            value = energy(view, part.changed(now))
            (gradient,) = torch.autograd.grad(value.sum(), now)
        now, value = now.detach(), value.detach()
        best = torch.where((value < here)[:, None, None], now, best)
        here, high = torch.minimum(value, here), torch.maximum(value, high)
        gradient = gradient * moves
        # not torch.lerp, which rounds the last few elements by other code than the rest
        mean = _MOMENTUM * mean + (1 - _MOMENTUM) * gradient
        scale = _SCALE_MEMORY * scale + (1 - _SCALE_MEMORY) * gradient.square()
        rate = max(_RATE * _RATE_DECAY**step, _LEAST_RATE) / (1 - _MOMENTUM**step)
        now = now - rate * mean / ((scale / (1 - _SCALE_MEMORY**step)).sqrt() + _EPSILON)
        if step % CHECK_EVERY and step < most:
            continue
        if on_check is not None:
            on_check(step / most)
        fell = high - here
        going = (fell > enough) & (here - _PATIENCE * fell < goal) & (step < most)
        high = value
        if bool(going.all()):
            continue
        latents[rows[~going]], lowest[rows[~going]] = best[~going], here[~going]
        if not bool(going.any()):
            break
        rows, goal, enough, moves = (x[going] for x in (rows, goal, enough, moves))
        high, here = high[going], here[going]
        now, best, mean, scale = (x[going] for x in (now, best, mean, scale))
        view, part = view.select(going), part.select(going)
    return slots.changed(latents), lowest
