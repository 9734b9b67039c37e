"""AP against pycocotools and a literal loop of the authors' rule; properties of AP; counts."""

import contextlib
import io
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from spairkit import metrics
from spairkit.boxes import box_iou
from spairkit.detections import Detections, Truth
from spairkit.metrics import (
    ap_coco,
    ap_spair,
    average_precision,
    count_accuracy,
    count_bias,
    count_error,
)

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)

Scenes = tuple[list[Detections], list[Truth]]


def detections(boxes: Tensor, scores: Tensor | None = None) -> Detections:
    num = len(boxes)
    return Detections(
        boxes=boxes.reshape(-1, 4).float(),
        scores=torch.ones(num) if scores is None else scores.float(),
        what=torch.zeros(num, 0),
        depth=torch.zeros(num),
    )


def truth(boxes: Tensor) -> Truth:
    return Truth(boxes.reshape(-1, 4).float(), torch.full((len(boxes),), -1))


def random_boxes(rng: np.random.Generator, num: int, *, whole: bool) -> Tensor:
    corner = rng.uniform(0, 40, (num, 2))
    side = rng.uniform(3, 14, (num, 2))
    boxes = np.concatenate([corner, corner + side], axis=1)
    return torch.tensor(np.round(boxes) if whole else boxes)


def random_scenes(seed: int, num_images: int) -> Scenes:
    """Crowded images with near misses, duplicates, ties of scores and of IoU, and empty images."""
    rng = np.random.default_rng(seed)
    whole = bool(seed % 2)
    coarse = seed % 3 == 0
    found, true = [], []
    for _ in range(num_images):
        here = random_boxes(rng, int(rng.integers(0, 9)), whole=whole)
        near = here[rng.random(len(here)) < 0.8]
        noise = rng.integers(-2, 3, near.shape) if whole else rng.normal(0, 1.5, near.shape)
        near = near + torch.tensor(noise)
        # pycocotools skips detections of negative area
        near = torch.cat([near[:, :2], torch.maximum(near[:, 2:], near[:, :2] + 1)], dim=1)
        double = near[rng.random(len(near)) < 0.3]
        wild = random_boxes(rng, int(rng.integers(0, 3)), whole=whole)
        boxes = torch.cat([near, double, wild])[
            rng.permutation(len(near) + len(double) + len(wild))
        ]
        scores = torch.tensor(rng.random(len(boxes)))
        found.append(detections(boxes, (scores * 4).round() / 4 if coarse else scores))
        true.append(truth(here))
    return found, true


def crowded(scenes: Scenes, seed: int) -> Scenes:
    """The same with regions of crowds, in which detections lie wholly, by half or not at all."""
    rng = np.random.default_rng(seed)
    true = []
    for item in scenes[1]:
        corner = rng.integers(0, 35, (int(rng.integers(0, 3)), 2))
        regions = np.concatenate([corner, corner + rng.integers(5, 30, corner.shape)], axis=1)
        true.append(replace(item, crowds=torch.tensor(regions).float()))
    return scenes[0], true


