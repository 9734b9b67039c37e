"""Scenes of scattered glyphs, composed in batches on the device, with their ground truth."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spairkit.config import DataConfig
from spairkit.data.glyphs import Split, load_glyphs, resize
from spairkit.data.hashing import below, hashed, seeded
from spairkit.data.scatter import Layout, scatter
from spairkit.detections import Truth
from spairkit.errors import InputError

_MAX_ATTEMPTS = 1000
_MAX_TABLE_BYTES = 1 << 31
# elements of the map of positions worked on at once
_MAX_POSITIONS = 1 << 24
_SPLITS = {"train": 0, "validation": 1, "test": 2}
# what a random word is for: the last counter but the object's number
_COUNT, _CLASS, _GLYPH, _COLOUR, _BACKGROUND, _SIDE, _PLACE = range(7)
_DARK = 64


@dataclass(frozen=True, eq=False)
class Batch:
    """Images and what is in them; objects beyond an image's count are zeros and label -1."""

    images: Tensor  # [B, 3, H, W] float32 in [0, 1]
    boxes: Tensor  # [B, N, 4] float32 xyxy, pixels, half-open
    labels: Tensor  # [B, N] int64, -1 = none
    counts: Tensor  # [B] int64

    def truth(self) -> list[Truth]:
        """The objects of each image, on the CPU."""
        boxes, labels = self.boxes.cpu(), self.labels.cpu()
        return [
            Truth(boxes[b, :count], labels[b, :count])
            for b, count in enumerate(self.counts.tolist())
        ]


