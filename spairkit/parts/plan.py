"""The parts that many images are divided into, and the result of a part.

A part is a few consecutive images. Its result is a pure function of their names and contents, the
checkpoint and the settings, whichever process computes it.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from spairkit.counts import CountPosterior

MAX_IMAGES = 64
"""Images in a part, at most: a batch of the detector, a second of the full search in small ones."""

MAX_PIXELS = 1 << 20
"""Pixels in a part, at most, unless it has one image. The full search takes ten seconds for them,
which is what a killed process loses."""


@dataclass(frozen=True)
class Item:
    """An image of a part."""

    name: str
    """Its path, or its URL."""
    number: int
    """Its id in the output."""
    pixels: int
    """Of a URL the bytes, as its header has not been read."""
    files: tuple[str, ...] = ()
    """Files that are written for it alone."""


Part = tuple[Item, ...]


def planned(items: Iterable[Item]) -> list[Part]:
    """The parts of the images, in order. They do not depend on the number of processes."""
    parts: list[Part] = []
    part: list[Item] = []
    pixels = 0
    for item in items:
        if part and (len(part) == MAX_IMAGES or pixels + item.pixels > MAX_PIXELS):
            parts.append(tuple(part))
            part, pixels = [], 0
        part.append(item)
        pixels += item.pixels
    return [*parts, tuple(part)] if part else parts


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of one image."""

    name: str
    number: int
    objects: int
    has_masks: bool
    least_count: int | None
    """With the next two, the posterior of the count; None without one."""
    count_probabilities: list[float]
    count_is_shared: bool
    misfit: str | None
    """Why the model does not fit it."""
    rows: list[str]
    """Its part of the output."""
    measured: str
    """Its part of a table of objects, or of tracks, if there is to be one."""

    def counts(self) -> CountPosterior | None:
        """The posterior of the count, if the model gives one."""
        if self.least_count is None:
            return None
        probabilities = torch.tensor(self.count_probabilities, dtype=torch.float64)
        return CountPosterior(self.least_count, probabilities, self.count_is_shared)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a part."""

    versions: list[str]
    """What tells that an image of the part has changed, see `files.version`."""
    found: list[Found]
    skipped: list[list[str]]
    """Name of each image that cannot be read, and the reason."""

    def without_rows(self) -> "Result":
        """The same without the images' parts of the output."""
        return replace(self, found=[replace(item, rows=[]) for item in self.found])


def described(part: Part) -> str:
    """What the result of a part depends on besides contents and settings, as text."""
    return json.dumps([[item.name, item.number, item.files] for item in part])
