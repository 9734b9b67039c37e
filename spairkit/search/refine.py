"""Refinement: gradient descent on all latents of the present objects at once."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from spairkit.models.slots import Slots
from spairkit.search.energy import Energy, Scene
from spairkit.search.iterations import Work, advanced

CHECK_EVERY = 5
"""Iterations between two looks at the energies, which wait for the device."""

_PATIENCE = 4.0  # an image gives up if so many further falls like the last one miss its target


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
    enough = tolerance * moves.sum((1, 2)).clamp(min=1)
    work = Work.of(scene, slots, moves)
    for start in range(0, most, CHECK_EVERY):
        step = min(start + CHECK_EVERY, most)
        work = advanced(energy, work, range(start + 1, step + 1))
        if on_check is not None:
            on_check(step / most)
        fell = work.high - work.here
        going = (fell > enough) & (work.here - _PATIENCE * fell < goal) & (step < most)
        work = replace(work, high=work.value)
        if bool(going.all()):
            continue
        latents[rows[~going]], lowest[rows[~going]] = work.best[~going], work.here[~going]
        if not bool(going.any()):
            break
        rows, goal, enough = (x[going] for x in (rows, goal, enough))
        work = work.select(going)
    return slots.changed(latents), lowest