class Scenes:
    """Images with glyphs scattered by the paper's rule (spec section 10).

    A scene is a function of the dataset's name and options, `config.seed`, the split and the
    scene's index: the same bits on every machine and device and in every batch, since all
    arithmetic up to the last division by 255 is on integers. Its number of objects is uniform
    from `min_objects` to `max_objects`; classes are equally likely, as are the glyphs of a class.
    A glyph's box is the tight, half-open one of its non-zero pixels, hidden or not.

    Glyphs are pasted in turn: pixel + (colour - pixel) * intensity / 255, rounded to a byte each
    time. With `colour = "random"` a glyph has one channel at 255 and two drawn from 0 to 255;
    with `background = "random"` the channels of an image are drawn from 0 to 63.
    """

    has_truth = True

    def __init__(
        self, config: DataConfig, split: Split, device: torch.device | str = "cpu"
    ) -> None:
        """Reads the glyphs and brings them to every size that is asked for.

        Raises:
            InputError: the glyphs cannot be read, or the objects cannot fit the image.
        """
        self.config = config
        self.split: Split = split
        self.device = torch.device(device)
        self._max_overlap_px2 = math.floor(config.max_overlap * config.glyph_size**2 + 1e-6)
        self._least_side = config.glyph_size - config.glyph_jitter
        self._greatest_side = config.glyph_size + config.glyph_jitter
        self._refuse_crowds()
        self._load()
        self._key = seeded(config.seed, _SPLITS[split]).to(self.device)
        self._white = torch.tensor([255.0], device=self.device)

    def __len__(self) -> int:
        """Scenes in the validation or test split. Raises TypeError for train, which has no end."""
        if self.split == "train":
            raise TypeError("the train split has no length: any index is a scene")
        validation = self.split == "validation"
        return self.config.validation_images if validation else self.config.test_images

    @torch.no_grad()
    def batch(self, indices: Tensor) -> Batch:
        """The scenes of these indices ([B] int64, none negative), on the dataset's device.

        Raises:
            ValueError: the indices are not a row of int64.
            InputError: a scene found no layout in 1,000 attempts.
        """
        if indices.dtype != torch.int64 or indices.dim() != 1:
            raise ValueError(
                f"indices must be int64 [B], got {indices.dtype} {list(indices.shape)}"
            )
        config = self.config
        num_objects = config.max_objects
        keys = hashed(self._key, indices.to(self.device))  # [B]
        numbers = torch.arange(num_objects, device=self.device)
        counts = config.min_objects + below(
            hashed(keys, _COUNT), num_objects - config.min_objects + 1
        )
        present = numbers < counts[:, None]  # [B, N]
        classes = below(hashed(keys[:, None], _CLASS, numbers), len(self._class_sizes))
        glyphs = self._class_starts[classes] + below(
            hashed(keys[:, None], _GLYPH, numbers), self._class_sizes[classes]
        )
        layout, sides = self._layout(keys, counts)
        entries = (sides - self._least_side) * self._num_glyphs + glyphs  # [B, N]
        corners = torch.stack([layout.lefts, layout.tops], dim=-1).repeat(1, 1, 2)
        return Batch(
            images=self._compose(keys, entries, present, layout),
            boxes=((self._boxes[entries] + corners) * present[..., None]).float(),
            labels=torch.where(present, self._labels[glyphs], -1),
            counts=counts,
        )

    def _refuse_crowds(self) -> None:
        """Each square but the first covers its area less the allowed overlap, all inside."""
        config = self.config
        area = self._least_side**2
        fresh = max(area - self._max_overlap_px2, 0)
        for side, name in ((config.image_height, "high"), (config.image_width, "wide")):
            if self._greatest_side > side:
                raise InputError(f"a glyph of {self._greatest_side} px is not {side} px {name}")
        if area + (config.max_objects - 1) * fresh > config.image_height * config.image_width:
            raise InputError(f"{self._described()}: more area than the image has; {_REMEDY}")

    def _described(self) -> str:
        config = self.config
        return (
            f"{config.max_objects} glyphs of {config.glyph_size} px overlapping by at most "
            f"{config.max_overlap:g} in {config.image_height}x{config.image_width} px"
        )

    def _load(self) -> None:
        """The table of glyphs, each size in turn, as bytes in the upper left of equal squares."""
        config = self.config
        loaded = load_glyphs(config, self.split)
        sides = range(self._least_side, self._greatest_side + 1)
        if len(sides) * len(loaded) * self._greatest_side**2 > _MAX_TABLE_BYTES:
            raise InputError(
                f"data: {len(loaded)} glyphs in {len(sides)} sizes of up to "
                f"{self._greatest_side} px need more than 2 GiB; lower glyph_size or glyph_jitter"
            )
        table = np.zeros((len(sides), len(loaded), self._greatest_side, self._greatest_side), "u1")
        for of_side, side in zip(table, sides, strict=True):
            of_side[:, :side, :side] = resize(loaded.images, side, full=loaded.full)
        visible = table.any((2, 3)).all(0)
        if not visible.any():
            raise InputError(f"data: no glyph is visible at {self._least_side} px")
        # by class, so that a class is a range
        order = np.argsort(loaded.labels, kind="stable")
        order = order[visible[order]]
        table, labels = table[:, order], loaded.labels[order]
        _, starts, sizes = np.unique(labels, return_index=True, return_counts=True)
        self._num_glyphs = len(order)
        self._table = torch.from_numpy(table.reshape(len(sides) * len(order), -1)).to(self.device)
        self._boxes = torch.from_numpy(_tight_boxes(table)).to(self.device)
        self._labels = torch.from_numpy(labels).to(self.device)
        self._class_starts = torch.from_numpy(starts).to(self.device)
        self._class_sizes = torch.from_numpy(sizes).to(self.device)

    def _layout(self, keys: Tensor, counts: Tensor) -> tuple[Layout, Tensor]:
        """Places and sides [B, N]; what finds no layout is begun anew, with all its squares."""
        config = self.config
        layout, sides = self._attempt(keys, counts, 0)
        for attempt in range(1, _MAX_ATTEMPTS):
            left = (~layout.complete).nonzero().squeeze(1)
            if len(left) == 0:
                return layout, sides
            again, sides[left] = self._attempt(keys[left], counts[left], attempt)
            layout.tops[left], layout.lefts[left] = again.tops, again.lefts
            layout.complete[left] = again.complete
        raise InputError(
            f"{self._described()}: no layout in {_MAX_ATTEMPTS} attempts; {_REMEDY}"
            if config.glyph_jitter == 0
            else f"{self._described()} (give or take {config.glyph_jitter} px): no layout in "
            f"{_MAX_ATTEMPTS} attempts; {_REMEDY}"
        )

    def _attempt(self, keys: Tensor, counts: Tensor, attempt: int) -> tuple[Layout, Tensor]:
        config = self.config
        numbers = torch.arange(config.max_objects, device=self.device)
        spread = self._greatest_side - self._least_side + 1
        sides = self._least_side + below(
            hashed(keys[:, None], _SIDE, numbers, attempt), spread
        )  # [B, N]
        positions = (config.image_height - self._least_side + 1) * (
            config.image_width - self._least_side + 1
        )
        bits = hashed(keys[:, None], _PLACE, numbers, attempt)
        step = max(_MAX_POSITIONS // positions, 1)
        parts = [
            scatter(
                bits[start : start + step],
                counts[start : start + step],
                sides[start : start + step],
                least_side=self._least_side,
                height=config.image_height,
                width=config.image_width,
                max_overlap_px2=self._max_overlap_px2,
            )
            for start in range(0, max(len(keys), 1), step)
        ]
        tops, lefts, complete = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("tops", "lefts", "complete")
        )
        return Layout(tops, lefts, complete), sides

    def _compose(self, keys: Tensor, entries: Tensor, present: Tensor, layout: Layout) -> Tensor:
        """[B, 3, H, W] float32. The canvas has a rim for the empty parts of smaller glyphs."""
        config = self.config
        patch = torch.arange(self._greatest_side, device=self.device)
        height = config.image_height + self._greatest_side - self._least_side
        width = config.image_width + self._greatest_side - self._least_side
        offsets = (patch[:, None] * width + patch).flatten()  # [P * P]
        pixels = (layout.tops * width + layout.lefts)[..., None] + offsets  # [B, N, P * P]
        alpha = self._table[entries].int() * present[..., None]  # [B, N, P * P]
        grey = config.colour == "white" and config.background == "black"
        num_channels = 1 if grey else 3
        canvas = self._backgrounds(keys, num_channels).expand(-1, -1, height * width).contiguous()
        colours = self._colours(keys, num_channels)  # [B, N, C, 1]
        for k in range(entries.shape[1]):
            where = pixels[:, k, None].expand(-1, num_channels, -1)  # [B, C, P * P]
            intensity = alpha[:, k, None]
            under = canvas.gather(2, where)
            mixed = under * (255 - intensity) + colours[:, k] * intensity + 127
            # the quotient by 255, exact below 2^16
            canvas.scatter_(2, where, (mixed + 1 + (mixed >> 8)) >> 8)
        image = canvas.view(-1, num_channels, height, width)
        image = image[:, :, : config.image_height, : config.image_width].float()
        # by a tensor on the device: by a number, CUDA multiplies by the reciprocal
        return (image / self._white).expand(-1, 3, -1, -1).contiguous()

    def _backgrounds(self, keys: Tensor, num_channels: int) -> Tensor:  # [B, C, 1] int32
        channels = torch.arange(num_channels, device=self.device)
        if self.config.background == "black":
            return torch.zeros(len(keys), num_channels, 1, dtype=torch.int32, device=self.device)
        return below(hashed(keys[:, None], _BACKGROUND, channels), _DARK).int()[..., None]

    def _colours(self, keys: Tensor, num_channels: int) -> Tensor:  # [B, N, C, 1] int32
        channels = torch.arange(num_channels, device=self.device)
        numbers = torch.arange(self.config.max_objects, device=self.device)
        if self.config.colour == "white":
            shape = (len(keys), len(numbers), num_channels, 1)
            return torch.full(shape, 255, dtype=torch.int32, device=self.device)
        own = hashed(keys[:, None], _COLOUR, numbers)[..., None]  # [B, N, 1]
        values = below(hashed(own, channels), 256)
        brightest = below(hashed(own, num_channels), num_channels)
        return torch.where(channels == brightest, 255, values).int()[..., None]


_REMEDY = "lower data.max_objects or raise data.max_overlap or the image's size"


def _tight_boxes(table: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[sizes * glyphs, 4] xyxy half-open of the non-zero pixels of [sizes, glyphs, P, P]."""
    side = table.shape[-1]
    spans = []
    for axis in (2, 3):  # what is left over rows gives x, over columns y
        lit = table.any(axis).reshape(-1, side)
        spans.append((lit.argmax(1), side - lit[:, ::-1].argmax(1)))
    (x1, x2), (y1, y2) = spans
    return np.stack([x1, y1, x2, y2], axis=1).astype(np.int64)
