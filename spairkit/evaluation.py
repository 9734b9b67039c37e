"""Figures of a detector on a set of images, and on its images of 1, 2, 3 ... objects."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from spairkit import metrics
from spairkit.data.scenes import Batch
from spairkit.detections import Detections, Truth
from spairkit.detector import Detector

CANDIDATE_THRESHOLD = 0.05
"""Candidates with a score above this take part in the ranking of `ap` and `ap_coco`."""

_PRECISIONS = ("ap", "ap_spair", "ap_coco", "ap50", "ap75")


@dataclass(frozen=True)
class Figures:
    """Figures on some images; `spairkit.metrics.PROTOCOLS` describes each.

    Without true objects the AP figures are meaningless: `ap_spair` is 0, the others are 0, or 1 if
    there is no candidate; `to_json` gives None for them.
    """

    images: int
    objects: int
    """Number of true objects in all images."""
    ap: float
    ap_spair: float
    ap_coco: float
    ap50: float
    ap75: float
    count_accuracy: float
    count_error: float
    count_bias: float
    interval_coverage: float | None = None
    """None if the model gives no posterior of the count; so is `interval_width`."""
    interval_width: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures by name; None for AP where there is no true object."""
        values = asdict(self)
        return values | ({} if self.objects else dict.fromkeys(_PRECISIONS))


@dataclass(frozen=True)
class Report:
    """Figures of one detector on one set of images."""

    measured_on: str
    """Description of the images: figures on other images do not compare."""
    threshold: float
    """Candidates with a score above this are found."""
    overall: Figures
    by_objects: dict[int, Figures]
    """Figures of the images with each true number of objects, ascending."""
    search: str = "off"
    """The mode of the detector's search; see `config.SearchConfig`."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`, with the protocol of each figure."""
        return {
            "measured_on": self.measured_on,
            "search": self.search,
            "threshold": self.threshold,
            "candidate_threshold": min(CANDIDATE_THRESHOLD, self.threshold),
            "overall": self.overall.to_json(),
            "by_objects": {str(n): figures.to_json() for n, figures in self.by_objects.items()},
            "protocols": dict(metrics.PROTOCOLS),
        }


def evaluate(
    detector: Detector,
    batches: Iterable[Batch],
    threshold: float = 0.5,
    progress: Callable[[int], None] | None = None,
    *,
    measured_on: str = "",
    seen: Callable[[list[Detections]], None] | None = None,
) -> Report:
    """Runs the detector once over all images and compares its detections with the ground truth.

    `ap` and `ap_coco` rank every candidate with a score above 0.05, or above `threshold` if that is
    lower; `ap_spair` and the counts use those above `threshold`. What lies in crowds is ignored,
    and images with crowds have no part in the intervals of counts. Images and masks are not kept;
    boxes and scores are, in 24 bytes for each candidate and 16 for each true object, and so are the
    posteriors of the counts.

    Args:
        detector: finds the objects.
        batches: with ground truth. `ap_spair` is computed for batches of 32 images in this order,
            whatever the size of these.
        threshold: in [0, 1).
        progress: called after each batch with the number of images done so far.
        measured_on: description of the images, for the report.
        seen: called with the candidates of each batch, which still have their masks.

    Raises:
        ValueError: `threshold` is outside [0, 1), or there is no image.
    """
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
    candidates: list[Detections] = []
    truth: list[Truth] = []
    least = min(CANDIDATE_THRESHOLD, threshold)
    for batch in batches:
        counts = batch.counts if detector.count_is_given else None
        found = detector.detect_batch(batch.images, least, counts)
        if seen is not None:
            seen(found)
        # without embeddings and masks, which the figures do not need
        candidates += [
            replace(item, what=item.what[:, :0].clone(), label_image=None, labels=None)
            for item in found
        ]
        truth += [
            Truth(item.boxes.clone(), item.labels[:0], item.crowds.clone())
            for item in batch.truth()
        ]
        if progress is not None:
            progress(len(truth))
    return report_on(
        candidates,
        truth,
        threshold,
        whole_pixels=detector.whole_pixels,
        measured_on=measured_on,
        search=detector.search,
    )


def report_on(
    candidates: list[Detections],
    truth: list[Truth],
    threshold: float = 0.5,
    *,
    whole_pixels: bool,
    measured_on: str = "",
    search: str = "off",
) -> Report:
    """The figures of candidates that a detector found, one `Detections` and `Truth` per image.

    Args:
        candidates: of every score above `min(CANDIDATE_THRESHOLD, threshold)`.
        truth: of the same images, in this order.
        threshold: candidates with a score above it are found.
        whole_pixels, search: of the detector.
        measured_on: description of the images, for the report.

    Raises:
        ValueError: there is no image.
    """
    if not truth:
        raise ValueError("batches must hold at least one image, got none")
    numbers = [len(item) for item in truth]
    by_objects = {
        n: _figures(
            [item for item, count in zip(candidates, numbers, strict=True) if count == n],
            [item for item in truth if len(item) == n],
            threshold,
            whole_pixels,
        )
        for n in sorted(set(numbers))
    }
    overall = _figures(candidates, truth, threshold, whole_pixels)
    return Report(measured_on, threshold, overall, by_objects, search)


def _figures(
    candidates: list[Detections], truth: list[Truth], threshold: float, whole_pixels: bool
) -> Figures:
    found = metrics.without_crowds([item[item.scores > threshold] for item in candidates], truth)
    found_counts, true_counts = [len(item) for item in found], [len(item) for item in truth]
    # a posterior counts the objects of crowds too
    countable = [item for item, true in zip(candidates, truth, strict=True) if not len(true.crowds)]
    intervals = [item.counts.interval() for item in countable if item.counts is not None]
    interval_counts = [len(item) for item in truth if not len(item.crowds)]
    have_intervals = len(intervals) == len(interval_counts) > 0
    coco = metrics.ap_coco(candidates, truth)
    return Figures(
        images=len(truth),
        objects=sum(true_counts),
        ap=metrics.average_precision(candidates, truth),
        ap_spair=metrics.ap_spair(found, truth, whole_pixels=whole_pixels),
        ap_coco=coco.ap,
        ap50=coco.ap50,
        ap75=coco.ap75,
        count_accuracy=metrics.count_accuracy(found_counts, true_counts),
        count_error=metrics.count_error(found_counts, true_counts),
        count_bias=metrics.count_bias(found_counts, true_counts),
        interval_coverage=(
            metrics.interval_coverage(intervals, interval_counts) if have_intervals else None
        ),
        interval_width=metrics.interval_width(intervals) if have_intervals else None,
    )
