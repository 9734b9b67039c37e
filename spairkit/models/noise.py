"""Random numbers for the images of a batch, which several processes may share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """One of `size` equal parts of a batch, with noise drawn for the whole batch.

    Each process draws all noise and keeps its rows, so the noise of an image does not depend on the
    number of processes.
    """

    generator: torch.Generator
    index: int
    """Number of this part, from 0."""
    size: int


@dataclass(frozen=True, eq=False)
class Batches:
    """Several batches as one, each with the noise that its own generator gives it."""

    generators: list[torch.Generator]
    size: int
    """Images of each batch but the last, which may have fewer."""


class Tape:
    """Noise at the same address in every pass, as a CUDA graph needs it.

    The first pass draws on demand and records the draws. Before each later pass `wind` repeats
    them, so that the pass gets the numbers that `source` would give. A pass that failed can be
    repeated.
    """

    def __init__(self) -> None:
        self._source: torch.Generator | Part | None = None
        # how numbers are drawn, those of the whole batch, and those of its part
        self._draws: list[tuple[Callable[..., Tensor], Tensor, Tensor]] = []
        self._next = 0

    def wind(self, source: torch.Generator | Part) -> None:
        """Repeats the draws of the first pass with new numbers, for the next pass."""
        self._source = source
        generator = source.generator if isinstance(source, Part) else source
        for draw, numbers, _ in self._draws:
            draw(numbers, generator=generator)

    def rewind(self) -> None:
        """Starts a pass."""
        self._next = 0

    def take(self, draw: Callable[..., Tensor], like: Tensor, batch: int, *shape: int) -> Tensor:
        """The next numbers [batch, *shape], which `draw` writes into a tensor in the first pass."""
        if self._next == len(self._draws):
            source = self._source
            if isinstance(source, Part):
                whole = draw(
                    like.new_empty(source.size * batch, *shape), generator=source.generator
                )
                self._draws.append((draw, whole, whole[source.index * batch :][:batch]))
            else:
                whole = draw(like.new_empty(batch, *shape), generator=source)
                self._draws.append((draw, whole, whole))
        self._next += 1
        return self._draws[self._next - 1][2]


Source = torch.Generator | Part | Batches | Tape | None
"""Source of noise; None is torch's default generator."""


def normal(source: Source, like: Tensor, batch: int, *shape: int) -> Tensor:
    """Standard normal numbers [batch, *shape], with the dtype and device of `like`."""
    return _drawn(Tensor.normal_, source, like, batch, *shape)


def uniform(source: Source, like: Tensor, batch: int, *shape: int) -> Tensor:
    """Numbers [batch, *shape] from U[0, 1), with the dtype and device of `like`."""
    return _drawn(Tensor.uniform_, source, like, batch, *shape)


def _drawn(
    draw: Callable[..., Tensor], source: Source, like: Tensor, batch: int, *shape: int
) -> Tensor:
    if isinstance(source, Tape):
        return source.take(draw, like, batch, *shape)
    if isinstance(source, Part):
        whole = _drawn(draw, source.generator, like, source.size * batch, *shape)
        return whole[source.index * batch :][:batch]
    if isinstance(source, Batches):
        starts = range(0, batch, source.size)
        sizes = [min(source.size, batch - start) for start in starts]
        numbers = zip(source.generators, sizes, strict=True)
        return torch.cat([_drawn(draw, one, like, size, *shape) for one, size in numbers])
    return draw(like.new_empty(batch, *shape), generator=source)
