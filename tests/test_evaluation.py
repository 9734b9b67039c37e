"""`evaluate` against the metrics called directly, on a detector with known output."""

import gc
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spairkit import metrics
from spairkit.config import Config, DataConfig, SearchMode
from spairkit.counts import CountPosterior
from spairkit.data.scenes import Batch, Scenes
from spairkit.detections import Detections, Truth
from spairkit.detector import Detector, load
from spairkit.evaluation import Figures, evaluate
from spairkit.models.loading import build


class Oracle(Detector):
    """Returns known detections for each image; its first pixel holds its number."""

    def __init__(self, known: list[Detections]) -> None:
        super().__init__(build(Config()), Config())
        self.known = known
        self.thresholds: list[float] = []
        self.selects = True  # else it returns every detection, with the posterior of the count

    def detect_batch(
        self, images: Tensor, threshold: float = 0.5, counts: Tensor | None = None
    ) -> list[Detections]:
        assert counts is None, "SPAIR is given no counts"
        self.thresholds.append(threshold)
        known = [self.known[int(number)] for number in images[:, 0, 0, 0].tolist()]
        return [item[item.scores > threshold] for item in known] if self.selects else known


def numbered_images(first: int, num: int) -> Tensor:
    return torch.arange(first, first + num).float()[:, None, None, None].expand(num, 3, 4, 4)


def random_set(num_images: int) -> tuple[list[Detections], list[Truth], list[Batch]]:
    """Candidates near the 0 to 3 true boxes of each image, in batches of 7."""
    generator = torch.Generator().manual_seed(3)

    def boxes(num: int) -> Tensor:
        corner = torch.randint(0, 30, (num, 2), generator=generator)
        return torch.cat([corner, corner + 10], dim=1).float()

    truth, known, batches = [], [], []
    for _ in range(num_images):
        true = boxes(int(torch.randint(0, 4, (), generator=generator)))
        near = true + torch.randint(-2, 3, true.shape, generator=generator)
        every = torch.cat([near, boxes(2)])
        scores = torch.rand(len(every), generator=generator)
        known.append(Detections(every, scores, torch.ones(len(every), 50), scores))
        truth.append(Truth(true, torch.zeros(len(true), dtype=torch.int64)))
    for start in range(0, num_images, 7):
        part = truth[start : start + 7]
        padded = torch.zeros(len(part), 3, 4)
        for row, item in zip(padded, part, strict=True):
            row[: len(item)] = item.boxes
        batches.append(
            Batch(
                images=numbered_images(start, len(part)),
                boxes=padded,
                labels=torch.zeros(len(part), 3, dtype=torch.int64),
                counts=torch.tensor([len(item) for item in part]),
            )
        )
    return known, truth, batches


def above(items: list[Detections], threshold: float) -> list[Detections]:
    return [
        Detections(d.boxes[on], d.scores[on], d.what[on], d.depth[on])
        for d in items
        for on in [d.scores > threshold]
    ]


def figures_by_hand(known: list[Detections], truth: list[Truth], threshold: float) -> Figures:
    candidates, found = above(known, 0.05), above(known, threshold)
    counts = [len(item) for item in found], [len(item) for item in truth]
    coco = metrics.ap_coco(candidates, truth)
    return Figures(
        images=len(truth),
        objects=sum(counts[1]),
        ap=metrics.average_precision(candidates, truth),
        ap_spair=metrics.ap_spair(found, truth),
        ap_coco=coco.ap,
        ap50=coco.ap50,
        ap75=coco.ap75,
        count_accuracy=metrics.count_accuracy(*counts),
        count_error=metrics.count_error(*counts),
        count_bias=metrics.count_bias(*counts),
    )


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_evaluate_equals_the_metrics(threshold: float) -> None:
    known, truth, batches = random_set(60)
    report = evaluate(Oracle(known), batches, threshold)
    assert report.overall == figures_by_hand(known, truth, threshold)
    assert list(report.by_objects) == [0, 1, 2, 3]
    for count, figures in report.by_objects.items():
        chosen = [i for i, item in enumerate(truth) if len(item) == count]
        group = [known[i] for i in chosen], [truth[i] for i in chosen]
        assert figures == figures_by_hand(*group, threshold)
    assert sum(figures.images for figures in report.by_objects.values()) == 60


