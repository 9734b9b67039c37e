"""Scenes of scattered glyphs, composed in batches on the device, with their ground truth."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spairkit.backends import chosen_backend
from spairkit.config import DataConfig
from spairkit.data.glyphs import Split, load_glyphs, resize
from spairkit.data.hashing import below, draws, hashed, seeded
from spairkit.detections import Truth
from spairkit.errors import InputError

_MAX_ATTEMPTS = 1000
_MAX_TABLE_BYTES = 1 << 31
# elements of the map of positions worked on at once
_MAX_POSITIONS = 1 << 20
# scenes made before they are asked for
_BATCHES_AHEAD = 8
_MAX_PIXELS_AHEAD = {"cpu": 1 << 20, "cuda": 1 << 24}  # a GPU waits while they are made
_MOST_STRIDE = 1 << 16
_SPLITS = {"train": 0, "validation": 1, "test": 2}
# purposes of random words; the counter of a word is purpose + 16 (object + 256 attempt)
_COUNT = 0
_GLYPHS, _SQUARES = slice(1, 3), slice(3, 5)  # class and glyph; side and place
_COLOURS, _BACKGROUNDS = slice(5, 9), slice(9, 12)
_CROPS = slice(12, 14)  # top and left
_PURPOSES = 16
_MOST_OBJECTS = 256
_WORDS = [_SQUARES.start, _PURPOSES, _PURPOSES * _MOST_OBJECTS]
_DARK = 64


@dataclass(frozen=True, eq=False)
class Batch:
    """Images and their objects; objects beyond the count of an image are zero, with label -1."""

    images: Tensor  # [B, 3, H, W] float32 in [0, 1]
    boxes: Tensor  # [B, N, 4] float32 xyxy, pixels, half-open
    labels: Tensor  # [B, N] int64, -1 = none
    counts: Tensor  # [B] int64
    crowds: Tensor | None = None
    """[B, M, 4], as in `Truth`, empty beyond the number of an image; None where there are none."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device; copies of pinned memory to a GPU are not waited for."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor changed by a function."""
        images, boxes, labels, counts = map(
            change, (self.images, self.boxes, self.labels, self.counts)
        )
        crowds = None if self.crowds is None else change(self.crowds)
        return Batch(images, boxes, labels, counts, crowds)

    def part(self, which: slice | Tensor) -> "Batch":
        """Some of its images, in the order of `which`."""
        return self.each(lambda tensor: tensor[which])

    def truth(self) -> list[Truth]:
        """The objects of each image, on the CPU."""
        boxes, labels = self.boxes.cpu(), self.labels.cpu()
        crowds = boxes[:, :0] if self.crowds is None else self.crowds.cpu()
        there = (crowds[..., 2:] > crowds[..., :2]).all(-1)
        return [
            Truth(boxes[b, :count], labels[b, :count], crowds[b, there[b]])
            for b, count in enumerate(self.counts.tolist())
        ]


class Scenes:
    """Images with glyphs scattered by the paper's rule (docs/model.md 10).

    A scene is a function of the config, the split and its index. It has the same bits on every
    machine and device and in every batch, because all arithmetic before the last division by 255 is
    on integers. The number of objects is uniform from `min_objects` to `max_objects`; classes are
    equally likely, as are the glyphs of a class. The box of a glyph is the tight, half-open box of
    its non-zero pixels, visible or not.

    Glyphs are pasted in turn: pixel + (colour - pixel) * intensity / 255, rounded to a byte each
    time. With `colour = "random"` a glyph has one channel at 255 and two drawn from 0 to 255; with
    `background = "random"` the channels of an image are drawn from 0 to 63.

    With `scene_height` and `scene_width` the train and validation splits are crops of scenes, at
    places drawn uniformly. Boxes are then cut at the ends of the crop, and only objects of which
    some of the box is inside count.

    With `train_images` the train split has that many scenes, and index i is scene i modulo their
    number.

    Attributes:
        fused: whether one Triton kernel makes the layouts and one the images, as on a GPU. Plain
            torch makes them otherwise, and waits for the device after every attempt.
    """

    has_truth = True

    def __init__(
        self, config: DataConfig, split: Split, device: torch.device | str = "cpu"
    ) -> None:
        """Reads the glyphs and resizes them to every size in use.

        Raises:
            InputError: the glyphs cannot be read, or the objects cannot fit the image.
        """
        self.config = config
        self.split: Split = split
        self.device = torch.device(device)
        self._max_overlap_px2 = math.floor(config.max_overlap * config.glyph_size**2 + 1e-6)
        self._least_side = config.glyph_size - config.glyph_jitter
        self._greatest_side = config.glyph_size + config.glyph_jitter
        self._limits = {
            "least_side": self._least_side,
            "greatest_side": self._greatest_side,
            "height": config.whole_size[0],
            "width": config.whole_size[1],
            "max_overlap_px2": self._max_overlap_px2,
        }
        self._refuse_crowds()
        self._load()
        self._key = seeded(config.seed, _SPLITS[split]).to(self.device)
        self._numbers = torch.arange(config.max_objects, device=self.device)
        self._purposes = torch.arange(_PURPOSES, device=self.device)
        pixels = _MAX_PIXELS_AHEAD.get(self.device.type, 1 << 20)
        self._most_ahead = pixels // math.prod(config.whole_size)
        crop = config.image_height, config.image_width
        self._crop = crop if split != "test" and crop != config.whole_size else None
        self._white = torch.tensor([255.0], device=self.device)
        on_gpu = self.device.type == "cuda"
        self.fused = on_gpu and chosen_backend("auto", self._numbers, "scenes") == "triton"
        self._unplaced = torch.zeros((), dtype=torch.bool, device=self.device)
        self._last = 1 << 62  # first index of the last call
        self._ahead = 0, 1, self._make(torch.arange(0))

    def __len__(self) -> int:
        """Number of scenes. Raises TypeError for a train split without `train_images`."""
        if self.split == "train":
            if self.config.train_images:
                return self.config.train_images
            raise TypeError("the train split has no length: any index is a scene")
        validation = self.split == "validation"
        return self.config.validation_images if validation else self.config.test_images

    def batch(self, indices: Tensor) -> Batch:
        """The scenes of `indices` ([B] int64, none negative), on the device of the dataset.

        A small batch costs mostly the overhead of its operations. So consecutive indices are made
        together with those of the next calls, predicted from the last call: the following indices,
        or those after a gap, where several processes share the batches.

        Raises:
            ValueError: the indices are not a row of int64.
            InputError: a scene found no layout in 1,000 attempts.
        """
        if indices.dtype != torch.int64 or indices.dim() != 1:
            raise ValueError(
                f"indices must be int64 [B], got {indices.dtype} {list(indices.shape)}"
            )
        size = len(indices)
        turns = min(_BATCHES_AHEAD, self._most_ahead // max(size, 1))
        # reading values on a device would wait for it
        if indices.device.type != "cpu" or not size or turns < 2:
            return self._make(indices)
        first = int(indices[0])
        if not torch.equal(indices, torch.arange(first, first + size)):
            return self._make(indices)
        stride, self._last = first - self._last, first
        start, every, made = self._ahead
        turn, rest = divmod(first - start, every)
        if rest or len(made.counts) != turns * size or not 0 <= turn < turns:
            turn, every = 0, stride if size <= stride <= _MOST_STRIDE else size
            starts = first + every * torch.arange(turns)[:, None]
            made = self._make((starts + torch.arange(size)).flatten())
            self._ahead = first, every, made
        run = slice(turn * size, (turn + 1) * size)
        # cloned, so that a caller may write into its batch
        return made.each(lambda tensor: tensor[run].clone())

    @torch.no_grad()
    def unchecked(self, indices: Tensor) -> Batch:
        """The scenes of `indices` ([B] int64, on the device of the dataset), none made ahead.

        With `fused`, nothing waits for the device and no shape depends on values, so this may be
        part of a CUDA graph, which must not outlive the dataset. A scene without a layout is not
        valid; `check` raises later.
        """
        if self.split == "train" and self.config.train_images:
            indices = indices % self.config.train_images
        # lower precision would change the layouts
        with torch.autocast(self.device.type, enabled=False):
            keys = hashed(self._key, indices)
            whole = self._make_exactly(keys)
            return whole if self._crop is None else _cropped(whole, self._corners(keys), self._crop)

    def check(self) -> None:
        """Waits for the device and checks the scenes made since the last call.

        Raises:
            InputError: a scene found no layout.
        """
        if self._unplaced:
            self._unplaced.zero_()
            raise InputError(
                f"{self._described()}: no layout in {_MAX_ATTEMPTS} attempts; {_REMEDY}"
            )

    def _make(self, indices: Tensor) -> Batch:
        made = self.unchecked(indices.to(self.device))
        self.check()
        return made

    def _make_exactly(self, keys: Tensor) -> Batch:  # [B]
        least, most = self.config.min_objects, self.config.max_objects
        counts = least + below(draws(keys, _COUNT), most - least + 1)
        kind, glyph = self._draws(keys, _GLYPHS).unbind(1)  # [B, N]
        present = self._numbers < counts[:, None]  # [B, N]
        kinds = below(kind, len(self._class_sizes))
        glyphs = self._class_starts[kinds] + below(glyph, self._class_sizes[kinds])
        corners, sides, complete = self._layout(keys, counts)  # [B, N, 2], [B, N], [B]
        self._unplaced.logical_or_(complete.logical_not().any())
        # the last entry of the table is blank
        entries = (sides - self._least_side) * self._num_glyphs + glyphs
        entries = torch.where(present, entries, len(self._table) - 1)  # [B, N]
        boxes = self._boxes[entries] + corners.flip(-1).repeat(1, 1, 2)
        return Batch(
            images=self._compose(keys, entries, corners),
            boxes=(boxes * present[..., None]).float(),
            labels=torch.where(present, self._labels[glyphs], -1),
            counts=counts,
        )

    def _corners(self, keys: Tensor) -> Tensor:  # [B, 2]
        """Top and left of the crop of each scene."""
        assert self._crop is not None
        (height, width), (rows, columns) = self.config.whole_size, self._crop
        places = draws(keys[:, None], self._purposes[_CROPS])
        top, left = below(places[:, 0], height - rows + 1), below(places[:, 1], width - columns + 1)
        return torch.stack([top, left], 1)

    def _refuse_crowds(self) -> None:
        """Refuses more area than the image has: each square adds its area less the overlap."""
        config = self.config
        area = self._least_side**2
        fresh = max(area - self._max_overlap_px2, 0)
        if area + (config.max_objects - 1) * fresh > math.prod(config.whole_size):
            raise InputError(f"{self._described()}: more area than the image has; {_REMEDY}")

    def _described(self) -> str:
        config = self.config
        return (
            f"{config.max_objects} glyphs of {config.glyph_size} px overlapping by at most "
            f"{config.max_overlap:g} in {config.whole_size[0]}x{config.whole_size[1]} px"
        )

    def _load(self) -> None:
        """Makes the table of glyphs: each size in turn, in the upper left of equal squares."""
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
        visible = (table.max((2, 3)) > 0).all(0)
        if not visible.any():
            raise InputError(f"data: no glyph is visible at {self._least_side} px")
        # sorted by class, so that a class is a range
        order = np.argsort(loaded.labels, kind="stable")
        order = order[visible[order]]
        table, labels = table[:, order], loaded.labels[order]
        _, starts, sizes = np.unique(labels, return_index=True, return_counts=True)
        self._num_glyphs = len(order)
        patches = table.reshape(-1, *table.shape[2:])
        patches = np.concatenate([patches, np.zeros_like(patches[:1])])  # [sizes * G + 1, P, P]
        self._table = torch.from_numpy(patches).flatten(1).to(self.device)
        self._boxes = torch.from_numpy(tight_boxes(patches)).to(self.device)
        self._labels = torch.from_numpy(labels).to(self.device)
        self._class_starts = torch.from_numpy(starts).to(self.device)
        self._class_sizes = torch.from_numpy(sizes).to(self.device)

    def _draws(self, keys: Tensor, purposes: slice, attempt: int = 0) -> Tensor:
        """[B, purposes, N] integers in [0, 2^32): one for every object and purpose."""
        counters = self._purposes[purposes, None] + _PURPOSES * (
            self._numbers + _MOST_OBJECTS * attempt
        )
        return draws(keys[:, None, None], counters)

    def _layout(self, keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Corners [B, N, 2] and sides [B, N] of the squares, and whether a scene is complete [B].

        A scene without a layout is tried again with new squares.
        """
        if self.fused:
            from spairkit.kernels.scenes_layout_triton import scatter_triton

            most, words = self.config.max_objects, _WORDS
            return scatter_triton(keys, counts, most, _MAX_ATTEMPTS, words, **self._limits)
        corners, sides, complete = self._attempt(keys, counts, 0)
        for attempt in range(1, _MAX_ATTEMPTS):
            left = (~complete).nonzero().squeeze(1)
            if len(left) == 0:
                break
            corners[left], sides[left], complete[left] = self._attempt(
                keys[left], counts[left], attempt
            )
        return corners, sides, complete

    def _attempt(self, keys: Tensor, counts: Tensor, attempt: int) -> tuple[Tensor, Tensor, Tensor]:
        """Corners [B, N, 2], sides [B, N], and which scenes are complete [B]."""
        side, place = self._draws(keys, _SQUARES, attempt).unbind(1)  # [B, N]
        sides = self._least_side + below(side, self._greatest_side - self._least_side + 1)
        longer = max(self.config.whole_size)
        step = max(_MAX_POSITIONS // longer**2, 1)
        spans = [slice(start, start + step) for start in range(0, max(len(keys), 1), step)]
        parts = [scatter(place[at], counts[at], sides[at], **self._limits) for at in spans]
        corners, complete = (torch.cat(column) for column in zip(*parts, strict=True))
        return corners, sides, complete

    def _compose(self, keys: Tensor, entries: Tensor, corners: Tensor) -> Tensor:
        """[B, 3, H, W] float32."""
        config = self.config
        num_channels = 1 if config.colour == "white" and config.background == "black" else 3
        colours = self._colours(keys, num_channels)
        backgrounds = self._backgrounds(keys, num_channels)
        return self._painted(entries, corners, colours, backgrounds)

    def _painted(
        self,
        entries: Tensor,  # [B, n] rows of the table
        corners: Tensor,  # [B, n, 2]
        colours: Tensor,  # [B or 1, n or 1, C, 1] int32
        backgrounds: Tensor,  # [B, C, 1] int32
    ) -> Tensor:
        """[B, 3, H, W] float32: patches pasted in turn."""
        if not self.fused:
            return self._pasted(entries, corners, colours, backgrounds)
        from spairkit.kernels.scenes_compose_triton import compose_triton

        size = *self.config.whole_size, self._greatest_side
        light = colours[..., 0], backgrounds[..., 0]
        return compose_triton(self._table, entries, corners, *light, *size)

    def _pasted(
        self, entries: Tensor, corners: Tensor, colours: Tensor, backgrounds: Tensor
    ) -> Tensor:
        """[B, 3, H, W] float32. The canvas has a rim for the empty parts of smaller glyphs."""
        config, num_channels = self.config, backgrounds.shape[1]
        rim = self._greatest_side - self._least_side
        height, width = (side + rim for side in config.whole_size)
        patch = torch.arange(self._greatest_side, device=self.device)
        offsets = (patch[:, None] * width + patch).flatten()  # [P * P]
        where = ((corners[..., 0] * width + corners[..., 1])[..., None] + offsets)[:, :, None]
        alpha = self._table[entries].int()[:, :, None]  # [B, N, 1, P * P]
        # pixel (255 - alpha) + colour alpha, to be divided by 255; 128 rounds it
        clear = (255 - alpha).expand(-1, -1, num_channels, -1).unbind(1)
        lit = (alpha * colours + 128).unbind(1)
        canvas = backgrounds.repeat(1, 1, height * width)
        for pixels, scale, shift in zip(
            where.expand(-1, -1, num_channels, -1).unbind(1), clear, lit, strict=True
        ):
            mixed = torch.addcmul(shift, canvas.gather(2, pixels), scale)
            canvas.scatter_(2, pixels, (mixed + (mixed >> 8)) >> 8)
        image = canvas.view(-1, num_channels, height, width)
        image = image[:, :, : height - rim, : width - rim].float()
        # by a tensor on the device: by a number, CUDA multiplies by the reciprocal
        return (image / self._white).expand(-1, 3, -1, -1).contiguous()

    def _backgrounds(self, keys: Tensor, num_channels: int) -> Tensor:  # [B, C, 1] int32
        if self.config.background == "black":
            shape = (len(keys), num_channels, 1)
            return torch.zeros(shape, dtype=torch.int32, device=self.device)
        counters = self._purposes[_BACKGROUNDS]
        return below(draws(keys[:, None], counters), _DARK).int()[..., None]

    def _colours(self, keys: Tensor, num_channels: int) -> Tensor:  # [B or 1, N or 1, C, 1] int32
        if self.config.colour == "white":
            shape = (1, 1, num_channels, 1)
            return torch.full(shape, 255, dtype=torch.int32, device=self.device)
        channels = torch.arange(num_channels, device=self.device)
        words = self._draws(keys, _COLOURS).transpose(1, 2)  # [B, N, 4]
        brightest = below(words[..., 3:], num_channels)
        values = torch.where(channels == brightest, 255, below(words[..., :3], 256))
        return values.int()[..., None]


_REMEDY = "lower data.max_objects or raise data.max_overlap or the image's size"


def tight_boxes(patches: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[n, 4] xyxy half-open of the non-zero pixels of [n, P, P]; all of a blank one."""
    side = patches.shape[-1]
    spans = []
    for axis in (1, 2):  # the greatest over rows gives x, over columns y
        lit = patches.max(axis) > 0
        spans.append((lit.argmax(1), side - lit[:, ::-1].argmax(1)))
    (x1, x2), (y1, y2) = spans
    return np.stack([x1, y1, x2, y2], axis=1).astype(np.int64)


def _cropped(whole: Batch, corners: Tensor, size: tuple[int, int]) -> Batch:
    """The crops of `size` (height, width) with their top and left at `corners` [B, 2].

    No shape depends on values, so that this can be part of a CUDA graph.
    """
    device = corners.device
    rows = corners[:, :1] + torch.arange(size[0], device=device)  # [B, h]
    columns = corners[:, 1:] + torch.arange(size[1], device=device)  # [B, w]
    image = torch.arange(len(corners), device=device)[:, None, None]
    images = whole.images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]]
    shift = corners.flip(-1).repeat(1, 2)[:, None]  # [B, 1, 4] x, y, x, y
    x1, y1, x2, y2 = (whole.boxes - shift).clamp(min=0).unbind(-1)
    height, width = size
    boxes = torch.stack([x1, y1, x2.clamp(max=width), y2.clamp(max=height)], -1)
    inside = (boxes[..., 2:] > boxes[..., :2]).all(-1)  # [B, N]; none has no width before
    first = inside.logical_not().byte().argsort(dim=1, stable=True)
    boxes = torch.where(inside[..., None], boxes, 0).gather(1, first[..., None].expand(-1, -1, 4))
    labels = torch.where(inside, whole.labels, -1).gather(1, first)
    return Batch(images.permute(0, 3, 1, 2).contiguous(), boxes, labels, inside.sum(1))


def scatter(
    draws: Tensor,  # [B, N] int64
    counts: Tensor,  # [B]
    sides: Tensor,  # [B, N] int64
    *,
    least_side: int,
    greatest_side: int,
    height: int,
    width: int,
    max_overlap_px2: int,
) -> tuple[Tensor, Tensor]:  # [B, N, 2] int64, [B] bool
    """Places squares one after another, each uniformly among its allowed positions.

    A position is allowed if the square lies inside the image and its overlaps with the squares
    placed before sum to at most `max_overlap_px2`. The paper draws positions until one is allowed
    (docs/model.md 10), which gives the same distribution.

    The overlap of two squares is the product of their shared rows and columns, so the map of summed
    overlaps is a matrix product. It is exact in float32: its terms are integers, and sums that
    could be rounded, from 2^24 on, exceed every limit.

    Lengths are in pixels; `max_overlap_px2` is less than 2^24 square pixels.

    Args:
        draws: [B, N] int64 in [0, 2^32), one for each square.
        counts: [B]; squares from this number on may stay without a place.
        sides: [B, N] int64 from `least_side` to `greatest_side`.

    Returns:
        [B, N, 2] int64: top and left of each square in pixels, 0 without a place; and [B] bool:
        whether the first `counts` squares of the image have a place.
    """
    num_images, num_squares = draws.shape
    length = max(height, width) - least_side + 1
    starts = torch.arange(length, device=draws.device).float()  # [M], of rows and columns alike
    spans = sides.float()[:, :, None, None]
    ends = starts + spans  # [B, N, 1, M]
    limits = torch.full((2, 1), height, device=draws.device)
    limits[1] = width
    inside = ends <= limits  # [B, N, 2, M]
    ragged = height != width or least_side != greatest_side
    low = torch.zeros(num_images, num_squares, 2, 1, device=draws.device)
    high = torch.zeros_like(low)
    found = torch.ones(num_images, num_squares, dtype=torch.bool, device=draws.device)
    for k in range(num_squares):
        shared = torch.minimum(ends[:, k, None], high[:, :k])
        shared = shared.sub_(torch.maximum(starts, low[:, :k])).clamp_(min=0)  # [B, k, 2, M]
        rows, columns = shared.unbind(2)
        allowed = (rows.mT @ columns).le_(max_overlap_px2)  # [B, M, M], 0 or 1
        if ragged:
            allowed *= inside[:, k, 0, :, None]
            allowed *= inside[:, k, 1, None, :]
        before = allowed.flatten(1).cumsum(1, dtype=torch.int32)
        total = before[:, -1:]
        number = below(draws[:, k, None], total).int()
        place = torch.searchsorted(before, number, right=True)
        place = torch.where(total > 0, place, 0)
        corner = torch.cat([place // length, place % length], dim=1)[:, :, None]  # [B, 2, 1]
        low[:, k] = corner
        high[:, k] = corner + spans[:, k]
        found[:, k] = total[:, 0] > 0
    unwanted = torch.arange(num_squares, device=draws.device) >= counts[:, None]
    return low.squeeze(3).long(), (found | unwanted).all(1)
