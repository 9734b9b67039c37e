"""Speed and memory of the operators, beside what a good torch user would write.

Every figure is a ratio taken in one run on one machine: the operator, the plain version in torch
(grid_sample over all objects; a loop over the cells), and torch.compile of that. Each operator is
checked first with as many objects as will be timed, and nothing is timed when it is wrong.
"""

import functools
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

Operator = Literal["render", "presence_kl", "presence_kl_relaxed"]
"""The KL of hard samples looks the prior up in a table; that of relaxed ones walks the cells."""

Function = Callable[..., Tensor]

SIDES = {16: 48, 64: 96, 144: 144, 576: 288}
"""Side of the image in pixels for each number of objects."""

_OBJECT_SIDE = 14  # texels, as in the paper
_UNROLLED = 64  # cells up to which torch.compile gets through the loop in sensible time

# what the tests allow against float64: of the image, at worst; of a KL, by its norm
_VALUE_BARS: dict[Operator, float] = {
    "render": 2e-5,
    "presence_kl": 1e-6,
    "presence_kl_relaxed": 1e-4,
}
_GRADIENT_BAR = 1e-4  # of the norm ...
_GRADIENT_FLOOR = 0.1  # ... and this: of few objects the gradients of depth all but cancel
_RIVAL_BAR = 1e-3  # of the norm: float32 loses more the plain way, 5e-5 in the loop of 576 cells
# pixels: float64 in torch takes a minute for 576 objects at their own size; and at this one no
# pixel lies on a kink between texels, where gradients of boxes jump with the last bit of float32
_CHECKED_SIDE = 40


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
    bytes_per_second: float | None = None
    """Bytes of inputs and outputs over the time (GPU only) ..."""
    copy_bytes_per_second: float | None = None
    """... the same of a plain copy, measured in this run ..."""
    bandwidth: float | None = None
    """... and the first as a share of the second."""
    note: str = ""


def describe(case: Case | Figure, backward: bool) -> str:
    """A case in words, as render 32x16, forward + backward."""
    passes = "forward + backward" if backward else "forward"
    share = "" if case.operator == "render" else f", {case.share_on:.0%} on"
    return f"{case.operator} {case.batch}x{case.objects}{share}, {passes}"


def cases(operators: list[Operator], batches: list[int], objects: list[int]) -> list[Case]:
    """Every operator at every size; the KLs with few cells on and with most."""
    found = []
    for operator in operators:
        for batch in batches:
            for number in objects:
                shares = (0.1,) if operator == "render" else (0.1, 0.9)
                found += [
                    Case(operator=operator, batch=batch, objects=number, share_on=share)
                    for share in shares
                ]
    return found


def run(
    chosen: list[Case],
    device: torch.device,
    *,
    compiled: bool,
    seconds: float,
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[Figure]:
    """Checks the operators, then yields the figures as they come.

    Args:
        chosen: what to time.
        device: where.
        compiled: also time torch.compile of the rivals (minutes on a CPU, and needs a compiler);
            one that it cannot compile whole gets no figure but a note.
        seconds: to spend on a figure, if three repeats do not take longer.
        report: is told what begins, never while a clock runs.

    Raises:
        RuntimeError: an operator is wrong on this machine; no figure has been taken.
    """
    for operator, objects in dict.fromkeys((case.operator, case.objects) for case in chosen):
        report(f"{operator} of {objects}: checking")
        check(operator, objects, device)
    copied = _copy_bandwidth(device, seconds) if device.type == "cuda" else None
    for case in chosen:
        inputs, count = _inputs(case, device, SIDES[case.objects])
        for backward in (False, True):
            ours: float | None = None
            for way, function, reason in _ways(case, device, compiled):
                labels = {**asdict(case), "backward": backward, "way": way}
                if reason:
                    yield Figure(**labels, median_ms=None, note=reason)
                    continue
                report(f"{describe(case, backward)}: timing {way}")
                call = _call(function, inputs, count, backward)
                try:
                    peak = peak_bytes(call, device)
                except Exception as error:
                    # whatever a compiler raises, the other ways are still worth timing
                    if not way.startswith("compiled "):
                        raise
                    reason = f"not compiled: {type(error).__name__}: {str(error).splitlines()[0]}"
                    yield Figure(**labels, median_ms=None, note=reason)
                    continue
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
                    bytes_per_second=moved,
                    copy_bytes_per_second=copied if moved else None,
                    bandwidth=moved / copied if moved and copied else None,
                    note=chosen_backend("auto", inputs[0], "input") if way == "spairkit" else "",
                )


