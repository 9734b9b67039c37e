"""Moves of the search, each judged in its neighbourhood."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spairkit.kernels.constants import BOX
from spairkit.models.glimpses import extract_glimpses
from spairkit.models.slots import Slots
from spairkit.search.energy import Energy, Scene
from spairkit.search.refine import refine

MOVE_ITERATIONS = 20
"""Iterations of refinement after a move, at most."""

TOLERANCE = 0.7
"""Refinement ends when the energy falls by less than this for each object in five iterations, nats.
"""

_MOST_PIXELS = 1 << 19  # of the windows that are judged at a time


@dataclass(frozen=True, eq=False)
class Moves:
    """Changes of the objects: up to two of an image go, and up to two come.

    A death removes one, a birth adds one, a merge replaces two by one, a split one by two.
    """

    image: Tensor  # [P] int64
    removed: Tensor  # [P, 2] int64 slots of the image, -1 for none
    added: Tensor  # [P, 2, 4] boxes of new objects, xyxy, px; NaN for none

    def __len__(self) -> int:
        """The number of moves."""
        return len(self.image)

    def select(self, index: Tensor | slice) -> "Moves":
        """Some of the moves."""
        return Moves(self.image[index], self.removed[index], self.added[index])

    @classmethod
    def deaths(cls, image: Tensor, slot: Tensor) -> "Moves":
        """The removal of each of the given slots; both [P] int64."""
        none = torch.full_like(slot, -1)
        added = torch.full((len(slot), 2, 4), torch.nan, device=slot.device)
        return cls(image, torch.stack([slot, none], dim=-1), added)

    def extent(self, boxes: Tensor) -> Tensor:  # [B, N, 4] -> [P] px
        """The greater side of the region that the objects that go and come take up."""
        acted = self.acted(boxes)
        return (acted[:, 2:] - acted[:, :2]).amax(1)

    def acted(self, boxes: Tensor) -> Tensor:  # [B, N, 4] -> [P, 4] xyxy, px
        """The least box round the objects that go and come, from the boxes of all slots."""
        acting = torch.cat([self.removed >= 0, ~self.added[..., 0].isnan()], dim=1)
        return _hull(torch.cat([self.removed_boxes(boxes), self.added], dim=1), acting)

    def removed_boxes(self, boxes: Tensor) -> Tensor:  # [B, N, 4] -> [P, 2, 4]
        """The boxes of the objects that go; any where none goes."""
        boxes = torch.nn.functional.pad(boxes, (0, 0, 0, 1))  # there may be no slot
        return boxes[self.image[:, None], self.removed.clamp(min=0)]

    @property
    def balance(self) -> Tensor:  # [P] int64
        """By how much each move changes the count."""
        return (~self.added[..., 0].isnan()).sum(1) - (self.removed >= 0).sum(1)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What each of P moves would do by itself."""

    change: Tensor  # [P] of the energy, nats; infinity if the window is too small to know
    region: Tensor  # [P, 4] xyxy, px: no pixel beyond it changes
    index: Tensor  # [P, S] slot of the image whose object changes; -1 for none
    slots: Slots  # [P, S + 2, ...] after the move, new objects last; corners are in the image

    def select(self, index: Tensor) -> "Outcomes":
        """Some of the outcomes."""
        return Outcomes(
            self.change[index],
            self.region[index],
            self.index[index],
            self.slots.select(index),
        )

    @staticmethod
    def join(parts: "list[Outcomes]") -> "Outcomes":
        """The outcomes of all parts, in order."""
        most = max(part.index.shape[1] for part in parts)
        pad = torch.nn.functional.pad
        return Outcomes(
            torch.cat([part.change for part in parts]),
            torch.cat([part.region for part in parts]),
            torch.cat([pad(p.index, (0, most - p.index.shape[1]), value=-1) for p in parts]),
            Slots.stack([_spread(part.slots, most) for part in parts]),
        )


def _spread(slots: Slots, most: int) -> Slots:
    """Pads the window's slots to `most`; the two new objects stay last."""
    have = slots.present.shape[1] - 2
    device = slots.present.device
    old = torch.arange(have, device=device)
    empty = torch.arange(have + 2, most + 2, device=device)
    new = torch.arange(have, have + 2, device=device)
    order = torch.cat([old, empty, new]).expand(len(slots.present), -1)
    return slots.padded(most + 2).gather(torch.arange(len(order), device=device), order)


