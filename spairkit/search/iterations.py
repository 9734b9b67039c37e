"""Iterations of refinement: plain ones, and on a GPU those of a CUDA graph for each shape.

An iteration launches some 200 small kernels. A graph needs fixed shapes, so images and slots are
padded to powers of two: a few graphs serve windows and images of all numbers of objects.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spairkit.cuda_graphs import Recorded
from spairkit.models.slots import Slots
from spairkit.search.energy import Energy, Scene

_RATE, _RATE_DECAY, _LEAST_RATE = 0.1, 0.97, 0.02
_MOMENTUM, _SCALE_MEMORY, _EPSILON = 0.8, 0.95, 1e-3  # Adam's
_LEAST_SLOTS = 8  # of a graph
_MOST_GRAPHS = 32  # of an energy; those that were not used for longest go


@dataclass(frozen=True, eq=False)
class Work:
    """Images that are refined, and how far they are."""

    scene: Scene
    slots: Slots  # as at the start
    moves: Tensor  # [B, N, 1] 1 for the objects that may change, else 0
    now: Tensor  # [B, N, M] latents
    best: Tensor  # [B, N, M] those of the lowest energy
    mean: Tensor  # [B, N, M] Adam's moments
    scale: Tensor
    value: Tensor  # [B] energy of the last iteration, nats
    here: Tensor  # [B] lowest energy
    high: Tensor  # [B] highest one since the last check

    @classmethod
    def of(cls, scene: Scene, slots: Slots, moves: Tensor) -> "Work":
        """Before the first iteration."""
        now, far = slots.latents, torch.full_like(slots.count, torch.inf)
        zeros = torch.zeros_like(now)
        return cls(scene, slots, moves, now, now, zeros, zeros, far, far, -far)

    def select(self, index: Tensor) -> "Work":
        """Some of the images; `index` holds integers or is a mask [B]."""
        return self._each(lambda tensor: tensor[index])

    def padded(self, images: int, slots: int) -> "Work":
        """With copies of the last image and empty slots behind, so many in all."""
        rows = torch.arange(images, device=self.now.device).clamp(max=len(self.now) - 1)
        more = slots - self.now.shape[1]
        wider: dict[str, Any] = {
            name: F.pad(getattr(self, name), (0, 0, 0, more))
            for name in ("moves", "now", "best", "mean", "scale")
        }
        return replace(self, slots=self.slots.padded(slots), **wider).select(rows)

    @property
    def state(self) -> list[Tensor]:
        """What an iteration changes."""
        return [self.now, self.best, self.mean, self.scale, self.value, self.here, self.high]

    def tensors(self) -> list[Tensor]:
        """All of them, those of scene and slots first."""
        parts = [getattr(part, f.name) for part in (self.scene, self.slots) for f in fields(part)]
        return [*parts, self.moves, *self.state]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Work":
        values = map(change, self.tensors())
        scene = Scene(*(next(values) for _ in fields(Scene)))
        slots = Slots(*(next(values) for _ in fields(Slots)))
        return Work(scene, slots, *values)

    def copied(self) -> "Work":
        """The same in memory of its own."""
        return self._each(
            lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format)
        )


def advanced(energy: Energy, work: Work, steps: Iterable[int]) -> Work:
    """`work` after the iterations of these numbers, counted from 1."""
    if work.now.device.type == "cuda" and len(work.now):
        if energy.recorded is None:
            energy.recorded = RecordedIterations(energy, torch.cuda.graph_pool_handle())
        recorded: RecordedIterations = energy.recorded
        return recorded(work, steps)
    for step in steps:
        work = _iterated(energy, work, *_rates(step))
    return work


def _rates(step: int) -> tuple[float, float]:
    """The rate of Adam, and what divides its second moment."""
    rate = max(_RATE * _RATE_DECAY**step, _LEAST_RATE) / (1 - _MOMENTUM**step)
    return rate, 1 - _SCALE_MEMORY**step


def _iterated(energy: Energy, work: Work, rate: float | Tensor, unbias: float | Tensor) -> Work:
    """`work` after one iteration of Adam, which waits for no result."""
    now = work.now.detach().requires_grad_()
    with torch.enable_grad():
        value = energy(work.scene, work.slots.changed(now))
        (gradient,) = torch.autograd.grad(value.sum(), now)
    now, value = now.detach(), value.detach()
    best = torch.where((value < work.here)[:, None, None], now, work.best)
    here, high = torch.minimum(value, work.here), torch.maximum(value, work.high)
    gradient = gradient * work.moves
    # not torch.lerp, which rounds the last few elements by other code than the rest
    mean = _MOMENTUM * work.mean + (1 - _MOMENTUM) * gradient
    scale = _SCALE_MEMORY * work.scale + (1 - _SCALE_MEMORY) * gradient.square()
    now = now - rate * mean / ((scale / unbias).sqrt() + _EPSILON)
    return Work(work.scene, work.slots, work.moves, now, best, mean, scale, value, here, high)


class _Graph(NamedTuple):
    """An iteration that is recorded, and the tensors that it reads and writes."""

    work: Work
    rates: tuple[Tensor, Tensor]
    iterate: Recorded[None]


class RecordedIterations:
    """Iterations with an energy as CUDA graphs, one for each padded shape.

    Args:
        energy: of a network whose weights stay in one place.
        pool: of memory that the graphs share; see `Recorded`.
    """

    def __init__(self, energy: Energy, pool: Any) -> None:
        self._energy, self._pool = energy, pool
        self._graphs: OrderedDict[tuple[torch.Size, ...], _Graph] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, work: Work, steps: Iterable[int]) -> Work:
        """As `advanced`; one thread at a time."""
        images, slots = work.now.shape[:2]
        padded = work.padded(_power(images), _power(max(slots, _LEAST_SLOTS)))
        with self._lock:
            graph = self._graph(padded)
            torch._foreach_copy_(graph.work.tensors(), padded.tensors())
            for step in steps:
                for place, number in zip(graph.rates, _rates(step), strict=True):
                    place.fill_(number)
                graph.iterate()
            after = graph.work
            wide = (after.now, after.best, after.mean, after.scale)
            flat = (after.value, after.here, after.high)
            now, best, mean, scale = (tensor[:images, :slots].clone() for tensor in wide)
            value, here, high = (tensor[:images].clone() for tensor in flat)
        return Work(work.scene, work.slots, work.moves, now, best, mean, scale, value, here, high)

    def _graph(self, work: Work) -> _Graph:
        """That of the shapes of `work`."""
        shapes = tuple(tensor.shape for tensor in work.tensors())
        if shapes not in self._graphs:
            place = work.copied()
            rates = (
                place.value.new_empty((), dtype=torch.float64),
                place.value.new_empty((), dtype=torch.float64),
            )
            update = partial(self._in_place, place, rates)
            iterate = Recorded(update, place.now.device, "refinement", self._pool)
            self._graphs[shapes] = _Graph(place, rates, iterate)
            if len(self._graphs) > _MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(shapes)
        return self._graphs[shapes]

    def _in_place(self, work: Work, rates: tuple[Tensor, Tensor]) -> None:
        after = _iterated(self._energy, work, *rates)
        torch._foreach_copy_(work.state, after.state)


def _power(number: int) -> int:
    """The least power of two that is not less than `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()