def check(operator: Operator, objects: int, device: torch.device) -> None:
    """Compares operator and rival, values and gradients, with float64 in torch.

    The operator at the bars that its tests have, on two images of so many objects: the kernels
    take other tiles for more of them.

    Raises:
        RuntimeError: one of them is off; the message says which and by how much.
    """
    case = Case(operator=operator, batch=2, objects=objects, share_on=0.5)
    inputs, count = _inputs(case, device, _CHECKED_SIDE)
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    ours, rival = _OURS[operator], _RIVALS[operator]
    wanted = _values_and_gradients(ours, exact, count)
    for way, function in (("spairkit", ours), ("the rival", rival)):
        found = _values_and_gradients(function, inputs, count)
        for i, (actual, expected) in enumerate(zip(found, wanted, strict=True)):
            off, norm = actual.double() - expected, expected.norm()
            if way == "the rival":
                error, bar = off.norm() / norm, _RIVAL_BAR
            elif i > 0:
                error, bar = off.norm() / (norm + _GRADIENT_FLOOR), _GRADIENT_BAR
            else:
                error = off.abs().max() if operator == "render" else off.norm() / norm
                bar = _VALUE_BARS[operator]
            if not error <= bar:
                raise RuntimeError(
                    f"{operator} of {objects}: {way} is off by {float(error):.1e}, more than "
                    f"{bar:.0e}, so nothing is timed"
                )


_OURS: dict[Operator, Function] = {
    "render": render,
    "presence_kl": presence_kl,
    "presence_kl_relaxed": functools.partial(presence_kl, relaxed=True),
}
_RIVALS: dict[Operator, Function] = {
    "render": render_by_grid_sample,
    "presence_kl": presence_kl_by_loop,
    "presence_kl_relaxed": functools.partial(presence_kl_by_loop, relaxed=True),
}
_RIVAL_NAMES: dict[Operator, str] = {
    "render": "grid_sample",
    "presence_kl": "loop",
    "presence_kl_relaxed": "loop",
}


def _inputs(case: Case, device: torch.device, side: int) -> tuple[list[Tensor], int]:
    """Arguments of the operator, and how many of them, from the first, want gradients."""
    random = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    batch, objects = case.batch, case.objects
    if case.operator != "render":
        logits = 4 * uniform(batch, objects) - 2
        chance = uniform(batch, objects)
        success = torch.tensor(0.98, dtype=torch.double)
        if case.operator == "presence_kl":
            tensors, count = [logits, (chance < case.share_on).float(), success], 1
        else:
            # binary Concrete of temperature 1, short of 0 and 1
            noise = torch.logit(0.001 + 0.998 * chance)
            odds = torch.logit(torch.tensor(case.share_on))
            tensors, count = [logits, torch.sigmoid(odds + noise), success], 2
    else:
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
        if case.operator != "render" and case.objects > _UNROLLED:
            reason = f"would unroll {case.objects} steps"
        # dynamo gives a function up, and runs it as it is, after eight sizes or at a graph break:
        # hence forget the last case, and with fullgraph raise
        torch._dynamo.reset()
        yield f"compiled {name}", torch.compile(rival, dynamic=False, fullgraph=True), reason


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
    if case.operator != "render":
        cell = 4 + 4 + 4 + 8
        back = 20 if case.operator == "presence_kl" else 28
        return case.batch * case.objects * (cell + (back if backward else 0))
    pixels = case.batch * SIDES[case.objects] ** 2
    maps = case.batch * case.objects * (_OBJECT_SIDE**2 * 4 + 6)
    forward = 4 * (maps + pixels * (3 + 3 + 3 + 2))
    return forward + (4 * (2 * maps + pixels * (3 + 3 + 3 + 2 + 3)) if backward else 0)