def support(boxes: Tensor, texels: int) -> Tensor:  # [..., 4] -> [..., 4] xyxy, px
    """The region that objects with these boxes can change: half a texel and half a pixel wider."""
    rim = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0) / (2 * texels) + 0.5
    return torch.cat([boxes[..., :2] - rim, boxes[..., 2:] + rim], dim=-1)


def overlap(first: Tensor, second: Tensor) -> Tensor:  # [..., 4], [..., 4] -> [...] bool
    """Whether two regions share an area."""
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    return (high > low).all(-1)


def _within(first: Tensor, second: Tensor) -> Tensor:
    """Whether the first region lies in the second."""
    return ((first[..., :2] >= second[..., :2]) & (first[..., 2:] <= second[..., 2:])).all(-1)


def _hull(boxes: Tensor, counted: Tensor) -> Tensor:  # [P, n, 4], [P, n] bool -> [P, 4]
    """The least box round those that are counted."""
    low = torch.where(counted[..., None], boxes[..., :2], torch.inf).amin(1)
    high = torch.where(counted[..., None], boxes[..., 2:], -torch.inf).amax(1)
    return torch.cat([low, high], dim=-1)


def judge(
    energy: Energy,
    scene: Scene,
    slots: Slots,
    std: Tensor,  # [B, K, M]
    moves: Moves,
    side: int,
    iterations: int = MOVE_ITERATIONS,
    on_chunk: Callable[[float], None] = lambda share: None,
) -> Outcomes:
    """Makes each of at least one move by itself, and refines its neighbourhood in a window.

    The objects that touch those that go or come are refined with them; the others stay. A move is
    judged only if all that it changes lies in the window.

    Args:
        std: the encoder's standard deviations of each cell, which new objects take.
        side: of the windows, px; less where the image is smaller.
        iterations: of refinement, at most; 0 for none.
        on_chunk: called with the share of the moves that are judged, now and then.
    """
    slots = slots.padded(max(1, slots.present.shape[1]))  # so that -1 names a slot
    area = min(side, scene.images.shape[-2]) * min(side, scene.images.shape[-1])
    chunk = max(1, _MOST_PIXELS // area)
    parts = []
    for i in range(0, len(moves), chunk):
        part = moves.select(slice(i, i + chunk))
        parts.append(_judge(energy, scene, slots, std, part, side, iterations))
        on_chunk(min(1.0, (i + chunk) / len(moves)))
    return Outcomes.join(parts)


def _judge(
    energy: Energy,
    scene: Scene,
    slots: Slots,
    std: Tensor,
    moves: Moves,
    side: int,
    iterations: int,
) -> Outcomes:
    image, removed = moves.image, moves.removed
    texels = energy.network.config.object_size
    boxes = energy.boxes(slots)
    acted = moves.acted(boxes)
    low, view, near, index = _windows(energy, scene, slots, image, acted, side)
    shift = torch.cat([low, low], dim=-1)[:, None]  # [P, 1, 4]
    held = _accounted(low, view.images.shape, scene.images.shape)[:, None]  # [P, 1, 4]
    with torch.no_grad():
        before = energy(view, near)
        goes = (index[:, None] == removed[..., None]).any(1)
        rest = replace(near, present=torch.where(goes, 0, near.present))
        after = rest.join(_new_objects(energy, view, rest, std, moves, low, scene))
    start = support(energy.boxes(after) + shift, texels)
    contained = _within(start, held)
    touched = contained & overlap(start, acted[:, None]) & (after.present > 0)
    after, lowest = refine(
        energy,
        view,
        after,
        touched.to(near.present.dtype),
        tolerance=TOLERANCE,
        most=iterations,
        target=before,
    )
    end = support(energy.boxes(after) + shift, texels)
    gone = support(moves.removed_boxes(boxes), texels)
    fits = (_within(end, held) | ~touched).all(1) & (_within(gone, held) | (removed < 0)).all(1)
    fits &= (contained | (after.present == 0))[:, -2:].all(1)  # those that come
    region = _hull(
        torch.cat([start, end, gone], dim=1), torch.cat([touched, touched, removed >= 0], dim=1)
    )
    corner = after.corner + low.flip(-1)[:, None]
    return Outcomes(
        torch.where(fits, lowest - before, torch.inf),
        region,
        torch.where(touched[:, :-2], index, -1),
        replace(after, corner=corner),
    )


def _windows(
    energy: Energy, scene: Scene, slots: Slots, image: Tensor, acted: Tensor, side: int
) -> tuple[Tensor, Scene, Slots, Tensor]:
    """A window round each region, with the objects that reach into it.

    Returns:
        x, y of the windows [P, 2], px; their scene; their slots, with corners in the window; and
        the slot of the image in each of these [P, S].
    """
    height, width = scene.images.shape[-2:]
    rows, columns = min(side, height), min(side, width)
    extent = acted.new_tensor([columns, rows])
    most = acted.new_tensor([width - columns, height - rows])
    low = ((acted[:, :2] + acted[:, 2:]) / 2 - extent / 2).round().clamp(min=0)
    low = torch.minimum(low, most)  # [P, 2] x, y
    x1, y1 = low.long().unbind(-1)
    y = y1[:, None] + torch.arange(rows, device=low.device)
    x = x1[:, None] + torch.arange(columns, device=low.device)
    # indexing by tensors on both sides of the channels puts these last
    crop = scene.images[image[:, None, None], :, y[:, :, None], x[:, None, :]]
    reach = support(energy.boxes(slots), energy.network.config.object_size)[image]
    window = torch.cat([low, low + extent], dim=-1)
    inside = (slots.present[image] > 0) & overlap(reach, window[:, None])  # [P, N]
    number = int(inside.sum(1).amax())
    index = inside.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :number]
    near = slots.gather(image, index)
    near = replace(
        near,
        corner=near.corner - low.flip(-1)[:, None],
        present=near.present * inside.gather(1, index),
    )
    view = Scene(
        crop.permute(0, 3, 1, 2).contiguous(),
        scene.background[image],
        scene.channels[image],
        scene.evidence[image],
        scene.outside[image] + slots.count[image] - near.count,
        scene.places[image],
    )
    return low, view, near, index


