"""Masks of single objects are regular; those of two, of rims and of specks are less so."""

import pytest
import torch
from torch import Tensor

from spairkit.search.regularity import ranked, regularity


def disc(y: float, x: float, diameter: float, size: tuple[int, int] = (40, 60)) -> Tensor:
    rows, columns = torch.meshgrid(*(torch.arange(side) + 0.5 for side in size), indexing="ij")
    return (rows - y) ** 2 + (columns - x) ** 2 < (diameter / 2) ** 2


def of(*masks: Tensor) -> list[float]:
    """The regularity of masks that do not overlap."""
    label_image = torch.zeros(masks[0].shape, dtype=torch.int32)
    for number, mask in enumerate(masks, start=1):
        label_image[mask] = number
    labels = torch.arange(1, len(masks) + 1, dtype=torch.int32)
    values = regularity(label_image, labels)
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
    values = regularity(label_image, torch.tensor([7, 4, 5, 3, 9], dtype=torch.int32)).tolist()
    assert values[0] == values[3] > 0.9
    assert values[1] == pytest.approx(1 / 79.2)
    assert (values[2], values[4]) == (0, 0), "without a pixel"
    assert len(regularity(label_image, torch.zeros(0, dtype=torch.int32))) == 0


def test_ranks_lower_scores_towards_one_half_only() -> None:
    scores = torch.tensor([0.2, 0.5, 0.7, 1.0, 1.0])
    regular = torch.tensor([0.1, 0.1, 0.5, 1.0, 0.0])
    torch.testing.assert_close(ranked(scores, regular), torch.tensor([0.2, 0.5, 0.6, 1.0, 0.5]))
