"""Speed and memory of the operators compared with plain torch: `spairkit bench`."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from spairkit.backends import chosen_backend
from spairkit.benchmarks import timing
from spairkit.benchmarks.plain import COPIES, presence_kl_by_loop, render_by_grid_sample
from spairkit.benchmarks.timing import Figure
from spairkit.presence import presence_kl
from spairkit.rendering import render

Function = Callable[..., Tensor]
Case = tuple[str, int, int]
"""An operator, the number of images, and the objects of each, or its cells for a KL."""

WAYS: dict[str, dict[str, Function]] = {
    "render": {"spairkit": render, "grid_sample": render_by_grid_sample},
    "presence_kl": {"spairkit": presence_kl, "loop": presence_kl_by_loop},
    "presence_kl_relaxed": {
        "spairkit": partial(presence_kl, relaxed=True),
        "loop": partial(presence_kl_by_loop, relaxed=True),
    },
}
"""The implementations of each operator, spairkit's first."""

SIDES = {16: 48, 64: 96, 144: 144, 576: 288}
"""Side of the image in pixels for each number of objects."""

_OBJECT_SIDE = 14  # texels, as in the paper
_SHARE_ON = 0.1  # of the cells
_TOLERANCE = 1e-3  # of the norm
_LEAST_NORM = 0.1  # gradients of depth nearly cancel for few objects
# Pixels. A small image keeps float64 fast, and at this size no pixel lies on the edge between two
# texels, where the gradient of a box jumps with the last bit of float32.
_CHECKED_SIDE = 40


def run(
    cases: list[Case], device: torch.device, seconds: float, report: Callable[[str], None]
) -> Iterator[Figure]:
    """Checks the operators, then yields each figure as soon as it is measured.

    At least `seconds` are spent on each figure. `report` receives a line at the start of each step.
    Raises RuntimeError before anything is timed if an operator gives wrong results here.
    """
    for operator, objects in dict.fromkeys((operator, objects) for operator, _, objects in cases):
        report(f"{operator} of {objects}: checking")
        check(operator, objects, device)
    copied = _copy_bandwidth(device, seconds) if device.type == "cuda" else None
    for case in cases:
        operator, batch, objects = case
        inputs = _inputs(case, device, SIDES[objects])
        for backward in (False, True):
            passes = "forward + backward" if backward else "forward"
            name = f"{operator} {batch}x{objects}, {passes}"
            ours = 0.0  # ms
            for way, function in WAYS[operator].items():
                planes = COPIES * batch * objects if way == "grid_sample" else 0
                needed = 4 * planes * SIDES[objects] ** 2
                if needed > 0.7 * timing.free_bytes(device):
                    report(f"{name}: skipping {way}, which needs about {needed / 2**30:.0f} GiB")
                    continue
                report(f"{name}: timing {way}")
                call = _call(function, inputs, backward)
                peak = timing.peak_mib(call, device)
                clock, note = timing.device_clock(call, device)
                if way == "spairkit":
                    note = f"{chosen_backend('auto', inputs[0], 'input')} {note}".strip()
                taken = timing.take_turns({way: clock}, seconds)[way]
                ours = ours or taken["median_ms"]
                times = taken["median_ms"] / ours
                rate = _bytes(case, backward) / taken["median_ms"] / 1e6
                more = {"GB/s": rate, "% of a copy": 100 * rate / copied} if copied else {}
                yield Figure(
                    case=name, way=way, times=times, peak_mib=peak, note=note, more=more, **taken
                )


def check(operator: str, objects: int, device: torch.device) -> None:
    """Compares values and gradients of all implementations with plain torch in float64.

    Two images hold `objects` each, because the tiling of the kernels depends on that number.
    Raises RuntimeError where they differ.
    """
    inputs = _inputs((operator, 2, objects), device, _CHECKED_SIDE)
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    wanted = _values_and_gradients(list(WAYS[operator].values())[-1], exact)
    for way, function in WAYS[operator].items():
        for found, expected in zip(_values_and_gradients(function, inputs), wanted, strict=True):
            error = float((found - expected).norm() / (expected.norm() + _LEAST_NORM))
            if not error <= _TOLERANCE:
                raise RuntimeError(
                    f"{operator} of {objects}: {way} differs from plain torch in float64 by "
                    f"{error:.1e}; nothing was timed"
                )


def _inputs(case: Case, device: torch.device, side: int) -> list[Tensor]:
    """Arguments of the operator; the differentiable ones require gradients."""
    random = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    operator, batch, objects = case
    if operator == "render":
        # objects of 12 to 20 pixels, up to 4 pixels off a regular grid, as in a trained model
        steps = int(objects**0.5)
        axis = (torch.arange(steps) + 0.5) * side / steps
        centre = torch.cartesian_prod(axis, axis)[None] + 8 * uniform(batch, objects, 2) - 4
        half = 6 + 4 * uniform(batch, objects, 2)
        maps = uniform(batch, objects, _OBJECT_SIDE, _OBJECT_SIDE, 4)
        depth, presence = 4 * uniform(batch, objects) - 2, 0.1 + 0.9 * uniform(batch, objects)
        boxes = torch.cat([centre - half, centre + half], -1)
        tensors, leaves = [maps, boxes, depth, presence, uniform(batch, 3, side, side)], 5
    else:
        logits, chance = 4 * uniform(batch, objects) - 2, uniform(batch, objects)
        samples, leaves = (chance < _SHARE_ON).float(), 1
        if operator == "presence_kl_relaxed":
            # binary Concrete samples of temperature 1, away from 0 and 1
            odds = torch.logit(torch.tensor(_SHARE_ON))
            samples, leaves = torch.sigmoid(odds + torch.logit(0.001 + 0.998 * chance)), 2
        tensors = [logits, samples, torch.tensor(0.98, dtype=torch.double)]
    return [t.to(device).requires_grad_(i < leaves) for i, t in enumerate(tensors)]


def _values_and_gradients(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    value = function(*inputs)
    weights = torch.linspace(-1, 1, value.numel(), device=value.device).view_as(value)
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)]


def _call(function: Function, inputs: list[Tensor], backward: bool) -> timing.Call:
    if not backward:
        return torch.no_grad()(lambda: function(*inputs))
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    return lambda: torch.autograd.grad(function(*inputs).sum(), leaves)


def _copy_bandwidth(device: torch.device, seconds: float) -> float:
    """GB read and written per second by a plain copy on the device."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    clock, _ = timing.device_clock(lambda: target.copy_(source), device)
    taken = timing.take_turns({"copy": clock}, seconds)["copy"]
    return 2 * source.nbytes / float(taken["median_ms"]) / 1e6


def _bytes(case: Case, backward: bool) -> int:
    """Every input read once and every output written once, in each pass."""
    operator, batch, objects = case
    if operator != "render":
        back = 20 if operator == "presence_kl" else 28
        return batch * objects * (20 + (back if backward else 0))
    pixels, maps = batch * SIDES[objects] ** 2, batch * objects * (_OBJECT_SIDE**2 * 4 + 6)
    return 4 * (maps + 11 * pixels) + (4 * (2 * maps + 14 * pixels) if backward else 0)