def pycocotools_evaluation(scenes: Scenes, thresholds: list[float] | None = None) -> COCOeval:
    """By default with pycocotools' thresholds; odd ids and several categories of one class."""
    found, true = scenes
    results = [entry for i, item in enumerate(found) for entry in item.to_coco(3 * i + 5, 11)]
    annotations = [
        {
            "id": 0,
            "image_id": 3 * i + 5,
            "category_id": 11 + i % 3,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": is_crowd,
        }
        for i, item in enumerate(true)
        for is_crowd, boxes in enumerate((item.boxes, item.crowds))
        for x1, y1, x2, y2 in boxes.double().tolist()
    ]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = 7 * number
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": 3 * i + 5} for i in range(len(true))],
            "annotations": annotations,
            "categories": [{"id": number, "name": "object"} for number in (13, 11, 12)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.useCats = 0
        if thresholds is not None:
            evaluation.params.iouThrs = np.array(thresholds)
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.params.maxDets = [10**6]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def pycocotools_precision(scenes: Scenes, thresholds: list[float] | None = None) -> list[float]:
    """AP at each IoU threshold."""
    evaluation = pycocotools_evaluation(scenes, thresholds)
    precision: list[float] = evaluation.eval["precision"][:, :, 0, 0, 0].mean(axis=1).tolist()
    return precision


def spair_batch(found: list[list[list[float]]], true: list[list[list[float]]]) -> float:
    """AP of one batch, by the steps of the authors' rule; all confidences are equal."""
    num_true = sum(len(boxes) for boxes in true)
    values = []
    for tenth in range(1, 10):
        marks = []
        for predictions, boxes in zip(found, true, strict=True):
            left = [[x1, y1, x2 - 1, y2 - 1] for x1, y1, x2, y2 in boxes]
            had_truth = bool(left)
            for prediction in predictions:
                if had_truth and not left:
                    break
                overlaps = [plain_iou(prediction, box) for box in left]
                best = max(range(len(left)), key=overlaps.__getitem__, default=None)
                if best is not None and overlaps[best] > tenth / 10:
                    marks.append(True)
                    del left[best]
                else:
                    marks.append(False)
        points = []
        hits = 0
        for rank, mark in enumerate(marks, start=1):
            hits += mark
            points.append((hits, hits / rank))
        for r in range(11):
            at_least = [
                precision
                for hits, precision in points
                if num_true and Fraction(hits, num_true) >= Fraction(r, 10)
            ]
            values.append(max(at_least, default=0.0))
    return sum(values) / len(values)


def plain_iou(a: list[float], b: list[float]) -> float:
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return height * width / (both - height * width)


@pytest.mark.parametrize("block", range(6))
@pytest.mark.parametrize("crowds", [False, True])
def test_ap_equals_pycocotools(block: int, crowds: bool) -> None:
    tenths = [i / 10 for i in range(1, 10)]
    for seed in range(block * 50, block * 50 + 50):
        scenes = random_scenes(seed, num_images=1 + seed % 7)
        if crowds:
            scenes = crowded(scenes, seed)
        if not any(map(len, scenes[0])) or not any(map(len, scenes[1])):
            continue  # pycocotools refuses empty results, and has no AP without truth
        expected = pycocotools_precision(scenes, tenths)
        assert average_precision(*scenes) == pytest.approx(np.mean(expected), abs=1e-9)
        precision = pycocotools_precision(scenes)
        actual = ap_coco(*scenes)
        assert actual.ap == pytest.approx(np.mean(precision), abs=1e-9)
        assert actual.ap50 == pytest.approx(precision[0], abs=1e-9)
        assert actual.ap75 == pytest.approx(precision[5], abs=1e-9)


def test_detections_in_crowds_are_those_that_pycocotools_ignores() -> None:
    ignored = 0
    for seed in range(60):
        found, true = crowded(random_scenes(seed, num_images=4), seed)
        if not any(map(len, found)) or not any(map(len, true)):
            continue
        evaluated = pycocotools_evaluation((found, true), [0.5]).evalImgs
        kept = metrics.without_crowds(found, true)
        for item, remains, image in zip(found, kept, evaluated, strict=True):
            if image is None:  # neither found nor true
                continue
            counted = image["dtIds"] and ~image["dtIgnore"][0].astype(bool)
            assert len(remains) == int(np.sum(counted))
            assert remains.scores.sort().values.tolist() == sorted(
                score for score, counts in zip(image["dtScores"], counted, strict=True) if counts
            )
            rows = iter(item)  # a subsequence: the order stays
            assert all(
                any(torch.equal(one.boxes[0], row.boxes[0]) for row in rows) for one in remains
            )
            ignored += len(item) - len(remains)
    assert ignored > 100


def test_what_lies_in_crowds_does_not_count() -> None:
    boxes = torch.tensor(
        [[0.0, 0.0, 10, 10], [20.0, 20, 30, 30], [22.0, 25, 32, 35], [50, 0, 60, 9]]
    )
    found = detections(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]))
    region = torch.tensor([[18.0, 18, 40, 40]])
    true = replace(truth(boxes[:1]), crowds=region)
    (left,) = metrics.without_crowds([found], [true])
    assert left.boxes.tolist() == boxes[[0, 3]].tolist()
    assert average_precision([found[:3]], [true]) == 1
    assert ap_spair([found[:3]], [true]) == ap_spair([found[:1]], [truth(boxes[:1])]) > 0
    assert metrics.agreement([found], [true]).found == 2
    assert metrics.agreement([found], [found]).found == 4
    only = replace(truth(boxes[:0]), crowds=region)
    assert average_precision([found[1:3]], [only]) == 1
    assert average_precision([found], [only]) == 0
    assert ap_spair([found], [only]) == 0
    inside = replace(truth(boxes[1:2]), crowds=region)  # a box of its own counts, in a crowd too
    assert metrics.without_crowds([found[1:2]], [inside])[0].boxes.tolist() == boxes[1:2].tolist()


