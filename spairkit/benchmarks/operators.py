"""Speed and memory of the operators, beside what a good torch user would write.

Every figure is a ratio taken in one run on one machine: the operator, the plain version in torch
(grid_sample over all objects; a loop over the cells), and torch.compile of that. The operator's own
checks run first, and nothing is timed when they fail.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from spairkit.backends import chosen_backend
from spairkit.benchmarks.plain import COPIES, presence_kl_by_loop, render_by_grid_sample
from spairkit.benchmarks.timing import free_bytes, peak_bytes, times_of
from spairkit.presence import presence_kl
from spairkit.rendering import render

Operator = Literal["render", "presence_kl"]
Function = Callable[..., Tensor]

SIDES = {16: 48, 64: 96, 144: 144, 576: 288}
"""Side of the image in pixels for each number of objects."""

_OBJECT_SIDE = 14  # texels, as in the paper
_UNROLLED = 64  # cells up to which torch.compile gets through the loop in sensible time


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator at one size."""

    operator: Operator
    batch: int
    objects: int
    """Objects of an image, or cells."""
    share_on: float = 0.1
    """Of the cells; the renderer draws all objects whatever their presence."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Time and memory of one way to compute a case, forward or forward and backward."""

    operator: Operator
    batch: int
    objects: int
    share_on: float
    backward: bool
    way: str
    """spairkit with its backend, or the rival."""
    median_ms: float | None
    """None: it was left out, and `note` says why."""
    p20_ms: float | None = None
    p80_ms: float | None = None
    repeats: int = 0
    ratio: float | None = None
    """Times slower than spairkit."""
    peak_bytes: int | None = None
    """Memory above what was there before; None where the system does not tell."""
    bandwidth: float | None = None
    """Bytes of inputs and outputs over the time, as a share of a plain copy's (GPU only)."""
    note: str = ""


def cases(operators: list[Operator], batches: list[int], objects: list[int]) -> list[Case]:
    """Every operator at every size; the KL with few cells on and with most."""
    found = []
    for operator in operators:
        for batch in batches:
            for number in objects:
                shares = (0.1, 0.9) if operator == "presence_kl" else (0.1,)
                found += [
                    Case(operator=operator, batch=batch, objects=number, share_on=share)
                    for share in shares
                ]
    return found