def _accounted(low: Tensor, window: torch.Size, image: torch.Size) -> Tensor:  # [P, 4]
    """The windows, extended to infinity where they end at the image's edge."""
    high = low + low.new_tensor([window[-1], window[-2]])
    end = low.new_tensor([image[-1], image[-2]])
    low = torch.where(low <= 0, -torch.inf, low)
    return torch.cat([low, torch.where(high >= end, torch.inf, high)], dim=-1)


def _new_objects(
    energy: Energy,
    view: Scene,
    rest: Slots,
    std: Tensor,  # [B, K, M] of the cells of the whole images
    moves: Moves,
    low: Tensor,  # [P, 2] x, y of the windows
    scene: Scene,
) -> Slots:
    """Objects in the boxes, whose appearance is that of the image without all other objects."""
    net, c = energy.network, energy.network.config
    rows, columns = net.grid(scene.images.shape[-2], scene.images.shape[-1])
    comes = ~moves.added[..., 0].isnan()
    boxes = torch.where(comes[..., None], moves.added, float(c.cell))
    centre = (boxes[..., :2] + boxes[..., 2:]).flip(-1) / 2  # y, x
    cell = (centre / c.cell).floor().clamp(min=0)
    cell = torch.minimum(cell, cell.new_tensor([rows - 1, columns - 1]))
    number = (cell[..., 0] * columns + cell[..., 1]).long()  # [P, 2]
    of_cell = std[moves.image[:, None], number]
    left = (view.images - energy.draw(view, rest) + view.background).clamp(0, 1)
    shift = torch.cat([low, low], dim=-1)[:, None]
    what, spread = net.appearance(extract_glimpses(left, boxes - shift, c.object_size))
    where = net.where_of(boxes, cell * c.cell)
    return Slots(
        torch.cat([where, what, torch.zeros_like(where[..., :1])], dim=-1),
        torch.cat([of_cell[..., :BOX], spread, of_cell[..., -1:]], dim=-1),
        cell * c.cell - low.flip(-1)[:, None],
        comes.to(what.dtype),
        torch.full_like(comes, torch.inf, dtype=what.dtype),
    )