def test_ap_equals_pycocotools_on_a_large_set() -> None:
    scenes = random_scenes(7, num_images=400)
    expected = pycocotools_precision(scenes, [i / 10 for i in range(1, 10)])
    assert average_precision(*scenes) == pytest.approx(np.mean(expected), abs=1e-9)
    assert ap_coco(*scenes).ap == pytest.approx(np.mean(pycocotools_precision(scenes)), abs=1e-9)


def test_memory_bound_does_not_change_ap(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = random_scenes(11, num_images=40)
    expected = average_precision(*scenes), ap_spair(*scenes), ap_coco(*scenes)
    monkeypatch.setattr(metrics, "_CHUNK_TRUTH", 17)
    assert (average_precision(*scenes), ap_spair(*scenes), ap_coco(*scenes)) == expected


@pytest.mark.parametrize("block", range(4))
def test_ap_spair_equals_a_literal_loop(block: int) -> None:
    for seed in range(block * 75, block * 75 + 75):
        found, true = random_scenes(seed, num_images=1 + seed % 9)
        batch_size = 1 + seed % 4
        expected = 0.0
        for start in range(0, len(found), batch_size):
            batch = [item.boxes.double().tolist() for item in found[start : start + batch_size]]
            boxes = [item.boxes.double().tolist() for item in true[start : start + batch_size]]
            expected += len(batch) * spair_batch(batch, boxes) / len(found)
        assert ap_spair(found, true, batch_size=batch_size) == pytest.approx(expected, abs=1e-12)


def test_ap_spair_averages_batches_of_32() -> None:
    found, true = random_scenes(5, num_images=40)
    first, second = ap_spair(found[:32], true[:32]), ap_spair(found[32:], true[32:])
    assert ap_spair(found, true) == pytest.approx((32 * first + 8 * second) / 40)


def test_ap_spair_ignores_detections_once_all_truth_is_matched() -> None:
    box = torch.tensor([[4.0, 4.0, 14.0, 14.0]])
    inclusive = torch.tensor([[4.0, 4.0, 13.0, 13.0]])
    double = detections(torch.cat([inclusive, inclusive + 20]))
    second = detections(inclusive)
    # in a pooled ranking, the first image's wrong box would precede the second's hit
    assert ap_spair([double, second], [truth(box), truth(box)]) == 1.0
    assert average_precision([double, second], [truth(box), truth(box)]) < 1.0


def test_ap_spair_penalises_exact_boxes_for_one_pixel() -> None:
    box = torch.tensor([[4.0, 4.0, 14.0, 14.0]])
    # IoU 81 / 100 passes .1 to .8 and fails .9
    assert ap_spair([detections(box)], [truth(box)]) == pytest.approx(8 / 9)


def test_ap_spair_hit_needs_iou_above_the_threshold() -> None:
    true = [truth(torch.tensor([[0.0, 0.0, 11.0, 2.0]]))]  # 10 x 1 for the authors
    half = [detections(torch.tensor([[0.0, 0.0, 5.0, 1.0]]))]
    assert ap_spair(half, true) == pytest.approx(4 / 9)
    assert average_precision(half, [truth(torch.tensor([[0.0, 0.0, 10.0, 1.0]]))]) == (
        pytest.approx(5 / 9)
    )


def test_ap_is_defined_without_truth() -> None:
    nothing = detections(torch.zeros(0, 4))
    something = detections(torch.tensor([[0.0, 0.0, 5.0, 5.0]]))
    empty = truth(torch.zeros(0, 4))
    assert average_precision([nothing], [empty]) == ap_coco([nothing], [empty]).ap == 1.0
    assert average_precision([something], [empty]) == ap_coco([something], [empty]).ap == 0.0
    assert average_precision([], []) == 1.0
    assert ap_spair([nothing], [empty]) == ap_spair([something], [empty]) == ap_spair([], []) == 0.0
    assert average_precision([nothing], [truth(something.boxes)]) == 0.0
    assert ap_spair([nothing], [truth(something.boxes)]) == 0.0


def test_degenerate_boxes_miss_without_a_warning() -> None:
    flat = torch.tensor([[5.0, 5.0, 5.0, 9.0], [9.0, 9.0, 3.0, 3.0], [0.0, 0.0, 1e30, 1e30]])
    true = [truth(torch.tensor([[2.0, 2.0, 12.0, 12.0], [4.0, 4.0, 4.0, 4.0]]))]
    assert average_precision([detections(flat)], true) == 0.0
    assert ap_spair([detections(flat)], true) == 0.0


@st.composite
def scenes_of_distinct_scores(draw: st.DrawFn) -> Scenes:
    corner = st.integers(0, 20)
    side = st.integers(1, 12)
    box = st.tuples(corner, corner, side, side).map(
        lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
    )
    boxes = st.lists(st.tuples(st.lists(box, max_size=6), st.lists(box, max_size=6)), max_size=5)
    pairs = draw(boxes)
    num = sum(len(found) for found, _ in pairs)
    scores = torch.tensor(draw(st.permutations(range(num))), dtype=torch.float32)
    parts = scores.split([len(found) for found, _ in pairs]) if pairs else ()
    found = [
        detections(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), (part + 1) / (num + 1))
        for (boxes, _), part in zip(pairs, parts, strict=True)
    ]
    true = [truth(torch.tensor(b, dtype=torch.float32).reshape(-1, 4)) for _, b in pairs]
    return found, true


