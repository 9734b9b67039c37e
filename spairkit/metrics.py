"""Figures of boxes and counts against ground truth, by three protocols that are never mixed.

| name       | IoU            | a hit is       | recall points | pooled over       | scores  |
|------------|----------------|----------------|---------------|-------------------|---------|
| `ap`       | .1 to .9 by .1 | IoU >= t       | 101           | the whole set     | rank    |
| `ap_coco`  | .5 to .95      | IoU >= t       | 101           | the whole set     | rank    |
| `ap_spair` | .1 to .9 by .1 | IoU > t        | 11            | batches of 32     | ignored |

All of them match greedily inside an image, in the order of the scores: a detection takes the free
true box that it overlaps most. Detections in crowds are ignored as in pycocotools. Areas are plain
products of the sides, in float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor

from spairkit.detections import Detections, Truth

Array = npt.NDArray[Any]

IOU_THRESHOLDS = np.arange(1, 10) / 10
"""IoU thresholds of `ap` and `ap_spair`: .1, .2 ... .9."""

COCO_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU thresholds of `ap_coco`, bit-identical to those of pycocotools."""

RECALL_POINTS = np.linspace(0.0, 1.0, 101)
"""Recall points of `ap` and `ap_coco`, bit-identical to those of pycocotools."""

PROTOCOLS = {
    "ap": (
        "mean over IoU thresholds .1, .2 ... .9 of average precision: COCO matching (IoU >= t), "
        "101 recall points, pooled over the whole set, half-open true boxes, ranked by score"
    ),
    "ap_spair": (
        "the rule of the SPAIR authors' code, for comparison with the paper's figures only: IoU > "
        "t for t = .1, .2 ... .9; 11 recall points; detections above the count threshold, not "
        "ranked, dropped once all true boxes of their image are taken; true boxes one pixel less "
        "high and wide, and so are detected boxes in whole pixels; mean over batches of 32; from "
        "the means of the latents, which the authors sampled"
    ),
    "ap_coco": "COCO AP@[.5:.95]: 101 recall points, all areas, any number of detections",
    "ap50": "COCO AP at IoU .5",
    "ap75": "COCO AP at IoU .75",
    "count_accuracy": "share of images whose number of objects is exactly right",
    "count_error": "mean absolute difference of the numbers of objects",
    "count_bias": "mean of found minus true number of objects; above 0 is too many",
    "interval_coverage": (
        "share of images whose true number of objects lies in the shortest 90 % interval of its "
        "posterior, ends included; None for models without one"
    ),
    "interval_width": (
        "mean width of that interval, its upper minus its lower end, in objects; None for models "
        "without one"
    ),
}
"""The definition of each figure, reported beside it."""

NAMES = {
    "ap": "AP",
    "ap_spair": "AP paper",
    "ap_coco": "AP COCO",
    "ap50": "AP50",
    "ap75": "AP75",
    "count_accuracy": "count right",
    "count_error": "count error",
    "count_bias": "count bias",
    "interval_coverage": "90 % holds",
    "interval_width": "90 % width",
}
"""What each figure is called in tables, charts and messages; its key is for JSON and code."""

_HALF = np.array([0.5])
_LAST_PIXEL = np.array([0.0, 0.0, 1.0, 1.0])  # from half-open boxes to the authors'
_CHUNK_ROWS = 256  # boxes whose IoU with all others is computed at a time
_CHUNK_TRUTH = 1 << 16
"""True boxes, padding counted, that are matched at a time; 5 MB for each array of theirs."""


@dataclass(frozen=True)
class CocoAP:
    """The three figures that COCO prints first, each in [0, 1]."""

    ap: float  # mean over IoU .5 to .95
    ap50: float
    ap75: float


