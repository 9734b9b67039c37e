"""`PosteriorSearch`: objects found by the encoder, then improved by the model's own probability.

The encoder guesses once. The search starts from its guess, redraws the boxes tightly (`reframe`),
lowers the energy by gradients (`refine`), and then tries births, deaths, merges and splits
(`propose`, `judge`) until none lowers the energy. All of it is deterministic.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spairkit.boxes import box_area
from spairkit.counts import CountPosterior
from spairkit.detections import Detections, Explanation
from spairkit.images import num_channels
from spairkit.models.latents import Latents
from spairkit.models.parts import Part
from spairkit.models.slots import Slots
from spairkit.models.spair import SPAIR
from spairkit.search.calibration import Calibration
from spairkit.search.energy import Energy, Scene
from spairkit.search.moves import (
    MOVE_ITERATIONS,
    TOLERANCE,
    Moves,
    Outcomes,
    judge,
    support,
)
from spairkit.search.proposals import Array, overlaps, propose, typical_sizes
from spairkit.search.refine import refine
from spairkit.search.reframe import reframe
from spairkit.search.trust import doubted_count, ranked, trust
from spairkit.search.watershed_start import watershed_slots

_ITERATIONS = 100  # of refinement, at most
_CROWDED, _FEW = 0.7, 16  # share of cells with an object, and objects, that leave no moves
_ROUNDS = 6  # of moves, at most
_WINDOW = 3.5  # side of a window, in typical sides of the image's objects
_WINDOW_STEP = 16  # windows have a side that is a multiple of this, px
_SLOTS_PER_CELL = 2  # that the count prior allows for
_STAYS = 0.5  # IoU of an object's boxes before and after refinement, at least
_FRAME = 0.1  # share of an object's height where tight boxes end if masks end nowhere

_Cost = tuple[float, Array]  # of a rejected object, nats, and the region that it would change

Progress = Callable[[str, float], None]
"""Called with the name of a phase and the share of it that is done."""


@dataclass(frozen=True, eq=False)
class Found:
    """The state that the search ends with."""

    scene: Scene
    slots: Slots  # `saved` is what each object saves
    costs: list[Tensor]  # of each image [m]: energies that rejected further objects would cost
    part: Part | None = None
    encoded: Tensor | None = None
    """[B, M, 4] boxes of the encoder's objects, xyxy, px, if the search starts from others; empty
    ones for no object."""


class PosteriorSearch:
    """Finds objects with a trained SPAIR by search; takes the network's place in a detector.

    Args:
        network: in evaluation mode.
        mode: "refine" lowers the energy of the encoder's objects; "full" also tries moves.
        beta: weight of the KL terms in the energy.
        calibration: of scores and counts.
        on_progress: called at each check of a refinement and at each round of moves.
        start: "watershed" begins with the parts that a watershed finds; with moves, of each image
            these or the encoder's objects, whichever has the lower energy. Confidences then follow
            the shapes of masks, and whether the encoder finds the same object.
    """

    def __init__(
        self,
        network: SPAIR,
        mode: Literal["refine", "full"],
        beta: float,
        calibration: Calibration,
        on_progress: Progress = lambda phase, share: None,
        start: Literal["encoder", "watershed"] = "encoder",
    ) -> None:
        self.network, self.mode, self.calibration = network, mode, calibration
        self.start = start
        self.on_progress = on_progress
        self.energy = Energy(network, beta)

    @torch.no_grad()
    def detect(
        self,
        images: Tensor,
        threshold: float = 0.5,
        *,
        box_contrast: float | None = None,
        part: Part | None = None,
    ) -> list[Detections]:
        """The objects of each image. Arguments and errors as in `SPAIR.detect`.

        Args:
            part: of a larger image, if that is what each of the images is.
        """
        return self.describe(self.find(images, box_contrast, part), threshold, box_contrast)

    @torch.no_grad()
    def explain(
        self,
        images: Tensor,
        threshold: float = 0.5,
        *,
        box_contrast: float | None = None,
        part: Part | None = None,
    ) -> list[Explanation]:
        """The objects, their appearances and the reconstruction, as `SPAIR.explain`.

        The reconstruction shows all objects of the state, whatever the threshold.
        """
        found = self.find(images, box_contrast, part)
        detections = self.describe(found, threshold, box_contrast)
        chosen = torch.zeros_like(found.slots.present, dtype=torch.bool)
        for b, item in enumerate(detections):
            assert item.labels is not None
            chosen[b, item.labels.long() - 1] = True
        maps = self.network.decode(found.slots.what)
        drawn = self.energy.draw(found.scene, found.slots).clamp(0, 1)
        return Explanation.of_batch(chosen, detections, images, drawn, maps)

    @torch.no_grad()
    def find(
        self, images: Tensor, box_contrast: float | None = None, part: Part | None = None
    ) -> Found:
        """Searches each image by itself.

        Args:
            images: [B, 3, H, W] in [0, 1], any height and width.
            box_contrast: as in `SPAIR.detect`; boxes are tightened to it before the search.
            part: as in `detect`.
        """
        latents, background = self.network.infer(images, part=part)
        rows, columns = self.network.grid(images.shape[-2], images.shape[-1])
        slots = Slots.of(latents, columns, self.network.config.cell)
        batch = len(images)
        if part:
            rows, columns = self.network.grid(*part.size)
        scene = Scene(
            images,
            background,
            num_channels(images),
            evidence=images.new_ones(batch),
            outside=images.new_full((batch,), part.outside if part else 0),
            places=images.new_full((batch,), rows * columns * _SLOTS_PER_CELL),
        )
        contrast = self.network.config.box_contrast if box_contrast is None else box_contrast
        framed = [reframe(self.energy, scene, slots.compact(), contrast or _FRAME, part)]
        if self.start == "watershed":
            guess = self._present_boxes(framed[0])
            parts = watershed_slots(self.network, images, latents, guess, part)
            framed.append(reframe(self.energy, scene, parts, contrast or _FRAME, part))
        starts = [self._refined(scene, start) for start in framed]
        if self.network.config.likelihood == "normal":
            # the last start has the fewest objects for the same things, so it hides no misfit
            scene = replace(scene, evidence=self.energy.evidence(scene, starts[-1]))
            starts = [self._refined(scene, start) for start in starts]
        encoded = self._present_boxes(starts[0]) if self.start == "watershed" else None
        if self.start == "watershed" and self.mode == "refine":
            slots = self._returned(framed[-1], starts[-1])
        else:
            slots = self._lower(scene, starts)
        costs: list[Tensor] = [images.new_zeros(0).cpu()] * batch
        if self.mode == "full":
            slots, costs = self._move(scene, slots, latents, part)
        return Found(scene, self._measured(scene, slots, latents), costs, part, encoded)

    def _present_boxes(self, slots: Slots) -> Tensor:  # [B, N, 4], CPU
        """The boxes of present objects; empty ones elsewhere."""
        return torch.where(slots.present[..., None] > 0, self.energy.boxes(slots), 0.0).cpu()

    def _returned(self, before: Slots, after: Slots) -> Slots:
        """The refined objects, but those that left their places as they were before."""
        first, last = self.energy.boxes(before), self.energy.boxes(after)
        low = torch.maximum(first[..., :2], last[..., :2])
        high = torch.minimum(first[..., 2:], last[..., 2:])
        shared = (high - low).clamp(min=0).prod(-1)
        union = box_area(first) + box_area(last) - shared
        stays = (shared > _STAYS * union)[..., None]
        return after.changed(torch.where(stays, after.latents, before.latents))

    def _lower(self, scene: Scene, starts: list[Slots]) -> Slots:
        """Of each image the start of lowest energy."""
        if len(starts) == 1:
            return starts[0]
        lowest = torch.stack([self.energy(scene, start) for start in starts]).argmin(0)
        rows = [starts[k].select(slice(b, b + 1)) for b, k in enumerate(lowest.tolist())]
        return Slots.stack(rows).compact()

    def _refined(self, scene: Scene, slots: Slots) -> Slots:
        shown = partial(self.on_progress, "refining objects")
        return refine(
            self.energy, scene, slots, tolerance=TOLERANCE, most=_ITERATIONS, on_check=shown
        )[0]

    def _move(
        self, scene: Scene, slots: Slots, latents: Latents, part: Part | None = None
    ) -> tuple[Slots, list[Tensor]]:
        """Tries moves until none lowers the energy; also the costs of rejected objects."""
        rejected: list[list[_Cost]] = [[] for _ in range(len(slots.present))]
        near: list[Array] | None = None
        moved: set[int] = set()
        # where objects fill the grid, the model does not fit the image, and moves take minutes
        cells = latents.presence.shape[1]
        crowded = (slots.count > _CROWDED * cells) & (slots.count > _FEW)
        for number in range(_ROUNDS):
            self._show_moves(number, 0.0)
            typical = typical_sizes(self.energy, slots, latents)
            moves = propose(self.energy, scene, slots, latents, typical, near)
            moves = moves.select(~crowded[moves.image])
            if not len(moves):
                break
            side = slots.latents.new_tensor(typical.max(1))[moves.image]
            sides = torch.maximum(_WINDOW * side, moves.extent(self.energy.boxes(slots)) + 2 * side)
            shown = partial(self._show_moves, number)
            outcomes = self._judged(scene, slots, latents, moves, sides, on_chunk=shown)
            chosen, near = _best(moves, outcomes, len(rejected))
            slots = _remember(slots, moves, outcomes, near, rejected)
            if not chosen:
                break
            slots = _applied(slots, moves, outcomes, chosen)
            moved |= set(moves.image[chosen].tolist())
        if part:
            rejected = [
                [item for item in items if part.holds(torch.from_numpy(item[1]))]
                for items in rejected
            ]
        costs = [_apart(items) for items in rejected]
        if moved:
            rows = torch.tensor(sorted(moved), device=slots.latents.device)
            refined = self._refined(scene.select(rows), slots.select(rows))
            slots = slots.changed(slots.latents.index_copy(0, rows, refined.latents))
        return slots, costs

    def _show_moves(self, number: int, share: float) -> None:
        self.on_progress("trying moves", (number + share) / _ROUNDS)

    def _judged(
        self,
        scene: Scene,
        slots: Slots,
        latents: Latents,
        moves: Moves,
        sides: Tensor,  # [P] of the windows, px
        iterations: int = MOVE_ITERATIONS,
        on_chunk: Callable[[float], None] = lambda share: None,
    ) -> Outcomes:
        """The outcome of each move, in windows of at least these sides."""
        extent = max(scene.images.shape[-2:])
        steps = (sides / _WINDOW_STEP).ceil().clamp(min=2)
        windows = (steps * _WINDOW_STEP).clamp(max=extent).long()
        parts, order = [], []
        for side in sorted(set(windows.tolist())):
            index = (windows == side).nonzero()[:, 0]
            part = moves.select(index)
            judged = judge(self.energy, scene, slots, latents.std, part, side, iterations, on_chunk)
            parts.append(judged)
            order.append(index)
        return Outcomes.join(parts).select(torch.cat(order).argsort())

    def _measured(self, scene: Scene, slots: Slots, latents: Latents) -> Slots:
        """Sets `saved` to the least known cost of removing each object.

        The full search also removes objects that cost energy, since its moves try no death of an
        object that overlaps no other one.
        """
        while True:
            image, slot = (slots.present > 0).nonzero(as_tuple=True)
            if not len(image):
                return slots
            deaths = Moves.deaths(image, slot)
            boxes = support(self.energy.boxes(slots)[image, slot], self.network.config.object_size)
            sides = (boxes[:, 2:] - boxes[:, :2]).amax(1) + 2  # windows lie at whole pixels
            outcomes = self._judged(scene, slots, latents, deaths, sides, iterations=0)
            chosen, _ = _best(deaths, outcomes, len(slots.present))
            if not chosen or self.mode == "refine":
                break
            slots = _applied(slots, deaths, outcomes, chosen)
        saved = slots.saved.clone()
        saved[image, slot] = torch.minimum(saved[image, slot], outcomes.change)
        return replace(slots, saved=saved)

    def describe(
        self, found: Found, threshold: float, box_contrast: float | None
    ) -> list[Detections]:
        """The objects of each image with a score above `threshold`, with masks and counts."""
        scores = self.calibration.score(found.slots.saved)
        images, background = found.scene.images, found.scene.background
        if found.encoded is None:
            described = self.network.detections(
                images, background, found.slots, scores, threshold, box_contrast
            )
            counts = self._counts(found)
        else:
            described = self.network.detections(
                images, background, found.slots, scores, 0.0, box_contrast, magnified=True
            )
            counts = []
            for b, item in enumerate(described):
                trusted = trust(item, images[b], found.encoded[b])
                item = replace(item, scores=ranked(item.scores, trusted))
                counts.append(doubted_count(item.scores[self._counted(found, item)]))
                described[b] = item[item.scores > threshold]
        return [replace(item, counts=count) for item, count in zip(described, counts, strict=True)]

    def _counted(self, found: Found, item: Detections) -> Tensor:  # [n] bool
        """The objects of an image that are above 1/2 and, of a tile, its own."""
        certain = item.scores > 0.5
        return certain & found.part.holds(item.boxes) if found.part else certain

    def _counts(self, found: Found) -> list[CountPosterior]:
        """p(C | image) of each image, from the energies of the moves that were tried.

        Moves in different places change the energy independently, so each object that is held is
        there with its score as probability, and each rejected one with a probability by its cost.
        """
        scores = self.calibration.score(found.slots.saved).cpu()
        held = (found.slots.present > 0).cpu()
        if found.part:
            held = held & found.part.holds(self.energy.boxes(found.slots)).cpu()
        return [
            CountPosterior.independent(
                torch.cat([scores[b, held[b]], self.calibration.missed(costs)]).double()
            )
            for b, costs in enumerate(found.costs)
        ]


class _Regions:
    """Regions that lie apart from each other."""

    def __init__(self, most: int) -> None:
        self._held, self._number = np.empty((most, 4)), 0

    def add(self, region: Array) -> bool:
        """Adds a region [4] unless it overlaps one that is held; whether it was added."""
        if overlaps(region, self._held[: self._number]).any():
            return False
        self._held[self._number] = region
        self._number += 1
        return True


def _best(moves: Moves, outcomes: Outcomes, batch: int) -> tuple[list[int], list[Array]]:
    """The moves to make: the best first, unless one that is made changes the same pixels.

    Returns:
        Their indices, and for each image the regions [n, 4] in which moves lower the energy.
    """
    image = moves.image.tolist()
    change, region = outcomes.change.cpu().numpy(), outcomes.region.double().cpu().numpy()
    chosen: list[int] = []
    near: list[list[Array]] = [[] for _ in range(batch)]
    good = [p for p in np.argsort(change, kind="stable").tolist() if change[p] < 0]
    taken = [_Regions(len(good)) for _ in range(batch)]
    for p in good:
        b = image[p]
        near[b].append(region[p])
        if taken[b].add(region[p]):
            chosen.append(p)
    return chosen, [np.stack(part) if part else np.zeros((0, 4)) for part in near]


def _remember(
    slots: Slots, moves: Moves, outcomes: Outcomes, near: list[Array], rejected: list[list[_Cost]]
) -> Slots:
    """Notes what rejected moves would have cost, and forgets this where the state is to change.

    Returns:
        The slots, with `saved` of the objects whose death or merge was rejected.
    """
    saved = slots.saved.cpu().clone()
    region, change = outcomes.region.double().cpu().numpy(), outcomes.change.tolist()
    removed, balance = moves.removed.cpu(), moves.balance.tolist()
    for b, stale in enumerate(near):
        rejected[b] = [item for item in rejected[b] if not overlaps(item[1], stale).any()]
    image = moves.image.tolist()
    # deaths first, because a merge is charged to the object that saves less
    for p in sorted(range(len(image)), key=lambda p: int((removed[p] >= 0).sum())):
        b = image[p]
        if not 0 <= change[p] < math.inf or overlaps(region[p], near[b]).any():
            continue
        if balance[p] > 0:
            rejected[b].append((change[p], region[p]))
        elif balance[p] < 0:
            gone = removed[p][removed[p] >= 0]
            slot = gone[saved[b, gone].argmin()]
            saved[b, slot] = min(float(saved[b, slot]), change[p])
    return replace(slots, saved=saved.to(slots.saved.device))


def _applied(slots: Slots, moves: Moves, outcomes: Outcomes, chosen: list[int]) -> Slots:
    """The state after moves whose pixels lie apart from each other."""
    number = slots.present.shape[1]
    born: dict[int, list[tuple[int, int]]] = {}  # of each image: moves, and their new slots
    for p in chosen:
        new = (outcomes.slots.present[p, -2:] > 0).nonzero()[:, 0].tolist()
        born.setdefault(int(moves.image[p]), []).extend((p, i - 2) for i in new)
    slots = slots.padded(number + max(map(len, born.values())))
    latents, std, corner, present, saved = (
        x.clone() for x in (slots.latents, slots.std, slots.corner, slots.present, slots.saved)
    )
    for p in chosen:
        b, index = int(moves.image[p]), outcomes.index[p]
        stays = index >= 0
        latents[b, index[stays]] = outcomes.slots.latents[p, :-2][stays]
        saved[b, index[stays]] = torch.inf
        present[b, moves.removed[p][moves.removed[p] >= 0]] = 0
    for b, items in born.items():
        for place, (p, i) in enumerate(items, start=number):
            latents[b, place] = outcomes.slots.latents[p, i]
            std[b, place] = outcomes.slots.std[p, i]
            corner[b, place] = outcomes.slots.corner[p, i]
            present[b, place] = 1
    return Slots(latents, std, corner, present, saved).compact()


def _apart(items: list[_Cost]) -> Tensor:  # [m]
    """The least costs of rejected objects that lie apart from each other."""
    taken = _Regions(len(items))
    ordered = sorted(items, key=lambda item: item[0])
    return torch.tensor([cost for cost, region in ordered if taken.add(region)])