@PROPERTY
@given(scenes_of_distinct_scores())
def test_ap_lies_between_0_and_1(scenes: Scenes) -> None:
    for value in (average_precision(*scenes), ap_spair(*scenes), ap_coco(*scenes).ap):
        assert 0.0 <= value <= 1.0


@PROPERTY
@given(scenes_of_distinct_scores(), st.randoms(use_true_random=False))
def test_order_of_boxes_does_not_change_ap(scenes: Scenes, random: object) -> None:
    found, true = scenes
    generator = torch.Generator().manual_seed(random.getrandbits(31))  # type: ignore[attr-defined]
    shuffled = []
    for item in found:
        order = torch.randperm(len(item), generator=generator)
        shuffled.append(detections(item.boxes[order], item.scores[order]))
    assert average_precision(shuffled, true) == average_precision(found, true)
    assert ap_coco(shuffled, true) == ap_coco(found, true)


@PROPERTY
@given(scenes_of_distinct_scores())
def test_ap_depends_only_on_the_order_of_scores(scenes: Scenes) -> None:
    found, true = scenes
    mapped = [detections(item.boxes, item.scores.double() ** 3 * 7 - 2) for item in found]
    assert average_precision(mapped, true) == average_precision(found, true)
    assert ap_spair(mapped, true) == ap_spair(found, true)


@PROPERTY
@given(scenes_of_distinct_scores())
def test_ap_of_the_truth_is_1(scenes: Scenes) -> None:
    _, true = scenes
    perfect = [detections(item.boxes) for item in true]
    assert average_precision(perfect, true) == 1.0
    assert ap_coco(perfect, true) == metrics.CocoAP(1.0, 1.0, 1.0)


@PROPERTY
@given(scenes_of_distinct_scores())
def test_empty_image_does_not_change_ap(scenes: Scenes) -> None:
    found, true = scenes
    empty = detections(torch.zeros(0, 4)), truth(torch.zeros(0, 4))
    more = [*found, empty[0]], [*true, empty[1]]
    assert average_precision(*more) == average_precision(found, true)
    assert ap_coco(*more) == ap_coco(found, true)


@PROPERTY
@given(scenes_of_distinct_scores())
def test_stricter_iou_never_raises_ap_of_one_detection(scenes: Scenes) -> None:
    found, true = scenes
    single = [detections(item.boxes[:1], item.scores[:1]) for item in found]
    only = [truth(item.boxes[:1]) for item in true]
    coco = ap_coco(single, only)
    assert coco.ap75 <= coco.ap50
    assert coco.ap <= average_precision(single, only) + 1e-12


