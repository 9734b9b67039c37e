"""Trust in objects: regular masks, contrast to the surroundings, agreement with the encoder."""

import math

import pytest
import torch
from torch import Tensor

from spairkit.counts import CountPosterior
from spairkit.detections import Detections
from spairkit.search.trust import (
    LEAST_TRUST,
    contrasts,
    doubted_count,
    ranked,
    regularity,
    trust,
)

INSIDE = torch.tensor([5.0, 5, 20, 20])


def disc(y: float, x: float, diameter: float, size: tuple[int, int] = (40, 60)) -> Tensor:
    rows, columns = torch.meshgrid(*(torch.arange(side) + 0.5 for side in size), indexing="ij")
    return (rows - y) ** 2 + (columns - x) ** 2 < (diameter / 2) ** 2


def of(*masks: Tensor) -> list[float]:
    """The regularity of masks that do not overlap."""
    label_image = torch.zeros(masks[0].shape, dtype=torch.int32)
    for number, mask in enumerate(masks, start=1):
        label_image[mask] = number
    labels = torch.arange(1, len(masks) + 1, dtype=torch.int32)
    values = regularity(label_image, labels, INSIDE.expand(len(masks), 4))
    assert values.dtype == torch.float32
    return values.tolist()


def test_rectangles_fill_their_hulls_and_small_ones_count_by_area() -> None:
    block = torch.zeros(40, 60, dtype=torch.bool)
    large, small = block.clone(), block.clone()
    large[2:14, 3:18] = True
    small[20:25, 30:36] = True  # 30 px of .55 12^2
    assert of(large, small) == pytest.approx([1.0, 30 / 79.2])


def test_an_l_shape_fills_a_share_of_its_hull() -> None:
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[0:20, 0:10] = True
    mask[10:20, 0:20] = True  # three squares of 10 px; the hull cuts the fourth in half
    assert of(mask) == pytest.approx([300 / 350])


def test_a_single_disc_is_more_regular_than_two_and_than_a_rim() -> None:
    one = disc(12, 12, 12)
    two = disc(28, 12, 12) | disc(28, 23, 12)
    rim = disc(20, 45, 24) & ~disc(20, 41, 24)
    single, both, crescent = of(one, two, rim)
    assert single > 0.9
    assert single > both + 0.03
    assert crescent < both < single


def test_labels_may_be_any_of_the_image() -> None:
    label_image = torch.zeros(40, 60, dtype=torch.int32)
    label_image[disc(12, 12, 14)] = 7
    label_image[disc(12, 40, 14)] = 3
    label_image[30, 30] = 4
    labels = torch.tensor([7, 4, 5, 3, 9], dtype=torch.int32)
    values = regularity(label_image, labels, INSIDE.expand(5, 4)).tolist()
    assert values[0] == values[3] > 0.9
    assert values[1] == pytest.approx(1 / 79.2)
    assert (values[2], values[4]) == (0, 0), "without a pixel"
    none = torch.zeros(0, dtype=torch.int32)
    assert len(regularity(label_image, none, torch.zeros(0, 4))) == 0


@pytest.mark.parametrize(
    "box", [[0.0, 5, 4, 9], [5.0, 0, 9, 4], [56.0, 5, 60, 9], [5.0, 36, 9, 40], [5.0, 5, 9, 9]]
)
def test_small_masks_at_the_ends_of_the_image_may_be_cut_off(box: list[float]) -> None:
    label_image = torch.zeros(40, 60, dtype=torch.int32)
    x1, y1, x2, y2 = map(int, box)
    label_image[y1:y2, x1:x2] = 1
    value = regularity(label_image, torch.ones(1, dtype=torch.int32), torch.tensor([box]))
    assert value.item() == pytest.approx(16 / 79.2 if box == [5.0, 5, 9, 9] else 0.7)


def test_contrasts_are_means_over_masks() -> None:
    label_image = torch.zeros(4, 6, dtype=torch.int32)
    label_image[1, 1:3], label_image[2, 4], label_image[3, 0] = 2, 5, 1
    local = torch.zeros(4, 6)
    local[1, 1], local[1, 2], local[2, 4], local[3, 0] = 0.2, 0.4, -0.3, 0.9
    values = contrasts(label_image, torch.tensor([5, 2, 3]), local)
    assert values.tolist() == pytest.approx([1e-3, 0.3, 1e-3]), "3 has no pixel"
    assert len(contrasts(label_image, torch.zeros(0, dtype=torch.int32), local)) == 0


def test_trust_is_the_product_of_shape_contrast_and_agreement() -> None:
    image = torch.zeros(3, 200, 200)
    label_image = torch.zeros(200, 200, dtype=torch.int32)
    boxes = torch.tensor([[40.0, 40, 52, 52], [140.0, 140, 152, 152]])
    for number, level in ((1, 0.8), (2, 0.2)):
        x = 40 if number == 1 else 140
        label_image[x : x + 12, x : x + 12] = number
        image[1, x : x + 12, x : x + 12] = level  # the brightest channel counts
    found = Detections(
        boxes=boxes,
        scores=torch.ones(2),
        what=torch.zeros(2, 2),
        depth=torch.zeros(2),
        label_image=label_image,
        labels=torch.tensor([1, 2], dtype=torch.int32),
    )
    alone = trust(found, image, torch.zeros(0, 4))
    fourth = 4**0.25  # root of the contrast, and root of all
    assert alone[0] == pytest.approx(fourth * alone[1].item(), rel=1e-4)
    half = torch.tensor([[40.0, 40, 52, 46], [0, 0, 0, 0]])
    torch.testing.assert_close(trust(found, image, half) / alone, torch.tensor([2.5, 1.0]).sqrt())
    both = trust(found, image, boxes.flip(0))
    torch.testing.assert_close(both, 2 * alone)
    assert 0.7 < both[0] < 0.8**0.25
    assert len(trust(found[:0], image, boxes)) == 0


def test_distrust_lowers_scores_above_one_half() -> None:
    scores = torch.tensor([0.2, 0.5, 0.7, 1.0, 1.0, 1.0])
    trusted = torch.tensor([0.0, 0.0, 0.66, 1.0, LEAST_TRUST, 0.0])
    low = 0.5 - 0.5 * LEAST_TRUST / (1 - LEAST_TRUST)
    expected = torch.tensor([0.2, 0.5, 0.6, 1.0, 0.5, low])
    torch.testing.assert_close(ranked(scores, trusted), expected)


def test_doubt_about_the_count_grows_as_confidence_falls() -> None:
    assert doubted_count(torch.zeros(0)).interval() == (0, 1)
    for confidence, relative in ((0.7, 0.1), (0.6, 0.1 * math.e), (0.8, 0.1 / math.e)):
        counts = doubted_count(torch.full((80,), confidence))
        expected = CountPosterior.spread(84, math.sqrt(40.5 + (80 * relative) ** 2))
        found, wanted = counts.probabilities, expected.probabilities
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
        assert counts.least == expected.least
