"""Random numbers for the images of a batch, of which a process may have only a part."""

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


Source = torch.Generator | Part | None
"""Where noise comes from; None is torch's own generator."""


def normal(source: Source, like: Tensor, batch: int, *shape: int) -> Tensor:
    """Standard normal numbers [batch, *shape], with the dtype and device of `like`."""
    if isinstance(source, Part):
        whole = normal(source.generator, like, source.size * batch, *shape)
        return whole[source.index * batch :][:batch]
    return like.new_empty(batch, *shape).normal_(generator=source)


def uniform(source: Source, like: Tensor, batch: int, *shape: int) -> Tensor:
    """Numbers [batch, *shape] from U[0, 1), likewise."""
    if isinstance(source, Part):
        whole = uniform(source.generator, like, source.size * batch, *shape)
        return whole[source.index * batch :][:batch]
    return like.new_empty(batch, *shape).uniform_(generator=source)
