"""Which moves the search tries: where the image is not explained, and where objects overlap."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import maximum_filter, uniform_filter

from spairkit.models.latents import Latents
from spairkit.models.slots import Slots
from spairkit.search.energy import Energy, Scene
from spairkit.search.moves import Moves

Array = npt.NDArray[np.float64]

LEAST_EXCESS = 20.0
"""Excess energy in the box of an object, nats, above which it may be split, or one may be born."""

_LEAST_SIDE = 4.0  # of new objects, px
_PEAK_SIDE = 0.7  # of the boxes that excess is summed over, in typical sides
_LEAST_PRESENCE = 0.02  # of a cell that the encoder left empty, for a birth there
_LEAST_MERGED = 0.1  # overlap of two objects that may merge, as a share of the smaller box
_MOST_UNION = 2.0  # side of a merged object, in typical sides
_PARTS = 0.6, 0.85  # least and greatest side of the parts of a split, in sides of the whole

_Move = tuple[list[int], list[Array]]  # slots that go and boxes that come


def propose(
    energy: Energy,
    scene: Scene,
    slots: Slots,
    latents: Latents,
    typical: Array,  # [B, 2]
    near: list[Array] | None = None,
) -> Moves:
    """The moves worth trying.

    - Birth: a box of typical size at each peak of the excess energy, or the box of a cell that the
      encoder left empty with some doubt, if the excess in it is large.
    - Death: of an object that overlaps another one, which may then take its place.
    - Merge: of two objects that overlap, into one that covers both.
    - Split: of an object with a large excess, into two parts at opposite corners or sides.

    Args:
        latents: the encoder's.
        typical: width and height of a typical object of each image, px.
        near: regions [n, 4] of each image; only moves that overlap one are returned. None: all.
    """
    excess = energy.excess(scene, slots).double().cpu().numpy()
    boxes = energy.boxes(slots).double().cpu().numpy()
    present = (slots.present > 0).cpu().numpy()
    doubt = latents.presence_logit.sigmoid().double().cpu().numpy()
    cells = latents.boxes.double().cpu().numpy()
    image: list[int] = []
    removed: list[list[int]] = []
    added: list[list[Array]] = []
    for b in range(len(boxes)):
        if near is not None and not len(near[b]):
            continue
        on = np.flatnonzero(present[b])
        side = float(typical[b].mean())
        mass = _Mass(excess[b])
        empty = cells[b][(doubt[b] > _LEAST_PRESENCE) & (doubt[b] <= 0.5)]
        for gone, new in (
            *_births(excess[b], mass, empty, side),
            *_deaths_and_merges(boxes[b, on], on, side),
            *_splits(boxes[b, on], on, mass, typical[b]),
        ):
            where = np.stack([*new, *boxes[b, gone]])
            if near is None or bool(overlaps(where[:, None], near[b]).any()):
                image.append(b)
                removed.append([*gone, -1, -1][:2])
                added.append([*new, *[np.full(4, np.nan)] * 2][:2])
    device, dtype = slots.latents.device, slots.latents.dtype
    return Moves(
        torch.tensor(image, dtype=torch.int64, device=device),
        torch.tensor(removed, dtype=torch.int64, device=device).reshape(-1, 2),
        torch.tensor(np.array(added).reshape(-1, 2, 4), dtype=dtype, device=device),
    )


def typical_sizes(energy: Energy, slots: Slots, latents: Latents) -> Array:  # [B, 2] px
    """Median width and height of the objects of each image, or of its cells where it has none."""
    boxes = energy.boxes(slots).double().cpu().numpy()
    cells = latents.boxes.double().cpu().numpy()
    present = (slots.present > 0).cpu().numpy()
    sizes = []
    for box, cell, on in zip(boxes, cells, present, strict=True):
        known = box[on] if on.any() else cell
        sizes.append(np.median(np.maximum(known[:, 2:] - known[:, :2], _LEAST_SIDE), axis=0))
    return np.stack(sizes)


class _Mass:
    """Sums of a map over boxes, in constant time."""

    def __init__(self, values: Array) -> None:
        self.table = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def __call__(self, boxes: Array) -> Array:  # [n, 4] -> [n]
        height, width = self.table.shape
        edges = boxes.round().astype(np.int64)
        x1, x2 = (edges[:, i].clip(0, width - 1) for i in (0, 2))
        y1, y2 = (edges[:, i].clip(0, height - 1) for i in (1, 3))
        table = self.table
        total: Array = table[y2, x2] - table[y1, x2] - table[y2, x1] + table[y1, x1]
        return total


def _births(excess: Array, mass: _Mass, empty: Array, side: float) -> Iterator[_Move]:
    reach = round(side * _PEAK_SIDE) | 1
    total = uniform_filter(excess, reach, mode="constant") * reach**2
    peaks = (total == maximum_filter(total, reach, mode="constant")) & (total > LEAST_EXCESS)
    for y, x in np.argwhere(peaks):
        centre = np.array([x, y]) + 0.5
        yield [], [np.concatenate([centre - side / 2, centre + side / 2])]
    for box in empty[mass(empty) > LEAST_EXCESS]:
        yield [], [box]


def _deaths_and_merges(boxes: Array, slots: npt.NDArray[np.int64], side: float) -> Iterator[_Move]:
    for i, box in enumerate(boxes):
        others = np.flatnonzero(overlaps(box, boxes))
        if len(others) > 1:  # not only itself
            yield [int(slots[i])], []
        for j in others[others > i]:
            low, high = np.maximum(box[:2], boxes[j, :2]), np.minimum(box[2:], boxes[j, 2:])
            least = min(np.prod(box[2:] - box[:2]), np.prod(boxes[j, 2:] - boxes[j, :2]))
            union = np.concatenate(
                [np.minimum(box[:2], boxes[j, :2]), np.maximum(box[2:], boxes[j, 2:])]
            )
            small = (union[2:] - union[:2]).max() < _MOST_UNION * side
            if small and np.prod(high - low) > _LEAST_MERGED * least:
                yield [int(slots[i]), int(slots[j])], [union]


def _splits(
    boxes: Array, slots: npt.NDArray[np.int64], mass: _Mass, typical: Array
) -> Iterator[_Move]:
    large = mass(boxes) > LEAST_EXCESS if len(boxes) else np.zeros(0, bool)
    for slot, (x1, y1, x2, y2) in zip(slots[large], boxes[large], strict=True):
        whole = np.array([x2 - x1, y2 - y1])
        w, h = np.clip(typical, _PARTS[0] * whole, _PARTS[1] * whole)
        for parts in (
            ((x1, y1, x1 + w, y1 + h), (x2 - w, y2 - h, x2, y2)),
            ((x2 - w, y1, x2, y1 + h), (x1, y2 - h, x1 + w, y2)),
            ((x1, y1, x1 + w, y2), (x2 - w, y1, x2, y2)),
            ((x1, y1, x2, y1 + h), (x1, y2 - h, x2, y2)),
        ):
            yield [int(slot)], [np.array(part) for part in parts]


def overlaps(first: Array, second: Array) -> npt.NDArray[np.bool_]:
    """Whether boxes or regions share an area: [..., 4], [..., 4] -> [...]."""
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    shared: npt.NDArray[np.bool_] = np.all(high > low, axis=-1)
    return shared
