"""Speed and memory of the operators, beside what a good torch user would write.

Every figure is a ratio taken in one run on one machine: the operator, the plain version in torch
(grid_sample over all objects; a loop over the cells), and torch.compile of that. The operator's own
checks run first, and nothing is timed when they fail.
"""

import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.backends import chosen_backend
from spairkit.errors import InputError
from spairkit.presence import presence_kl
from spairkit.rendering import MIN_IMPORTANCE, render

Operator = Literal["render", "presence_kl"]
Function = Callable[..., Tensor]

SIDES = {16: 48, 64: 96, 144: 144, 576: 288}
"""Side of the image in pixels for each number of objects."""

_OBJECT_SIDE = 14  # texels, as in the paper
_COPIES = 40  # planes of [B, N, H, W] that grid_sample and its gradients hold at their peak
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
                peak = _peak_bytes(call, device)
                times = _times(call, device, seconds)
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


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def append_to_ledger(path: Path, machine: dict[str, Any], figures: list[Figure]) -> None:
    """Adds one line of JSON: the machine, and all figures.

    Raises:
        InputError: the file cannot be written.
    """
    line = json.dumps({**machine, "figures": [asdict(figure) for figure in figures]})
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise InputError(
            f"{path}: cannot add to the ledger ({error.strerror}); name another with --ledger"
        ) from error


def render_by_grid_sample(
    rgba: Tensor, boxes: Tensor, depth: Tensor, presence: Tensor, background: Tensor
) -> Tensor:
    """The renderer as one writes it in plain torch: every object on a full image, then sums."""
    num_images, num_objects, map_height, map_width, channels = rgba.shape
    height, width = background.shape[2:]
    alpha = rgba[..., -1:] * presence[..., None, None, None]
    importance = alpha * torch.sigmoid(-depth)[..., None, None, None]
    maps = torch.cat([rgba[..., :-1], torch.ones_like(alpha), alpha, importance], -1)
    maps = maps.view(-1, map_height, map_width, channels + 2).permute(0, 3, 1, 2)
    x1, y1, x2, y2 = boxes.view(-1, 4).unbind(-1)
    zero = torch.zeros_like(x1)
    across = torch.stack([width / (x2 - x1), zero, (width - x1 - x2) / (x2 - x1)], -1)
    down = torch.stack([zero, height / (y2 - y1), (height - y1 - y2) / (y2 - y1)], -1)
    places = torch.stack([across, down], 1)
    grid = F.affine_grid(places, [len(places), 1, height, width], align_corners=False)
    drawn = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
    drawn = drawn.view(num_images, num_objects, channels + 2, height, width)
    colour, cover, alpha, importance = drawn.split([channels - 1, 1, 1, 1], 2)
    change = (importance * alpha * (colour - cover * background[:, None])).sum(1)
    total = importance.sum(1)
    touched = total > MIN_IMPORTANCE
    return background + torch.where(touched, change / torch.where(touched, total, 1.0), 0.0)


def presence_kl_by_loop(logits: Tensor, samples: Tensor, success: Tensor) -> Tensor:
    """The KL as one writes it in plain torch: equations (B1) and (B2), a cell at a time."""
    num_images, num_cells = samples.shape
    counts = torch.arange(num_cells + 1, dtype=logits.dtype, device=logits.device)
    belief = (counts * torch.log1p(-success)).to(logits.dtype).expand(num_images, -1)
    present = (samples > 0.5).to(logits.dtype)
    before = torch.zeros_like(present[:, :1])
    log_odds = []
    for k in range(num_cells):
        on = ((counts - before) / (num_cells - k)).clamp(0, 1)
        weight = belief.softmax(1)
        log_odds.append((weight * on).sum(1).log() - (weight * (1 - on)).sum(1).log())
        here = present[:, k, None]
        belief = belief + (here * on + (1 - here) * (1 - on)).log()
        before = before + here
    prior = torch.stack(log_odds, 1)
    on = torch.sigmoid(logits)
    return (
        on * (F.logsigmoid(logits) - F.logsigmoid(prior))
        + (1 - on) * (F.logsigmoid(-logits) - F.logsigmoid(-prior))
    )  # fmt: skip


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
        needed = 4 * _COPIES * case.batch * case.objects * SIDES[case.objects] ** 2
        if needed > 0.7 * _free_bytes(device):
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


def _times(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Sorted seconds of calls: at least three if they are done in 20 s; one was made before."""
    times: list[float] = []
    begin = time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds or len(times) < (3 if spent < 20 else 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)


def _copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes a second, read and written, of a plain copy."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = _times(lambda: target.copy_(source), device, seconds)
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


def _peak_bytes(call: Callable[[], None], device: torch.device) -> int | None:
    """How far memory rises in one call, after one that has loaded and compiled what it needs."""
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    # give back what the allocator holds, and start the record of the largest size anew
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"the system's record of this process has no {key}")


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 8 * 2**30


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
