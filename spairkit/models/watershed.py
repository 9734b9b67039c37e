"""Watershed: a local threshold, and a watershed that parts objects which touch (docs/model.md 9.1).

found = find_parts(grey, diameter=12)  # found.boxes, found.scores, found.label_image

It has no weights. Bright objects lie on a dark ground, about `diameter` pixels across; every length
below is a share of it. It is the floor that SPAIR has to beat on real images.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from spairkit.config import WatershedConfig
from spairkit.detections import Detections, Explanation
from spairkit.label_images import halved
from spairkit.models.conncomp import mean_colours, pictures
from spairkit.models.networks import check_images
from spairkit.preparation import otsu

Array = npt.NDArray[Any]

# chosen on the training images of five annotated sets; lengths as shares of the diameter
_SMOOTHING = 0.05  # standard deviation of the filter of the image
_WINDOW = 2 / 3  # standard deviation of the local mean
_SEPARATION = 0.25  # of the distance from the median to Otsu's threshold
_NOISE_LAG = 1 / 6
_NOISE_FACTOR = 2.0
_LEAST_CONTRAST = 0.02
_RELIEF = 0.02  # of the height of a peak
_THIN, _THIN_RELIEF = 0.25, 0.15  # half-width of thin objects in diameters, and their relief
_LEAST_GAP = 5 / 12  # between two peaks
_DISTANCE_SMOOTHING = 1 / 12
_EDGE = 0.55  # of the mean contrast of an object
_GROWTH = 1 / 4
_GROUND = 1.0  # standard deviation of the mean of the ground
_LEAST_AREA = 1 / 8  # of the square of the diameter
_LARGEST_HOLE = 1.0  # of the square of the diameter

_COARSE = 18.0  # greatest diameter of small objects, px
_MOST_MAGNIFIED = 1 << 22  # pixels of an image that is magnified

_LEAST_WEIGHT = 1e-3
_LEAST_SCORED = 1e-3  # contrast, so that every score is above .5

_QUARTILE = 0.3186  # of |x|, x standard normal


class Parts(NamedTuple):
    """The objects of one image."""

    label_image: npt.NDArray[np.int32]
    """[H, W] 1 + the row of the object that a pixel belongs to, 0 on the background."""
    boxes: npt.NDArray[np.float32]
    """[n, 4] xyxy, px, half-open, round the pixels of each object, at most half a pixel away."""
    scores: npt.NDArray[np.float32]
    """[n] in (.5, 1]: half of one plus the contrast to the local mean, which ranks well."""


class Watershed(nn.Module):
    """Finds bright objects of about one size, without weights.

    The state dict holds `diameter` [] in pixels, from the config.
    """

    diameter: Tensor

    def __init__(self, config: WatershedConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("diameter", torch.tensor(config.diameter))

    @torch.no_grad()
    def detect(
        self,
        images: Tensor,  # [B, 3, H, W]
        threshold: float = 0.5,
    ) -> list[Detections]:
        """The objects of each image, from the lightest channel of each pixel, in raster order.

        Embeddings have no dimension, and depths are 0.

        Args:
            images: [B, 3, H, W] in [0, 1].
            threshold: objects with a score above it are returned; all scores are above .5.

        Raises:
            ValueError: `images` has another shape or dtype, or holds NaN or infinity.
        """
        return [self._detections(image, threshold) for image in self._pixels(images)]

    @torch.no_grad()
    def explain(self, images: Tensor, threshold: float = 0.5) -> list[Explanation]:
        """The objects, with appearances and a reconstruction as of `ConnComp.explain`.

        The background of the reconstruction has its mean colour. Arguments and errors as in
        `detect`.
        """
        return [self._explained(image, threshold) for image in self._pixels(images)]

    def _pixels(self, images: Tensor) -> Tensor:
        check_images(images, finite=True)
        return images.detach().cpu().float()

    def _detections(self, image: Tensor, threshold: float) -> Detections:
        parts = find_parts(image.amax(0).numpy(), float(self.diameter))
        num = len(parts.boxes)
        found = Detections(
            boxes=torch.from_numpy(parts.boxes),
            scores=torch.from_numpy(parts.scores),
            what=torch.zeros(num, 0),
            depth=torch.zeros(num),
            label_image=torch.from_numpy(parts.label_image),
            labels=torch.arange(1, num + 1, dtype=torch.int32),
        )
        return found[found.scores > threshold]

    def _explained(self, image: Tensor, threshold: float) -> Explanation:
        found = self._detections(image, threshold)
        labels = found.masks.numpy()
        drawn = mean_colours(image, labels)
        return Explanation(found, image, drawn, pictures(image, labels))


def find_parts(grey: Array, diameter: float, *, fine: bool = True) -> Parts:
    """The bright objects of a grey image, in the order of their first pixels.

    Args:
        grey: [H, W] finite floats, objects brighter than their surroundings; [0, 1] is the range
            of contrasts that scores tell apart.
        diameter: of a typical object, in pixels, above 0. Objects from about half to twice as
            large are found.
        fine: parts objects in the image at twice its size if they are small, so outlines end at
            half pixels; takes four times as long.

    Raises:
        ValueError: `grey` is not [H, W], or `diameter` is not above 0.
    """
    if grey.ndim != 2 or 0 in grey.shape:
        raise ValueError(f"grey must be [H, W], got {list(grey.shape)}")
    if not diameter > 0:
        raise ValueError(f"diameter must be above 0, got {diameter}")
    grey = grey.astype(np.float32)
    if not fine or diameter > _COARSE or grey.size > _MOST_MAGNIFIED:
        return _parts(grey, diameter)
    twice = F.interpolate(torch.from_numpy(grey)[None, None], scale_factor=2, mode="bicubic")
    parts = _parts(twice[0, 0].numpy(), 2 * diameter)
    labels = halved(parts.label_image)
    kept = np.bincount(labels.ravel(), minlength=len(parts.boxes) + 1)[1:] > 0
    numbers = np.append(0, np.where(kept, np.cumsum(kept), 0)).astype(np.int32)
    return Parts(numbers[labels], parts.boxes[kept] / np.float32(2), parts.scores[kept])


def _parts(grey: npt.NDArray[np.float32], diameter: float) -> Parts:
    """The objects, in whole pixels."""
    smooth = ndimage.gaussian_filter(grey, _SMOOTHING * diameter)
    around = ndimage.gaussian_filter(smooth, _WINDOW * diameter)
    separation = otsu(smooth) - float(np.median(smooth))
    noise = _noise(smooth, max(round(_NOISE_LAG * diameter), 1))
    above = max(_SEPARATION * separation, _NOISE_FACTOR * noise, _LEAST_CONTRAST)
    mask = smooth > around + np.float32(above)
    if opening := round(diameter / 12):
        mask = ndimage.binary_opening(mask, iterations=opening)
    mask = _filled(mask, _LARGEST_HOLE * diameter**2)
    distance = ndimage.distance_transform_edt(mask).astype(np.float32)
    height = ndimage.gaussian_filter(distance, _DISTANCE_SMOOTHING * diameter)
    labels = split(height, mask, relief=_RELIEF, gap=_LEAST_GAP * diameter, thin=_THIN * diameter)
    labels = _numbered(labels, _LEAST_AREA * diameter**2)
    labels = _numbered(_outlined(labels, smooth, diameter), _LEAST_AREA * diameter**2)
    areas = np.bincount(labels.ravel())[1:]
    sums = np.bincount(labels.ravel(), (grey - around).ravel())[1:]
    contrast = (sums / areas).clip(_LEAST_SCORED, 1)
    spans = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)]
    boxes = np.array(spans, np.float32).reshape(-1, 4)
    return Parts(labels, boxes, ((1 + contrast) / 2).astype(np.float32))


def _numbered(labels: Array, least: float) -> npt.NDArray[np.int32]:
    """The labels of at least `least` pixels, as 1, 2 ... in the order of first pixels."""
    flat = labels.ravel()
    areas = np.bincount(flat)
    areas[0] = 0
    first = np.zeros(len(areas), np.int64)
    first[flat[::-1]] = np.arange(flat.size)[::-1]  # the last one written stays
    kept = np.flatnonzero(areas >= max(least, 1))
    numbers = np.zeros(len(areas), np.int32)
    numbers[kept[np.argsort(first[kept])]] = np.arange(1, len(kept) + 1)
    return numbers[labels]


def _outlined(labels: Array, image: Array, diameter: float) -> Array:
    """The parts, ending at about half the height of each, so that their outlines fit blurred edges.

    The contrast of a pixel is that to the mean of the ground around it. A part keeps the connected
    pixels in it, and less than `_GROWTH` beside it and nearest to it, whose contrast is at least
    `_EDGE` of its mean; and the holes in them.
    """
    free = labels == 0
    if free.all() or not free.any():
        return labels
    weight = ndimage.gaussian_filter(free.astype(np.float32), _GROUND * diameter)
    ground = ndimage.gaussian_filter(np.where(free, image, 0), _GROUND * diameter)
    contrast = image - ground / np.maximum(weight, _LEAST_WEIGHT)
    distance, nearest = ndimage.distance_transform_edt(free, return_indices=True)
    near = np.where(distance <= _GROWTH * diameter, labels[tuple(nearest)], 0)
    sums = np.bincount(labels.ravel(), contrast.ravel())
    least = _EDGE * sums / np.maximum(np.bincount(labels.ravel()), 1)
    inside = _largest(np.where(contrast >= least[near], near, 0))
    filled = _filled(inside > 0, _LARGEST_HOLE * diameter**2)
    outlined: Array = np.where(filled & (inside == 0), near, inside)
    return outlined


def _largest(labels: Array) -> Array:
    """The labels without all but the largest 4-connected piece of each."""
    places = np.flatnonzero(labels)
    index = np.full(labels.shape, -1, np.int32)
    index.flat[places] = np.arange(len(places))
    ends = []
    for one, two in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        same = (labels[one] == labels[two]) & (labels[one] > 0)
        ends.append((index[one][same], index[two][same]))
    rows, columns = (np.concatenate(side) for side in zip(*ends, strict=True))
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(len(places),) * 2)
    number, piece = connected_components(graph, directed=False)
    owner = np.zeros(number, labels.dtype)
    owner[piece] = labels.flat[places]
    # by owner and size, the last of each owner is its largest
    order = np.lexsort((np.bincount(piece, minlength=number), owner))
    kept = np.zeros(number, bool)
    kept[order[np.diff(owner[order], append=0) != 0]] = True
    pieces = labels.copy()
    pieces.flat[places[~kept[piece]]] = 0
    return pieces


def split(
    height: Array,  # [H, W] float
    mask: Array,  # [H, W] bool
    *,
    relief: float,
    gap: float,
    thin: float,
) -> npt.NDArray[np.int32]:  # [H, W]
    """The watershed of a mask: 1, 2 ... on its parts in the order of first pixels, else 0.

    Each pixel belongs to the peak that steepest ascent over its eight neighbours leads to. Then,
    from the highest pass between two parts down to the lowest, they become one if the lower peak
    rises above the pass by less than `relief` of its height, or lies at most `gap` pixels from the
    other peak. The higher peak stays the peak of both. If it is below `thin`, as along a rod, whose
    width hardly changes, the relief is at least `_THIN_RELIEF`.
    """
    rows, columns = mask.shape
    stride = columns + 2
    padded = np.full((rows + 2, stride), -np.inf, np.float32)
    padded[1:-1, 1:-1][mask] = height[mask]
    values = padded.ravel()
    places = np.flatnonzero(values > -np.inf)
    labels = np.zeros(mask.shape, np.int32)
    if not len(places):
        return labels
    index = np.full(values.size, -1, np.int32)
    index[places] = np.arange(len(places))
    forward = (1, stride - 1, stride, stride + 1)
    best, target = values[places], places.copy()
    for step in (*forward, *(-step for step in forward)):
        near = places + step
        # of equal heights the first pixel is the higher one, so that no ascent is a circle
        better = (values[near] > best) | ((values[near] == best) & (near < target))
        best[better], target[better] = values[near][better], near[better]
    top = index[target]
    while not np.array_equal(top, above := top[top]):
        top = above
    tops, basin = np.unique(top, return_inverse=True)
    owners = _merged(
        _passes(values, places, index, basin, forward),
        values[places[tops]],
        np.stack(np.divmod(places[tops], stride), axis=1),
        relief,
        gap,
        thin,
    )
    labels[mask] = owners[basin] + 1
    return _numbered(labels, 1)


def _passes(
    values: Array, places: Array, index: Array, basin: Array, steps: tuple[int, ...]
) -> tuple[Array, Array]:
    """Pairs of basins that touch, [n, 2], and the height of the highest pass between them.

    The highest passes come first.
    """
    pairs, heights = [], []
    for step in steps:
        near = places + step
        inside = np.flatnonzero(index[near] >= 0)
        ours, theirs = basin[inside], basin[index[near[inside]]]
        differ = ours != theirs
        pairs.append(np.sort(np.stack([ours, theirs], axis=1)[differ], axis=1))
        between = np.minimum(values[places[inside]], values[near[inside]])
        heights.append(between[differ])
    pair, height = np.concatenate(pairs), np.concatenate(heights)
    order = np.lexsort((-height, pair[:, 1], pair[:, 0]))
    pair, height = pair[order], height[order]
    new = np.any(np.diff(pair, axis=0, prepend=-1), axis=1)
    pair, height = pair[new], height[new]
    order = np.argsort(-height, kind="stable")
    return pair[order], height[order]


def _merged(
    passes: tuple[Array, Array],
    peaks: Array,
    places: Array,
    relief: float,
    gap: float,
    thin: float,
) -> Array:
    """The basin that each basin is merged into, or itself; see `split`."""
    owner = list(range(len(peaks)))

    def root(basin: int) -> int:
        while owner[basin] != basin:
            owner[basin] = owner[owner[basin]]
            basin = owner[basin]
        return basin

    heights, points = peaks.tolist(), places.tolist()
    for (one, other), height in zip(passes[0].tolist(), passes[1].tolist(), strict=True):
        low, high = sorted((root(one), root(other)), key=lambda basin: (heights[basin], -basin))
        if low == high:
            continue
        (y, x), (v, u) = points[low], points[high]
        is_near = (y - v) ** 2 + (x - u) ** 2 <= gap**2
        least = max(relief, _THIN_RELIEF) if heights[high] < thin else relief
        if is_near or heights[low] - height < least * heights[low]:
            owner[low] = high
    return np.array([root(basin) for basin in range(len(peaks))])


def _noise(image: Array, lag: int) -> float:
    """The standard deviation of the noise, by the second difference across and down at this lag.

    It vanishes on edges that run across or down and on slopes; of its absolute values the lower
    quartile is taken, as objects raise the others.
    """
    if min(image.shape) <= 2 * lag:
        return 0.0
    rows = image[2 * lag :] - 2 * image[lag:-lag] + image[: -2 * lag]
    both = rows[:, 2 * lag :] - 2 * rows[:, lag:-lag] + rows[:, : -2 * lag]
    return float(np.quantile(np.abs(both), 0.25)) / (6 * _QUARTILE)


def _filled(mask: Array, largest: float) -> Array:
    """The mask without holes of up to `largest` pixels; larger ones are ground among objects."""
    holes, num = ndimage.label(~mask)
    sizes = np.bincount(holes.ravel(), minlength=num + 1)
    fills = sizes <= largest
    for edge in (holes[0], holes[-1], holes[:, 0], holes[:, -1]):
        fills[edge] = False
    fills[0] = False  # the mask itself
    filled: Array = mask | fills[holes]
    return filled
