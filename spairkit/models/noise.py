"""Random numbers for the images of a batch, of which a process may have only a part."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """One of `size` equal parts of a batch, whose noise is drawn for the whole batch.

    Every process draws all of it and takes its rows, so what an image gets does not depend on how
    many processes share the batch.
    """

    generator: torch.Generator
    index: int
    """From 0."""
    size: int


class Tape:
    """Noise that lies in the same memory at every pass, as a CUDA graph needs it.

    In the first pass it is drawn as it is asked for. Later it is drawn by `wind`, before a pass
    that asks for the same, in the same order: the numbers are those that `source` would give. A
    pass that is broken off can be made once more.
    """

    def __init__(self) -> None:
        self._source: torch.Generator | None = None
        self._draws: list[tuple[Callable[..., Tensor], Tensor]] = []
        self._next = 0

    def wind(self, source: torch.Generator) -> None:
        """Draws anew, for the next pass, all that was asked for in the first one."""
        self._source = source
        for draw, numbers in self._draws:
            draw(numbers, generator=source)

    def rewind(self) -> None:
        """Begins a pass."""
        self._next = 0

    def take(self, draw: Callable[..., Tensor], like: Tensor, *shape: int) -> Tensor:
        """The next numbers, [*shape]; `draw` fills a tensor."""
        if self._next == len(self._draws):
            self._draws.append((draw, draw(like.new_empty(shape), generator=self._source)))
        self._next += 1
        return self._draws[self._next - 1][1]


Source = torch.Generator | Part | Tape | None
"""Where noise comes from; None is torch's own generator."""


def normal(source: Source, like: Tensor, batch: int, *shape: int) -> Tensor:
    """Standard normal numbers [batch, *shape], with the dtype and device of `like`."""
    if isinstance(source, Tape):
        return source.take(Tensor.normal_, like, batch, *shape)
    if isinstance(source, Part):
        whole = normal(source.generator, like, source.size * batch, *shape)
        return whole[source.index * batch :][:batch]
    return like.new_empty(batch, *shape).normal_(generator=source)


def uniform(source: Source, like: Tensor, batch: int, *shape: int) -> Tensor:
    """Numbers [batch, *shape] from U[0, 1), likewise."""
    if isinstance(source, Tape):
        return source.take(Tensor.uniform_, like, batch, *shape)
    if isinstance(source, Part):
        whole = uniform(source.generator, like, source.size * batch, *shape)
        return whole[source.index * batch :][:batch]
    return like.new_empty(batch, *shape).uniform_(generator=source)