def run(
    chosen: list[Case], device: torch.device, *, compiled: bool, seconds: float
) -> Iterator[Figure]:
    """Checks the operators, then yields the figures as they come.

    Args:
        chosen: what to time.
        device: where.
        compiled: also time torch.compile of the rivals (minutes on a CPU, and needs a compiler).
        seconds: to spend on a figure, if three repeats do not take longer.

    Raises:
        RuntimeError: an operator is wrong on this machine; no figure has been taken.
    """
    for operator in {case.operator for case in chosen}:
        check(operator, device)
    copied = _copy_bandwidth(device, seconds) if device.type == "cuda" else None
    for case in chosen:
        inputs, count = _inputs(case, device)
        for backward in (False, True):
            ours: float | None = None
            for way, function, reason in _ways(case, device, compiled):
                labels = {**asdict(case), "backward": backward, "way": way}
                if reason:
                    yield Figure(**labels, median_ms=None, note=reason)
                    continue
                call = _call(function, inputs, count, backward)
                peak = peak_bytes(call, device)
                times = times_of(call, device, seconds)
                median = statistics.median(times)
                ours = median if ours is None else ours
                moved = _bytes(case, backward) / median if copied and way == "spairkit" else None
                yield Figure(
                    **labels,
                    median_ms=1e3 * median,
                    p20_ms=1e3 * times[len(times) // 5],
                    p80_ms=1e3 * times[len(times) * 4 // 5],
                    repeats=len(times),
                    ratio=median / ours,
                    peak_bytes=peak,
                    bandwidth=moved / copied if moved and copied else None,
                    note=chosen_backend("auto", inputs[0], "input") if way == "spairkit" else "",
                )


def check(operator: Operator, device: torch.device) -> None:
    """Compares operator and rival, values and gradients, with float64 in torch.

    Raises:
        RuntimeError: one of them is off; the message says which and by how much.
    """
    case = Case(operator=operator, batch=2, objects=16, share_on=0.5)
    inputs, count = _inputs(case, device)
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    for way, function in (("spairkit", _OURS[operator]), ("the rival", _RIVALS[operator])):
        found = _values_and_gradients(function, inputs, count)
        wanted = _values_and_gradients(_OURS[operator], exact, count)
        for actual, expected in zip(found, wanted, strict=True):
            error = float((actual.double() - expected).norm() / (expected.norm() + 1e-12))
            if not error < 1e-3:
                raise RuntimeError(f"{operator}: {way} is off by {error:.1e}, so nothing is timed")


_OURS: dict[Operator, Function] = {"render": render, "presence_kl": presence_kl}
_RIVALS: dict[Operator, Function] = {
    "render": render_by_grid_sample,
    "presence_kl": presence_kl_by_loop,
}
_RIVAL_NAMES: dict[Operator, str] = {"render": "grid_sample", "presence_kl": "loop"}


def _inputs(case: Case, device: torch.device) -> tuple[list[Tensor], int]:
    """Arguments of the operator, and how many of them, from the first, want gradients."""
    random = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    batch, objects = case.batch, case.objects
    if case.operator == "presence_kl":
        logits = 4 * uniform(batch, objects) - 2
        samples = (uniform(batch, objects) < case.share_on).float()
        tensors, count = [logits, samples, torch.tensor(0.98, dtype=torch.double)], 1
    else:
        side = SIDES[objects]
        # a grid of objects, shaken by a few pixels, of 12 to 20 pixels: as a trained model has it
        steps = int(objects**0.5)
        cell = side / steps
        axis = (torch.arange(steps) + 0.5) * cell
        centre = torch.cartesian_prod(axis, axis)[None] + 8 * uniform(batch, objects, 2) - 4
        half = 6 + 4 * uniform(batch, objects, 2)
        tensors, count = (
            [
                uniform(batch, objects, _OBJECT_SIDE, _OBJECT_SIDE, 4),
                torch.cat([centre - half, centre + half], -1),
                4 * uniform(batch, objects) - 2,
                0.1 + 0.9 * uniform(batch, objects),
                uniform(batch, 3, side, side),
            ],
            5,
        )
    tensors = [tensor.to(device) for tensor in tensors]
    return [t.requires_grad_(i < count) for i, t in enumerate(tensors)], count


def _values_and_gradients(function: Function, inputs: list[Tensor], count: int) -> list[Tensor]:
    value = function(*inputs)
    weights = torch.linspace(-1, 1, value.numel(), device=value.device).view_as(value)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), inputs[:count])]


def _ways(case: Case, device: torch.device, compiled: bool) -> Iterator[tuple[str, Function, str]]:
    """Name, function, and why it is left out, if it is; spairkit first."""
    yield "spairkit", _OURS[case.operator], ""
    name, rival = _RIVAL_NAMES[case.operator], _RIVALS[case.operator]
    reason = ""
    if case.operator == "render":
        needed = 4 * COPIES * case.batch * case.objects * SIDES[case.objects] ** 2
        if needed > 0.7 * free_bytes(device):
            reason = f"needs about {needed / 2**30:.0f} GiB"
    yield name, rival, reason
    if compiled:
        if case.operator == "presence_kl" and case.objects > _UNROLLED:
            reason = f"would unroll {case.objects} steps"
        yield f"compiled {name}", torch.compile(rival, dynamic=False), reason


def _call(
    function: Function, inputs: list[Tensor], count: int, backward: bool
) -> Callable[[], None]:
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                function(*inputs)

        return forward

    def both() -> None:
        torch.autograd.grad(function(*inputs).sum(), inputs[:count])

    return both


def _copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes a second, read and written, of a plain copy."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = times_of(lambda: target.copy_(source), device, seconds)
    return 2 * source.numel() * source.element_size() / statistics.median(times)


def _bytes(case: Case, backward: bool) -> int:
    """Of every input read once and every output written once, by each pass."""
    if case.operator == "presence_kl":
        cell = 4 + 4 + 4 + 8
        return case.batch * case.objects * (cell + (20 if backward else 0))
    pixels = case.batch * SIDES[case.objects] ** 2
    maps = case.batch * case.objects * (_OBJECT_SIDE**2 * 4 + 6)
    forward = 4 * (maps + pixels * (3 + 3 + 3 + 2))
    return forward + (4 * (2 * maps + pixels * (3 + 3 + 3 + 2 + 3)) if backward else 0)
