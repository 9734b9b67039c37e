"""Scenes of cards of the game SET, some of which hold a set (main text, section 5.3).

    cards = Cards(DataConfig(name="cards", min_objects=7, max_objects=7), "train")
    batch = cards.batch(torch.arange(32))
    has_set(batch.labels)  # [32] bool, half of them True

A card has one of three colours, shapes and numbers of black strokes; its label is
9 colour + 3 shape + strokes - 1. Three cards are a set if each attribute has one value on all of
them or three values.
"""

from functools import cache
from itertools import chain, combinations
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spairkit.data.hashing import below, draws
from spairkit.data.scenes import Batch, Scenes, tight_boxes

NUM_CARDS = 27
"""Of the pack."""

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
"""Of the shapes: red, green, blue."""

BACKGROUNDS = ((0, 255, 255), (255, 0, 255), (255, 255, 0))
"""Of the images: cyan, magenta, yellow."""

SHAPES = ("circle", "square", "diamond")
"""In the order of the labels."""

# purposes of random words: whether there is a set, background, cards, the order of their drawing
_HAS_SET, _GROUND, _HAND, _ORDER = 0, 9, 14, 15
_UNITS = 14  # of the side of a card, in which strokes are measured
_FINE = 8  # points across a pixel, whose share inside is its opacity
_BLACK = (0, 0, 0)


class Cards(Scenes):
    """Images with cards scattered as glyphs are, each card at most once in an image.

    A scene is a function of the config, the split and its index, as those of `Scenes`. Whether it
    holds a set is drawn first, with probability 1/2; then its cards, uniformly among all
    combinations of `max_objects` cards that do or do not, and the order in which they are drawn.
    The background is cyan, magenta or yellow. The box of a card is that of its shape.
    """

    def _load(self) -> None:
        """Makes the table, of three shapes and one to three strokes, and all hands."""
        patches = drawn_patches(self.config.glyph_size)
        self._table = torch.from_numpy(patches).flatten(1).to(self.device)
        self._boxes = torch.from_numpy(tight_boxes(patches)).to(self.device)
        without, with_set = hands(self.config.max_objects)
        self._hands = torch.from_numpy(np.concatenate([without, with_set])).to(self.device)
        self._starts = torch.tensor([0, len(without)], device=self.device)
        self._sizes = torch.tensor([len(without), len(with_set)], device=self.device)
        self._lights = torch.tensor([*COLOURS, _BLACK], dtype=torch.int32, device=self.device)
        self._grounds = torch.tensor(BACKGROUNDS, dtype=torch.int32, device=self.device)

    def _make_exactly(self, keys: Tensor) -> Batch:  # [B]
        num_cards = self.config.max_objects
        has = below(draws(keys, _HAS_SET), 2)
        number = below(draws(keys, _HAND), self._sizes[has])
        hand = self._hands[self._starts[has] + number].long()
        words = self._draws(keys, slice(_ORDER, _ORDER + 1))[:, 0]  # [B, N]
        cards = hand.gather(1, words.argsort(dim=1, stable=True))
        counts = torch.full_like(keys, num_cards)
        corners, _, complete = self._layout(keys, counts)  # [B, N, 2], [B]
        self._unplaced.logical_or_(complete.logical_not().any())
        shapes = cards // 3 % 3
        boxes = self._boxes[shapes] + corners.flip(-1).repeat(1, 1, 2)
        # each card is pasted in two parts, of which the second one is black
        entries = torch.stack([shapes, 3 + cards % 3], dim=2).flatten(1)  # [B, 2 N]
        lights = torch.stack([cards // 9, torch.full_like(cards, 3)], dim=2).flatten(1)
        return Batch(
            images=self._drawn(keys, entries, corners.repeat_interleave(2, 1), lights),
            boxes=boxes.float(),
            labels=cards,
            counts=counts,
        )

    def _drawn(self, keys: Tensor, entries: Tensor, corners: Tensor, lights: Tensor) -> Tensor:
        """[B, 3, H, W] float32."""
        colours = self._lights[lights][..., None]  # [B, 2 N, 3, 1]
        grounds = self._grounds[below(draws(keys, _GROUND), 3)][..., None]  # [B, 3, 1]
        return self._painted(entries, corners, colours, grounds)


def third_cards(device: torch.device | str = "cpu") -> Tensor:  # [27, 27] int64
    """The card that makes a set with two others; the card itself on the diagonal."""
    cards = torch.arange(NUM_CARDS, device=device)
    digits = torch.stack([cards // 9, cards // 3 % 3, cards % 3])  # [3, 27]
    # of three values that are all equal or all different the sum is divisible by three
    thirds = -(digits[:, :, None] + digits[:, None]) % 3
    return 9 * thirds[0] + 3 * thirds[1] + thirds[2]


def has_set(labels: Tensor) -> Tensor:  # [B, N] int64 -> [B] bool
    """Whether three of the cards of each image are a set.

    Args:
        labels: of cards that differ from each other; -1 for none.
    """
    thirds = third_cards(labels.device)[labels[:, :, None], labels[:, None]]  # [B, N, N]
    known = labels >= 0
    pairs = (known[:, :, None] & known[:, None]).tril(-1)
    held = (thirds[..., None] == labels[:, None, None]).any(-1)
    return (held & pairs).flatten(1).any(1)


@cache
def hands(num_cards: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """All combinations of so many of the 27 cards, without a set and with one, [n, num_cards]."""
    of_pack = combinations(range(NUM_CARDS), num_cards)
    size = comb(NUM_CARDS, num_cards) * num_cards
    every = np.fromiter(chain.from_iterable(of_pack), np.uint8, size).reshape(-1, num_cards)
    held = np.bitwise_or.reduce(np.int32(1) << every.astype(np.int32), axis=1)
    thirds = third_cards().tolist()
    sets = {frozenset((a, b, thirds[a][b])) for a, b in combinations(range(NUM_CARDS), 2)}
    has = np.zeros(len(every), dtype=bool)
    for cards in sets:
        mask = sum(1 << card for card in cards)
        has |= held & mask == mask
    return every[~has], every[has]


def drawn_patches(side: int) -> NDArray[np.uint8]:
    """[7, side, side]: the opacity of three shapes, of one to three strokes, and of nothing."""
    # the middles of small squares, in halves of one, so that all is exact
    points = 2 * np.arange(side * _FINE) + 1
    total = 2 * side * _FINE
    y, x = abs(2 * points[:, None] - total), abs(2 * points - total)  # from the middle, doubled
    shapes = [
        x**2 + y**2 <= total**2,
        np.ones((len(points), len(points)), dtype=bool),
        x + y <= total,
    ]
    units = points * _UNITS / total
    high = abs(units - _UNITS / 2)[:, None] < 3
    strokes = []
    for number in (1, 2, 3):
        # one unit wide and one apart
        place = units - (_UNITS // 2 - number)
        strokes.append(high & (place >= 0) & (place < 2 * number) & (place % 2 < 1))
    inside = np.stack([*shapes, *strokes, np.zeros_like(shapes[1])])
    shares = inside.reshape(len(inside), side, _FINE, side, _FINE).sum((2, 4))
    opacity: NDArray[np.uint8] = ((2 * 255 * shares + _FINE**2) // (2 * _FINE**2)).astype(np.uint8)
    return opacity