def test_every_image_is_detected_once() -> None:
    known, _, batches = random_set(20)
    detector, done = Oracle(known), list[int]()
    evaluate(detector, batches, progress=done.append)
    assert detector.thresholds == [0.05, 0.05, 0.05]
    assert done == [7, 14, 20]


def test_low_threshold_lowers_the_candidate_threshold() -> None:
    known, _, batches = random_set(7)
    detector = Oracle(known)
    report = evaluate(detector, batches, threshold=0.0)
    assert detector.thresholds == [0.0]
    assert report.to_json()["candidate_threshold"] == 0.0


def test_images_are_released_after_their_batch() -> None:
    known, _, batches = random_set(21)
    alive: list[weakref.ref[Tensor]] = []

    def one_at_a_time() -> Iterator[Batch]:
        while batches:
            batch = batches.pop(0)
            gc.collect()
            # evaluate still holds the previous batch when it requests this one
            assert sum(reference() is not None for reference in alive) <= 1
            alive.append(weakref.ref(batch.images))
            yield batch
            del batch

    assert evaluate(Oracle(known), one_at_a_time()).overall.images == 21


def test_json_describes_the_measurement() -> None:
    known, _, batches = random_set(30)
    report = evaluate(Oracle(known), batches, measured_on="numbers <1> to 30")
    back = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert back["measured_on"] == "numbers <1> to 30"
    assert back["threshold"] == 0.5
    assert back["overall"]["ap"] == report.overall.ap
    assert back["by_objects"]["2"]["count_error"] == report.by_objects[2].count_error
    assert set(back["overall"]) == {"images", "objects", *back["protocols"]}
    # images without objects have figures for counts, but none for boxes
    assert back["by_objects"]["0"]["ap"] is back["by_objects"]["0"]["ap_spair"] is None
    assert back["by_objects"]["0"]["count_accuracy"] == report.by_objects[0].count_accuracy


def test_empty_sets_and_wrong_thresholds_are_refused() -> None:
    known, _, batches = random_set(7)
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(Oracle(known), [])
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\), got 1.0"):
        evaluate(Oracle(known), batches, threshold=1.0)


def test_untrained_spair_can_be_evaluated() -> None:
    scenes = Scenes(DataConfig(max_objects=3), "test")
    detector = Detector(build(Config()).eval(), Config())
    report = evaluate(detector, [scenes.batch(torch.arange(4)), scenes.batch(torch.arange(4, 6))])
    assert report.overall.images == 6
    assert set(report.by_objects) <= {1, 2, 3}
    assert sum(figures.images for figures in report.by_objects.values()) == 6


def test_intervals_of_counts_are_measured() -> None:
    known, truth, batches = random_set(40)
    known = [
        replace(item, counts=CountPosterior.independent(item.scores[item.scores > 0.3]))
        for item in known
    ]
    detector = Oracle(known)
    detector.selects = False
    report = evaluate(detector, batches)
    intervals = [item.counts.interval() for item in known if item.counts is not None]
    groups = {None: report.overall} | dict(report.by_objects)
    for objects, figures in groups.items():
        chosen = [
            (interval, len(true))
            for interval, true in zip(intervals, truth, strict=True)
            if objects in (None, len(true))
        ]
        inside = [low <= count <= high for (low, high), count in chosen]
        assert figures.interval_coverage == pytest.approx(sum(inside) / len(chosen))
        widths = [high - low for (low, high), _ in chosen]
        assert figures.interval_width == pytest.approx(sum(widths) / len(chosen))
    assert 0 < report.overall.interval_coverage < 1  # type: ignore[operator]
    assert report.to_json()["overall"]["interval_width"] == report.overall.interval_width


def test_intervals_need_the_posterior_of_every_image() -> None:
    known, _, batches = random_set(7)
    counts = CountPosterior.independent(torch.tensor([0.5]))
    detector = Oracle([replace(known[0], counts=counts), *known[1:]])
    detector.selects = False
    overall = evaluate(detector, batches).overall
    assert overall.interval_coverage is overall.interval_width is None


def test_masks_and_embeddings_are_released_after_their_batch() -> None:
    known, _, batches = random_set(21)
    alive: list[weakref.ref[Tensor]] = []

    class Masked(Oracle):
        def detect_batch(
            self, images: Tensor, threshold: float = 0.5, counts: Tensor | None = None
        ) -> list[Detections]:
            gc.collect()
            # evaluate still holds the previous batch when it asks for this one
            assert sum(reference() is not None for reference in alive) <= 7
            found = []
            for item in super().detect_batch(images, threshold, counts):
                label_image = torch.zeros(4, 4, dtype=torch.int32)
                alive.append(weakref.ref(label_image))
                labels = torch.arange(1, len(item) + 1, dtype=torch.int32)
                found.append(replace(item, label_image=label_image, labels=labels))
            return found

    report = evaluate(Masked(known), batches)
    assert report.overall == evaluate(Oracle(known), batches).overall