def test_count_metrics_equal_values_by_hand() -> None:
    found, true = [3, 0, 5, 2], [3, 1, 2, 2]
    assert count_accuracy(found, true) == 0.5
    assert count_error(found, true) == 1.0
    assert count_bias(found, true) == 0.5
    assert (count_accuracy([], []), count_error([], []), count_bias([], [])) == (1.0, 0.0, 0.0)


def test_intervals_cover_their_ends() -> None:
    intervals, true = [(2, 4), (2, 4), (2, 4), (2, 4), (7, 7)], [2, 4, 5, 1, 7]
    assert metrics.interval_coverage(intervals, true) == 0.6
    assert metrics.interval_width(intervals) == 1.6
    assert (metrics.interval_coverage([], []), metrics.interval_width([])) == (1.0, 0.0)
    with pytest.raises(ValueError, match="one item per image, got 1 and 0"):
        metrics.interval_coverage([(0, 1)], [])


def test_every_figure_has_a_protocol_and_a_unique_name() -> None:
    assert list(metrics.NAMES) == list(metrics.PROTOCOLS)
    assert len(set(metrics.NAMES.values())) == len(metrics.NAMES)
    assert set(metrics.PROTOCOLS) == {
        "ap",
        "ap_spair",
        "ap_coco",
        "ap50",
        "ap75",
        "count_accuracy",
        "count_error",
        "count_bias",
        "interval_coverage",
        "interval_width",
    }


def test_invalid_arguments_are_refused() -> None:
    box = torch.tensor([[0.0, 0.0, 5.0, 5.0]])
    with pytest.raises(ValueError, match="one item per image, got 1 and 2"):
        average_precision([detections(box)], [truth(box), truth(box)])
    with pytest.raises(ValueError, match="one item per image, got 0 and 1"):
        count_accuracy([], [1])
    with pytest.raises(ValueError, match="boxes of found must be finite"):
        ap_spair([detections(box * float("nan"))], [truth(box)])
    with pytest.raises(ValueError, match="scores of found must be finite"):
        ap_coco([detections(box, torch.tensor([float("nan")]))], [truth(box)])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ap_spair([detections(box)], [truth(box)], batch_size=0)


def boxes_of(*rows: tuple[float, float, float, float]) -> Detections:
    num = len(rows)
    boxes = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    return Detections(boxes, torch.rand(num), torch.zeros(num, 0), torch.zeros(num))


def test_agreement_is_the_best_matching_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CHUNK_ROWS", 3)
    generator = torch.Generator().manual_seed(0)
    for num, other in ((0, 0), (0, 3), (4, 0), (1, 1), (7, 5), (6, 6)):
        images = []
        for count in (num, other):
            centres = 8 * torch.rand(count, 2, generator=generator)
            sides = 4 + 2 * torch.rand(count, 2, generator=generator)
            rows = torch.cat([centres, centres + sides], dim=1)
            images.append(boxes_of(*(tuple(row) for row in rows.tolist())))
        ours, theirs = images
        iou = box_iou(ours.boxes.double(), theirs.boxes.double())
        rows_, columns = linear_sum_assignment(-(iou >= 0.5).double().numpy())
        matched = int((iou[rows_, columns] >= 0.5).sum())
        found = metrics.agreement([ours], [theirs])
        assert found == metrics.Agreement(num, other, matched)
        assert metrics.agreement([theirs], [ours]).matched == matched
        assert found.f1 == (2 * matched / (num + other) if num + other else 1.0)


def test_agreement_pairs_inside_each_image() -> None:
    box, half, less = (0, 0, 4, 4), (0, 0, 4, 2), (0, 0, 4, 1.9)
    truth = Truth(torch.tensor([box], dtype=torch.float32), torch.zeros(1).long())
    assert metrics.agreement([boxes_of(half)], [truth]).f1 == 1
    assert metrics.agreement([boxes_of(less)], [truth]).f1 == 0
    one, none = boxes_of(box), boxes_of()
    assert metrics.agreement([one, none], [none, one]).f1 == 0
    assert metrics.agreement([one, none], [one, none]).f1 == 1
    assert metrics.agreement([boxes_of((3, 3, 3, 3))], [boxes_of((3, 3, 3, 3))]).matched == 0
    with pytest.raises(ValueError, match="one item per image"):
        metrics.agreement([one], [])
    with pytest.raises(ValueError, match="must be finite"):
        metrics.agreement([boxes_of((0, 0, float("inf"), 1))], [one])