def average_precision(found: Sequence[Detections], truth: Sequence[Truth]) -> float:
    """The headline figure: AP over IoU .1 to .9, by COCO's matching and 101 recall points.

    Every detection counts, ranked by its score over the whole set; equal scores keep the order of
    images, and inside an image their own. So give all candidates, with a low threshold. Without a
    true box in the whole set, AP is 1 if nothing was found and 0 otherwise. As in pycocotools, a
    detection without a true box is ignored if the share of it that lies in a crowd reaches the
    threshold.

    Args:
        found: one `Detections` per image, scores finite.
        truth: one `Truth` per image, boxes half-open.

    Returns:
        In [0, 1].

    Raises:
        ValueError: the two differ in length, or boxes or scores are not finite.
    """
    return float(_coco_precision(found, truth, IOU_THRESHOLDS).mean())


def ap_coco(found: Sequence[Detections], truth: Sequence[Truth]) -> CocoAP:
    """COCO's AP@[.5:.95], AP50 and AP75, for one class; equal to pycocotools.

    The area range holds everything and no detection is cut off, whatever their number. Arguments
    and the set without truth (where pycocotools says -1) as in `average_precision`.

    Raises:
        ValueError: as `average_precision`.
    """
    precision = _coco_precision(found, truth, COCO_IOU_THRESHOLDS)
    return CocoAP(float(precision.mean()), float(precision[0]), float(precision[5]))