def test_a_score_equal_to_the_threshold_is_not_found() -> None:
    known, _, batches = random_set(7)
    known = [replace(item, scores=torch.full_like(item.scores, 0.5)) for item in known]
    found = evaluate(Oracle(known), batches, threshold=0.5).overall
    true = sum(int(batch.counts.sum()) for batch in batches)
    assert found.count_bias == pytest.approx(-true / 7)


def test_crowds_count_in_no_figure() -> None:
    """The object in the crowd is neither found nor missed, and the posterior counts it alone."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    posterior = CountPosterior.independent(torch.tensor([0.99, 0.99]))
    known = Detections(boxes, torch.ones(2), torch.zeros(2, 0), torch.zeros(2), counts=posterior)
    oracle = Oracle([known, known])
    oracle.selects = False
    crowds = torch.tensor([[[18.0, 18, 40, 40]], [[0.0] * 4]])
    counts = torch.tensor([1, 2])
    true = torch.stack([boxes * torch.tensor([[1.0], [0]]), boxes])
    batch = Batch(numbered_images(0, 2), true, torch.zeros(2, 2).long(), counts, crowds)
    report = evaluate(oracle, [batch])
    assert (report.overall.ap, report.overall.ap_coco, report.overall.count_bias) == (1, 1, 0)
    assert report.overall.count_accuracy == 1
    assert report.overall.interval_coverage == 1, "of the second image only"
    assert report.by_objects[1].interval_coverage is None
    without = evaluate(oracle, [replace(batch, crowds=None)])
    assert without.overall.count_bias == 0.5
    assert without.by_objects[1].interval_coverage == 0


@pytest.mark.parametrize(
    ("search", "box_contrast", "images"),
    [
        ("off", None, 40),
        ("refine", 0.0, 4),
        pytest.param("off", 0.0, 1000, marks=pytest.mark.long),
        pytest.param("refine", 0.0, 100, marks=pytest.mark.long),
        pytest.param("full", None, 40, marks=pytest.mark.long),
    ],
)
@pytest.mark.timeout(3600)
def test_batch_size_does_not_change_figures(
    search: SearchMode, box_contrast: float | None, images: int
) -> None:
    """Boxes agree to 1e-4 px, scores to 1e-6; the masks, and all figures, are the same."""
    detector = load(device="cpu", box_contrast=box_contrast, search=search)
    scenes = Scenes(DataConfig(), "test")

    def in_batches(size: int) -> list[Batch]:
        starts = range(0, images, size)
        return [scenes.batch(torch.arange(i, min(i + size, images))) for i in starts]

    def found_in(size: int) -> list[Detections]:
        return [item for b in in_batches(size) for item in detector.detect_batch(b.images, 0.05)]

    expected, whole = found_in(images), evaluate(detector, in_batches(images))
    assert sum(len(item) for item in expected) > images
    for size in (1, 7, 32):
        for one, other in zip(found_in(size), expected, strict=True):
            torch.testing.assert_close(one.boxes, other.boxes, rtol=0, atol=1e-4)
            torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-6)
            assert one.label_image is not None
            assert other.label_image is not None
            assert torch.equal(one.label_image, other.label_image)
        assert evaluate(detector, in_batches(size)) == whole


def test_candidates_are_seen_with_their_masks() -> None:
    """Before they are dropped, in the order of the images."""
    known, _, batches = random_set(20)
    masks = [torch.full((4, 4), number, dtype=torch.int32) for number in range(20)]
    detector = Oracle(
        [
            replace(item, label_image=mask, labels=torch.arange(1, len(item) + 1).int())
            for item, mask in zip(known, masks, strict=True)
        ]
    )
    seen: list[Detections] = []
    evaluate(detector, batches, seen=seen.extend)
    assert [int(item.label_image[0, 0]) for item in seen] == list(range(20))  # type: ignore[index]
    expected = [int((item.scores > 0.05).sum()) for item in known]
    assert [len(item) for item in seen] == expected