def ap_spair(
    found: Sequence[Detections],
    truth: Sequence[Truth],
    *,
    whole_pixels: bool = False,
    batch_size: int = 32,
) -> float:
    """AP by the rule of the SPAIR authors' code, to compare with the paper's figures.

    It differs from `average_precision` in these points:

    - scores are ignored, so the ranking is that of the images, and inside an image raster order:
      give only what was found (presence above one half);
    - a hit needs IoU above, not at, the threshold; there are 11 recall points, 0, .1 ... 1;
    - once every true box of an image is taken, the detections left there are dropped: neither
      right nor wrong. In an image without true boxes all of them are wrong;
    - true boxes lose one pixel at their right and lower edges, because those of the authors' data
      span from the first to the last pixel of a glyph. With `whole_pixels` the found boxes lose it
      too, as those of the authors' ConnComp do, but not those of their SPAIR;
    - AP is computed for batches of images in order, and averaged with their sizes as weights;
    - the authors know no crowds: detections in them are left out first (`without_crowds`).

    A batch without detections, or without true boxes, has AP 0. (For no detection at all the
    authors' code gives NaN, where it means 0.)

    Args:
        found: one `Detections` per image, raster order.
        truth: one `Truth` per image, boxes half-open, in whole pixels.
        whole_pixels: the found boxes end at the edges of pixels, as the true ones do: boxes
            tightened to an object's pixels, and those of connected components.
        batch_size: 32 as in the authors' code.

    Returns:
        In [0, 1].

    Raises:
        ValueError: as `average_precision`, or `batch_size` is less than 1.
    """
    _check_lengths(found, truth)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    last_pixel = _LAST_PIXEL if whole_pixels else 0
    found_boxes = [_boxes(item, "found") - last_pixel for item in without_crowds(found, truth)]
    # of two true boxes that overlap a detection equally the authors take the first, COCO the last
    true_boxes = [(_boxes(item, "truth") - _LAST_PIXEL)[::-1] for item in truth]
    above = np.nextafter(IOU_THRESHOLDS, 1.0)
    total = 0.0
    for start in range(0, len(found), batch_size):
        part = slice(start, start + batch_size)
        found_here, true_here = found_boxes[part], true_boxes[part]
        hits, _ = _matches(found_here, true_here, above)
        counted = np.concatenate(
            [
                _counted(hit, len(true))
                for hit, true in zip(_split(hits, found_here), true_here, strict=True)
            ]
        )
        num_true = sum(map(len, true_here))
        # hits needed for recall 0, .1 ... 1, in whole numbers
        needed = -(-np.arange(11) * num_true // 10)
        if num_true:
            total += len(found_here) * float(_interpolated(hits, counted, needed).mean())
    return total / max(len(found), 1)


@dataclass(frozen=True)
class Agreement:
    """How far two sets of boxes agree on some images."""

    found: int
    """Boxes of the one."""
    other: int
    """Boxes of the other."""
    matched: int
    """Pairs of boxes, one of each, with an IoU of .5 or more."""

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall, the same both ways; 1 if there is no box."""
        total = self.found + self.other
        return 2 * self.matched / total if total else 1.0


def agreement(found: Sequence[Detections], other: Sequence[Detections | Truth]) -> Agreement:
    """How many boxes of each image have a partner in the other set, scores ignored.

    The partners are as many as possible: an optimal, not a greedy matching. Against a `Truth` it
    gives F1, without what lies in crowds, and between two detectors it tells without labels how far
    they agree.

    Args:
        found: one `Detections` per image.
        other: one `Detections` or `Truth` per image.

    Raises:
        ValueError: the two differ in length, or boxes are not finite.
    """
    _check_lengths(found, other)
    found = [
        without_crowds([item], [against])[0] if isinstance(against, Truth) else item
        for item, against in zip(found, other, strict=True)
    ]
    pairs = zip(
        (_boxes(item, "found") for item in found),
        (_boxes(item, "other") for item in other),
        strict=True,
    )
    matched = sum(_most_pairs(ours, theirs) for ours, theirs in pairs)
    return Agreement(sum(map(len, found)), sum(map(len, other)), matched)


def without_crowds(found: Sequence[Detections], truth: Sequence[Truth]) -> list[Detections]:
    """The detections that count: those that COCO's matching at an IoU of .5 does not ignore.

    It ignores a detection that takes no true box and lies with half of its area or more in a crowd.

    Args:
        found: one `Detections` per image, scores finite.
        truth: one `Truth` per image.

    Raises:
        ValueError: as `average_precision`.
    """
    _check_lengths(found, truth)
    kept = []
    for item, true in zip(found, truth, strict=True):
        if len(true.crowds) and len(item):
            order = np.argsort(-_scores(item), kind="stable")
            boxes = [_boxes(item, "found")[order]]
            crowds = [_array(true.crowds, "crowds")]
            _, ignored = _matches(boxes, [_boxes(true, "truth")], _HALF, crowds)
            kept.append(item[np.sort(order[~ignored[:, 0]])])
        else:
            kept.append(item)
    return kept


def _most_pairs(ours: Array, theirs: Array) -> int:
    """The greatest number of disjoint pairs with an IoU of .5 or more; boxes [n, 4] and [m, 4]."""
    rows, columns = [], []
    area = (theirs[:, 2:] - theirs[:, :2]).clip(min=0).prod(1)
    for start in range(0, len(ours), _CHUNK_ROWS):
        some = ours[start : start + _CHUNK_ROWS, None]
        low = np.maximum(some[..., :2], theirs[:, :2])
        both = (np.minimum(some[..., 2:], theirs[:, 2:]) - low).clip(min=0).prod(-1)
        either = (some[..., 2:] - some[..., :2]).clip(min=0).prod(-1) + area - both
        row, column = np.nonzero((2 * both >= either) & (both > 0))
        rows.append(row + start)
        columns.append(column)
    if not rows:
        return 0
    pair = np.concatenate(rows), np.concatenate(columns)
    graph = csr_array((np.ones(len(pair[0]), bool), pair), shape=(len(ours), len(theirs)))
    return int((maximum_bipartite_matching(graph) >= 0).sum())


def count_accuracy(found_counts: Sequence[int], true_counts: Sequence[int]) -> float:
    """Share of images counted exactly right, in [0, 1]; 1 where there is no image."""
    differences = _differences(found_counts, true_counts)
    return float((differences == 0).mean()) if differences.size else 1.0


def count_error(found_counts: Sequence[int], true_counts: Sequence[int]) -> float:
    """Mean absolute difference of found and true counts, objects; 0 where there is no image."""
    differences = _differences(found_counts, true_counts)
    return float(np.abs(differences).mean()) if differences.size else 0.0


def count_bias(found_counts: Sequence[int], true_counts: Sequence[int]) -> float:
    """Mean of found minus true counts, objects; 0 where there is no image."""
    differences = _differences(found_counts, true_counts)
    return float(differences.mean()) if differences.size else 0.0


def interval_coverage(intervals: Sequence[tuple[int, int]], true_counts: Sequence[int]) -> float:
    """Share of images whose true count lies in its interval [low, high], in [0, 1].

    Both ends belong to an interval. 1 where there is no image.

    Raises:
        ValueError: the two differ in length.
    """
    _check_lengths(intervals, true_counts)
    inside = [low <= n <= high for (low, high), n in zip(intervals, true_counts, strict=True)]
    return sum(inside) / len(inside) if inside else 1.0


def interval_width(intervals: Sequence[tuple[int, int]]) -> float:
    """Mean of high - low over the intervals, objects; 0 where there is no image."""
    return sum(high - low for low, high in intervals) / max(len(intervals), 1)


def _differences(found_counts: Sequence[int], true_counts: Sequence[int]) -> Array:
    _check_lengths(found_counts, true_counts)
    return np.asarray(found_counts, dtype=np.int64) - np.asarray(true_counts, dtype=np.int64)


def _coco_precision(
    found: Sequence[Detections],
    truth: Sequence[Truth],
    thresholds: Array,  # [T]
) -> Array:  # [T]
    _check_lengths(found, truth)
    true_boxes = [_boxes(item, "truth") for item in truth]
    num_true = sum(map(len, true_boxes))
    found_boxes, scores = [], []
    for item in found:
        score = _scores(item)
        order = np.argsort(-score, kind="stable")
        found_boxes.append(_boxes(item, "found")[order])
        scores.append(score[order])
    crowds = [_array(item.crowds, "crowds") for item in truth]
    hits, ignored = _matches(found_boxes, true_boxes, thresholds, crowds)
    if num_true == 0:
        return np.where(ignored.all(0), 1.0, 0.0)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hits, ignored = hits[order], ignored[order]
    # the least number of hits that reaches each recall point, in pycocotools' arithmetic
    needed = np.searchsorted(np.arange(num_true + 1) / num_true, RECALL_POINTS)
    return _interpolated(hits, ~ignored, needed)


def _matches(
    found: Sequence[Array],  # I of [d, 4], best first
    truth: Sequence[Array],  # I of [g, 4]
    thresholds: Array,  # [T]
    crowds: Sequence[Array] = (),  # I of [m, 4], or none at all
) -> tuple[Array, Array]:  # [D, T] bool each, D the sum of d
    """Whether each detection hits, and whether it is ignored, as it lies in a crowd.

    It hits the free true box of highest IoU >= t, at a tie the last. All images and thresholds of a
    chunk are processed together, in descending order of score.
    """
    num_found = np.array([len(boxes) for boxes in found], dtype=np.int64)
    starts = np.cumsum(num_found) - num_found
    hits = np.zeros((int(num_found.sum()), len(thresholds)), dtype=bool)
    for chunk in _chunks(num_found, np.array([len(boxes) for boxes in truth], dtype=np.int64)):
        true = _padded([truth[i] for i in chunk])  # [I, G, 4], beyond the image's own: empty boxes
        true_area = _area(true)
        free = np.ones((len(chunk), len(thresholds), true.shape[1]), dtype=bool)
        lengths = num_found[chunk]
        for rank in range(int(lengths.max())):
            alive = np.flatnonzero(lengths > rank)
            here = np.stack([found[i][rank] for i in chunk[alive]])  # [I', 4]
            low = np.maximum(here[:, None, :2], true[alive, :, :2])
            high = np.minimum(here[:, None, 2:], true[alive, :, 2:])
            overlap = np.maximum(high - low, 0.0).prod(-1)
            union = _area(here)[:, None] + true_area[alive] - overlap
            iou = np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)
            fits = free[alive] & (iou[:, None] >= thresholds[:, None])  # [I', T, G]
            best = np.where(fits, iou[:, None], -1.0)[..., ::-1].argmax(-1)
            best = true.shape[1] - 1 - best
            image, level = np.nonzero(fits.any(-1))
            free[alive[image], level, best[image, level]] = False
            hits[starts[chunk[alive[image]]] + rank, level] = True
    ignored = np.zeros_like(hits)
    for start, boxes, regions in zip(starts, found, crowds, strict=False):
        if len(boxes) and len(regions):
            rows = slice(start, start + len(boxes))
            ignored[rows] = (_inside(boxes, regions)[:, None] >= thresholds) & ~hits[rows]
    return hits, ignored


def _inside(boxes: Array, regions: Array) -> Array:  # [d, 4], [m, 4] -> [d]
    """The share of each box that lies in the region that holds most of it."""
    share = np.zeros(len(boxes))
    area = _area(boxes)
    for region in regions:
        low = np.maximum(boxes[:, :2], region[:2])
        high = np.minimum(boxes[:, 2:], region[2:])
        overlap = np.maximum(high - low, 0.0).prod(-1)
        here = np.divide(overlap, area, out=np.zeros_like(overlap), where=overlap > 0)
        share = np.maximum(share, here)
    return share


def _chunks(num_found: Array, num_true: Array) -> Iterator[Array]:
    """Indices of images alike in size, as many at a time as fit the memory allowed."""
    useful = np.flatnonzero((num_found > 0) & (num_true > 0))
    order = useful[np.lexsort((num_found[useful], num_true[useful]))]
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * num_true[order[stop]] <= _CHUNK_TRUTH:
            stop += 1
        yield order[start:stop]
        start = stop


def _padded(boxes: Sequence[Array]) -> Array:  # I of [g, 4] -> [I, G, 4]
    padded = np.zeros((len(boxes), max(map(len, boxes)), 4))
    for row, item in zip(padded, boxes, strict=True):
        row[: len(item)] = item
    return padded


def _interpolated(
    hits: Array,  # [D, T] bool, best first
    counted: Array,  # [D, T] bool, False for what is neither right nor wrong
    needed: Array,  # [R] hits that reach each recall point
) -> Array:  # [T]
    """Mean over recall points of the highest precision at that recall or above, 0 if none."""
    num_hits = np.cumsum(hits, axis=0)
    precision = num_hits / np.maximum(np.cumsum(counted, axis=0), 1)
    best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    best = np.concatenate([best, np.zeros((1, hits.shape[1]))])
    first = [np.searchsorted(column, needed) for column in num_hits.T]
    return np.array([best[at, level].mean() for level, at in enumerate(first)])


def _counted(hits: Array, num_true: int) -> Array:  # [d, T] -> [d, T]
    """False from the detection on that finds every true box of its image taken."""
    taken_before = np.cumsum(hits, axis=0) - hits
    return (taken_before < num_true) | (num_true == 0)


def _split(rows: Array, like: Sequence[Array]) -> list[Array]:
    """The rows of each image."""
    return np.split(rows, np.cumsum([len(item) for item in like])[:-1])


def _area(boxes: Array) -> Array:  # [..., 4] -> [...]
    area: Array = np.maximum(boxes[..., 2:] - boxes[..., :2], 0.0).prod(-1)
    return area


def _boxes(item: Detections | Truth, name: str) -> Array:  # [n, 4] float64
    return _array(item.boxes, f"boxes of {name}")


def _array(boxes: Tensor, name: str) -> Array:  # [n, 4] float64
    array: Array = boxes.detach().cpu().double().numpy().reshape(-1, 4)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite")
    return array


def _scores(item: Detections) -> Array:  # [n] float64
    scores: Array = item.scores.detach().cpu().double().numpy()
    if not np.isfinite(scores).all():
        raise ValueError("scores of found must be finite")
    return scores


def _check_lengths(found: Sequence[Any], truth: Sequence[Any]) -> None:
    if len(found) != len(truth):
        raise ValueError(
            f"found and truth must have one item per image, got {len(found)} and {len(truth)}"
        )
