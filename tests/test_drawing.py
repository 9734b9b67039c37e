"""Pictures of boxes, reconstructions and objects, checked pixel by pixel."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ImageChops
from torch import Tensor

from spairkit.counts import CountPosterior
from spairkit.detections import Detections, Explanation, Truth
from spairkit.report.colours import COLOURS, DARK_COLOURS, colour_numbers
from spairkit.report.drawing import (
    MAX_OBJECTS,
    contact_sheet,
    display_levels,
    draw_boxes,
    overlay,
    panel,
    reconstruction_sheet,
)


def detections(boxes: list[list[float]], scores: list[float] | None = None) -> Detections:
    num = len(boxes)
    return Detections(
        boxes=torch.tensor(boxes).reshape(-1, 4),
        scores=torch.full((num,), 0.9) if scores is None else torch.tensor(scores),
        what=torch.zeros(num, 0),
        depth=torch.zeros(num),
    )


NONE = detections([])


def dark_image(height: int, width: int) -> Tensor:
    """Dark noise with a few grey pixels, far from the colours of boxes; it is not brightened."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    image = torch.rand(3, height, width, generator=generator) * 0.2
    image.view(3, -1)[:, ::50] = 0.6
    return image


def enlarged(image: Tensor, scale: int) -> Tensor:
    levels = (image * 255).round().to(torch.uint8)
    return levels.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)


def is_colour(picture: Tensor, colour: tuple[int, int, int]) -> Tensor:  # [H, W] bool
    return (picture == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0)


def explained(
    image: Tensor,
    found: Detections = NONE,
    reconstruction: Tensor | None = None,
    appearances: Tensor | None = None,
) -> Explanation:
    maps = torch.zeros(len(found), 14, 14, 4) if appearances is None else appearances
    return Explanation(found, image, image if reconstruction is None else reconstruction, maps)


def boxed(image: Tensor, found: Detections = NONE, scale: int = 8) -> Tensor:
    array = np.array(draw_boxes(image, found, scale))
    return torch.from_numpy(array).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(48, 48, 8), (84, 84, 5), (48, 84, 5), (1, 1, 16), (1, 300, 2), (400, 20, 1)],
)
def test_small_images_are_enlarged_pixel_by_pixel(height: int, width: int, scale: int) -> None:
    image = dark_image(height, width)
    assert contains(panel(explained(image)), enlarged(image, scale))
    assert torch.equal(boxed(image, scale=3), enlarged(image, 3))


@pytest.mark.parametrize("scale", [1, 4, 8])
@pytest.mark.parametrize(
    "box", [[20, 14, 34, 30], [0, 0, 9, 9], [40, 30, 64, 48], [30, 20, 33, 23]]
)
def test_box_is_outlined_and_its_interior_is_unchanged(box: list[int], scale: int) -> None:
    image = dark_image(48, 64)
    picture = boxed(image, detections([[float(x) for x in box]]), scale)
    plain = enlarged(image, scale)
    x1, y1, x2, y2 = (scale * x for x in box)
    inner = slice(y1 + 5, y2 - 5), slice(x1 + 5, x2 - 5)
    if box[0] > 0 and box[2] < 64:
        inner = slice(y1, y2), slice(x1, x2)
    assert torch.equal(picture[:, *inner], plain[:, *inner])
    # every side has a line, even at the edge of the image
    coloured = is_colour(picture, COLOURS[0])
    for side in (
        coloured[max(y1 - 4, 0) : y1 + 4, (x1 + x2) // 2],
        coloured[y2 - 4 : y2 + 4, (x1 + x2) // 2],
        coloured[(y1 + y2) // 2, max(x1 - 4, 0) : x1 + 4],
        coloured[(y1 + y2) // 2, x2 - 4 : x2 + 4],
    ):
        assert side.any()


def test_box_of_the_whole_image_is_visible() -> None:
    picture = boxed(dark_image(48, 48), detections([[0.0, 0.0, 48.0, 48.0]]))
    assert is_colour(picture, COLOURS[0])[:, 200].any()


def test_box_of_higher_score_is_on_top() -> None:
    same = [[10.0, 10.0, 30.0, 30.0]] * 2
    for scores, top in (([0.9, 0.6], 0), ([0.6, 0.9], 1)):
        picture = boxed(dark_image(48, 48), detections(same, scores))
        assert is_colour(picture, COLOURS[top]).any()
        assert not is_colour(picture, COLOURS[1 - top]).any()


def masked(found: Detections, image: Tensor, labels: list[int]) -> Detections:
    label_image = torch.zeros(image.shape[1:], dtype=torch.int32)
    label_image[10:20, 12:30] = 5
    label_image[30:40, 40:45] = 8
    return replace(found, label_image=label_image, labels=torch.tensor(labels, dtype=torch.int32))


def frame(height: int, width: int, box: tuple[int, int, int, int]) -> Tensor:
    """The line outside a box (x1, y1, x2, y2), one pixel wide, without its corners."""
    x1, y1, x2, y2 = box
    line = torch.zeros(height, width, dtype=torch.bool)
    line[y1 - 1 : y2 + 1, x1:x2] = True
    line[y1:y2, x1 - 1 : x2 + 1] = True
    line[y1:y2, x1:x2] = False
    return line


@pytest.mark.parametrize("scale", [1, 2])
def test_small_objects_have_outlines_instead_of_boxes(scale: int) -> None:
    image = dark_image(48, 64)
    found = detections([[12.0, 10.0, 30.0, 20.0], [40.0, 30.0, 45.0, 40.0], [50.0, 2.0, 56.0, 9.0]])
    found = masked(found, image, [5, 8, 9])  # the third has no pixel
    picture = boxed(image, found, scale)
    changed = (picture != enlarged(image, scale)).any(0)
    lines = [
        frame(48 * scale, 64 * scale, (x1 * scale, y1 * scale, x2 * scale, y2 * scale))
        for x1, y1, x2, y2 in found.boxes.int().tolist()
    ]
    assert torch.equal(is_colour(picture, COLOURS[0]), lines[0])
    assert torch.equal(is_colour(picture, COLOURS[1]), lines[1])
    box = is_colour(picture, COLOURS[2])
    assert box[lines[2]].all()
    assert torch.equal(changed, lines[0] | lines[1] | box)


def test_many_objects_have_outlines_instead_of_boxes() -> None:
    image = dark_image(48, 64)
    outside = [-20.0, -20.0, -10.0, -10.0]
    line = frame(384, 512, (96, 80, 240, 160))
    for number, outlined in ((12, False), (13, True)):
        found = detections([[12.0, 10.0, 30.0, 20.0], *[outside] * (number - 1)])
        picture = boxed(image, masked(found, image, [5] + [9] * (number - 1)), 8)
        assert torch.equal(is_colour(picture, COLOURS[0]), line) == outlined


def test_outlines_of_large_objects_are_pale_and_lie_under_boxes() -> None:
    image = dark_image(48, 64)
    found = masked(detections([[12.0, 10.0, 30.0, 20.0], [0.0, 0.0, 8.0, 8.0]]), image, [5, 8])
    picture = boxed(image, found, 8)
    with_boxes = boxed(image, replace(found, label_image=None, labels=None), 8)
    assert torch.equal(is_colour(picture, COLOURS[0]), is_colour(with_boxes, COLOURS[0]))
    pale = picture[:, 239, 325:355].int()  # above the mask without a box
    assert (pale.amin(0) > 80).all()
    assert (pale[0] > pale[2]).all(), "yellow"


def test_objects_have_boxes_beside_the_truth() -> None:
    image = dark_image(48, 64)
    found = masked(detections([[12.0, 10.0, 30.0, 20.0]]), image, [5])
    truth = Truth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    drawn = torch.from_numpy(np.array(draw_boxes(image, found, 1, truth))).permute(2, 0, 1)
    with_boxes = boxed(image, replace(found, label_image=None, labels=None), 1)
    assert torch.equal(is_colour(drawn, COLOURS[0]), is_colour(with_boxes, COLOURS[0]))


@pytest.mark.parametrize("scale", [1, 4, 8])
def test_lines_of_small_boxes_are_one_pixel_wide(scale: int) -> None:
    image = dark_image(48, 64)
    picture = boxed(image, detections([[20.0, 14.0, 29.0, 23.0]]), scale)
    line = frame(48 * scale, 64 * scale, (20 * scale, 14 * scale, 29 * scale, 23 * scale))
    changed = (picture != enlarged(image, scale)).any(0)
    assert changed.sum() == line.sum() + 4, "the line and its corners, no shadow"
    assert changed[line].all()


def test_objects_on_bright_images_have_dark_colours() -> None:
    image = 1 - dark_image(48, 64)
    picture = boxed(image, detections([[20.0, 14.0, 29.0, 23.0]]), 4)
    assert is_colour(picture, DARK_COLOURS[0]).any()
    assert not is_colour(picture, COLOURS[0]).any()


def test_dim_images_are_brightened_and_others_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    dim = torch.rand(1, 60, 80, generator=generator).expand(3, 60, 80) * 0.004 + 0.003  # 12 bits
    dim = dim.clone()
    dim[:, 3, 3] = 1.0  # a hot pixel
    low, high = display_levels(dim)
    assert low == pytest.approx(0.003, abs=1e-4)
    assert high == pytest.approx(0.007, abs=1e-4)
    drawn = panel(explained(dim))[:, 40:100, 20:80]
    assert drawn.float().std() > 60, "uniform over all 256 levels"
    digits = torch.zeros(3, 48, 48)
    digits[:, 5:20, 5:9] = 0.9
    for image in (digits, dark_image(48, 48), torch.full((3, 9, 9), 0.2), dim[:, :1, :1]):
        assert display_levels(image) == (0.0, 1.0)
    assert display_levels(torch.full((3, 4, 4), float("nan"))) == (0.0, 1.0)


def test_reconstructions_and_objects_have_levels_of_their_own() -> None:
    image = dark_image(48, 48) * 0.01
    found = detections([[2.0, 2.0, 12.0, 12.0]])
    drawn = torch.zeros(3, 48, 48)
    drawn[:, :, 24:] = 0.2
    picture = panel(explained(image, found, drawn, plain_objects([0.1])))
    expected = torch.zeros(3, 384, 384, dtype=torch.uint8)
    expected[:, :, 192:] = 255
    assert contains(picture, expected), "from 0 to .2"
    assert is_colour(picture[:, 450:], (128, 128, 128)).sum() >= 84 * 84
    bright = drawn * 4  # as after a preparation that stretches
    assert contains(panel(explained(image, NONE, bright)), enlarged(bright, 8))


def test_labels_are_written_on_demand() -> None:
    image = dark_image(48, 64)
    found = detections([[20.0, 14.0, 34.0, 30.0], [40.0, 0.0, 50.0, 9.0]])
    plain = draw_boxes(image, found, 8)
    labelled = draw_boxes(image, found, 8, labels=True)
    changed = np.array(ImageChops.difference(plain, labelled)).max(2) > 0
    rows, columns = changed.nonzero()
    assert changed[14 * 8 - 20 : 14 * 8, 20 * 8 : 26 * 8].any(), "above the first box"
    assert changed[9 * 8 : 9 * 8 + 20, 40 * 8 : 47 * 8].any(), "below a box at the upper rim"
    assert not changed[14 * 8 : 30 * 8, 20 * 8 : 34 * 8].any(), "not on the object"
    assert rows.max() < 14 * 8
    assert columns.min() >= 20 * 8 - 1
    assert not torch.equal(
        panel(explained(image, found), labels=True), panel(explained(image, found))
    )


def test_labels_never_cover_each_other() -> None:
    image = dark_image(48, 64)
    box = [20.0, 14.0, 34.0, 30.0]
    pair = detections([box, box], [0.6, 0.9])
    once = draw_boxes(image, detections([[9e9] * 4, box], [0.6, 0.9]), 8, labels=True)
    assert np.array_equal(np.array(draw_boxes(image, pair, 8, labels=True)), np.array(once))
    many = detections(
        [[float(x), float(y), x + 2.0, y + 2.0] for x in range(60) for y in range(40)]
    )
    assert draw_boxes(image, many, 1, labels=True).size == (64, 48)


def test_large_images_show_their_objects_below() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 100, 2048, generator=generator)
    found = detections([[1000.0, 40.0, 1010.0, 50.0]])
    picture = panel(explained(image, found))
    assert contains(picture, boxed(image, found, 1))
    assert picture.shape[2] == 2 * 1024 + 3 * 16


def test_panel_of_masks_has_the_outlines_of_the_boxed_image() -> None:
    image = dark_image(48, 64)
    found = masked(detections([[12.0, 10.0, 30.0, 20.0]]), image, [5])
    drawn = panel(explained(image, found))
    assert contains(drawn, boxed(image, found, 6))
    assert contains(drawn, enlarged(image, 6))


def test_panel_gives_the_interval_of_the_count() -> None:
    image = dark_image(48, 48)
    found = detections([[1.0, 1.0, 9.0, 9.0]])
    counts = CountPosterior.independent(torch.tensor([1.0, 0.5]))
    plain = panel(explained(image, found))
    assert not torch.equal(panel(explained(image, replace(found, counts=counts))), plain)


def test_masks_of_another_size_are_refused() -> None:
    image = dark_image(48, 64)
    found = masked(detections([[1.0, 1.0, 9.0, 9.0]]), image, [5])
    with pytest.raises(ValueError, match=r"masks must be \[64, 48\], got \[48, 64\]"):
        panel(explained(dark_image(64, 48), found))


def test_degenerate_boxes_are_not_drawn() -> None:
    image = dark_image(48, 48)
    nan, inf = float("nan"), float("inf")
    bad: list[list[float]] = [
        [nan, 0, 9, 9],
        [9, 9, 3, 3],
        [5, 5, 5, 9],
        [-inf, 0, inf, 9],
        [900, 900, 910, 910],
    ]
    found = detections([[float(x) for x in box] for box in bad])
    assert torch.equal(boxed(image, found), boxed(image))
    beyond = boxed(image, detections([[-1e30, 20.0, 1e30, 30.0]]))
    assert is_colour(beyond, COLOURS[0]).any()
    assert not boxed(torch.full((3, 4, 4), nan)).any()


def test_thousands_of_boxes_can_be_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(3000, 2, generator=generator) * 500
    boxes = torch.cat([corner, corner + 8], dim=1)
    many = Detections(
        boxes, torch.rand(3000, generator=generator), torch.zeros(3000, 0), torch.zeros(3000)
    )
    assert boxed(dark_image(512, 512), many, 1).shape == (3, 512, 512)


def test_neighbours_have_other_colours() -> None:
    rows, columns = np.mgrid[:100, :100].reshape(2, -1)
    x, y = 10.0 * columns + 5 * (rows % 2), 8.0 * rows
    corners = np.stack([x, y, x + 10, y + 10], axis=1)
    drawn = np.random.default_rng(0).permutation(len(corners))
    boxes = torch.from_numpy(corners[drawn])
    chosen = np.empty(len(corners), np.int64)
    chosen[drawn] = colour_numbers(boxes)
    assert np.array_equal(chosen[drawn], colour_numbers(boxes)), "the same each time"
    grid = chosen.reshape(100, 100)
    assert (grid[:, 1:] != grid[:, :-1]).all(), "left and right"
    for start in (0, 1):  # the rows above and below
        row, below = grid[start:-1:2], grid[start + 1 :: 2]
        row, below = row[: len(below)], below[: len(row)]
        assert (row != below).all()
        assert (row[:, 1:] != below[:, :-1] if start == 0 else row[:, :-1] != below[:, 1:]).all()
    assert set(np.bincount(chosen) > 500) == {True}, "all colours"


def test_objects_far_from_each_other_have_the_colours_that_they_want() -> None:
    boxes = torch.tensor([[40.0 * i, 0, 40.0 * i + 9, 9] for i in range(9)])
    assert colour_numbers(boxes).tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    wanted = np.full(9, 7)
    assert colour_numbers(boxes, wanted).tolist() == [1] * 9
    near = torch.tensor([[12.0 * i, 0, 12.0 * i + 9, 9] for i in range(4)])  # gaps of a third
    assert colour_numbers(near, wanted[:4]).tolist() == [1, 2, 1, 2]
    assert colour_numbers(torch.zeros(0, 4)).tolist() == []
    nan = float("nan")
    odd = torch.tensor([[nan, 0, 9, 9], [5, 5, 3, 9], [0, 0, 9, 9], [0, 0, float("inf"), 9]])
    assert colour_numbers(odd).tolist() == [0, 1, 2, 3]


def test_objects_among_too_many_neighbours_have_the_colour_of_the_farthest() -> None:
    boxes = torch.tensor([[2.0 * i, 0, 2.0 * i + 40, 40] for i in range(6)] + [[50.0, 0, 90, 40]])
    chosen = colour_numbers(boxes).tolist()
    assert sorted(chosen[:6]) == [0, 1, 2, 3, 4, 5]
    assert chosen[6] == 0, "10 px away; the others are nearer or overlap"


def test_masks_that_touch_have_other_colours() -> None:
    image = dark_image(48, 64)
    boxes = [[10.0, 10.0, 20.0, 20.0]] + [[60.0, 40.0, 61.0, 41.0]] * 5
    found = detections([*boxes, [20.0, 10.0, 30.0, 20.0]])
    label_image = torch.zeros(48, 64, dtype=torch.int32)
    label_image[10:20, 10:20] = 1
    label_image[10:20, 20:30] = 7
    labels = torch.arange(1, 8, dtype=torch.int32)
    picture = overlay(image, replace(found, label_image=label_image, labels=labels))
    above = picture[:, 6 * 10 - 1]
    left, right = above[:, 6 * 15], above[:, 6 * 25]
    assert tuple(left.tolist()) == COLOURS[0]
    assert tuple(right.tolist()) == COLOURS[1], "not the first one again"


def plain_objects(levels: list[float], alpha: float = 1.0) -> Tensor:
    maps = torch.ones(len(levels), 14, 14, 4)
    maps[..., :3] = torch.tensor(levels)[:, None, None, None]
    maps[..., 3] = alpha
    return maps


def test_panel_shows_objects_by_score() -> None:
    boxes = [[2.0, 2.0, 12.0, 12.0], [20.0, 2.0, 30.0, 12.0], [2.0, 20.0, 12.0, 30.0]]
    found = detections(boxes, [0.6, 0.99, 0.7])
    image = dark_image(48, 48)
    levels = [50 / 255, 100 / 255, 150 / 255]
    picture = panel(explained(image, found, image, plain_objects(levels)))
    assert picture.dtype == torch.uint8
    below = picture[:, 450:]
    lefts = [
        is_colour(below, (level, level, level)).any(0).nonzero()[0].item()
        for level in (100, 150, 50)
    ]
    assert lefts == sorted(lefts)
    assert len(set(lefts)) == 3
    # the frame has the colour of the box
    for index, level in enumerate((50, 100, 150)):
        rows, columns = is_colour(below, (level, level, level)).nonzero(as_tuple=True)
        assert is_colour(below, COLOURS[index])[rows.min() - 1, columns.min() - 1]


def test_transparent_objects_show_the_commonest_colour() -> None:
    found = detections([[2.0, 2, 12, 12]])
    image = dark_image(48, 48)
    image[:, 40:] = torch.tensor([10.0, 60.0, 110.0])[:, None, None] / 255
    clear = panel(explained(image, found, image, plain_objects([1.0], alpha=0.0)))[:, 450:]
    assert is_colour(clear, (10, 60, 110)).sum() == 84 * 84
    half = panel(explained(image, found, image, plain_objects([1.0], alpha=0.6)))[:, 450:]
    assert is_colour(half, (157, 177, 197)).sum() == 84 * 84  # 0.4 of the ground, 0.6 of white
    opaque = panel(explained(image, found, image, plain_objects([0.5], alpha=1.0)))[:, 450:]
    assert is_colour(opaque, (128, 128, 128)).sum() == 84 * 84


def test_panel_contains_image_and_reconstruction() -> None:
    image, drawn = dark_image(48, 48), dark_image(48, 48).flip(1)
    picture = panel(explained(image, NONE, drawn))
    for part in (image, drawn):
        assert contains(picture, enlarged(part, 8))


def contains(picture: Tensor, part: Tensor) -> bool:
    """Whether `part` lies somewhere in `picture`, pixel for pixel."""
    height, width = part.shape[1:]
    corners = (picture[:, : 1 - height, : 1 - width] == part[:, :1, :1]).all(0).nonzero().tolist()
    return any(torch.equal(picture[:, y : y + height, x : x + width], part) for y, x in corners)


def test_panels_and_sheets_enlarge_images_of_any_small_size() -> None:
    image = dark_image(150, 256)
    assert contains(panel(explained(image)), enlarged(image, 2))
    image = dark_image(60, 100)
    sheet = reconstruction_sheet([explained(image)])
    assert contains(sheet, enlarged(image, 2))


def test_panel_size_is_bounded() -> None:
    image = dark_image(40, 60)

    def drawn(num: int) -> Tensor:
        found = detections([[1.0, 1.0, 9.0, 9.0]] * num)
        return panel(explained(image, found, image, plain_objects([0.5] * num)))

    assert drawn(MAX_OBJECTS + 1).shape == drawn(MAX_OBJECTS + 200).shape
    assert not torch.equal(drawn(MAX_OBJECTS + 1), drawn(MAX_OBJECTS + 2))  # "and k more"
    large = dark_image(900, 3000)
    assert panel(explained(large)).shape[2] < 3 * 1024 + 100
    thin = dark_image(1, 2000)
    assert panel(explained(thin)).dim() == 3


def test_sheet_shows_every_image_and_its_ground_truth() -> None:
    images = torch.stack([dark_image(48, 48).roll(i, 2) for i in range(3)])
    drawn = images.flip(2)
    sheets = [explained(*pair) for pair in zip(images, [NONE] * 3, drawn, strict=True)]
    true = [Truth(torch.tensor([[10.0, 10.0, 20.0, 22.0]]), torch.tensor([-1]))] * 3
    sheet = reconstruction_sheet(sheets)
    for part in (*images, *drawn):
        assert contains(sheet, enlarged(part, 4))
    marked = reconstruction_sheet(sheets, true)
    rows, columns = (marked != sheet).any(0)[20 + 16 :].nonzero(as_tuple=True)
    white = is_colour(marked, (255, 255, 255))[20 + 16 :]
    # four corners of a box of 10 by 12 pixels, times 4, in each of three images
    assert white[rows, columns].sum() > 3 * 4 * 10
    assert int(rows.max() - rows.min()) == 12 * 4 - 1


def test_sheet_wraps_and_shrinks_images() -> None:
    one, eight, nine = (
        reconstruction_sheet([explained(dark_image(48, 48))] * number) for number in (1, 8, 9)
    )
    assert eight.shape[1] == one.shape[1]
    assert nine.shape[1] > eight.shape[1]
    assert nine.shape[2] < eight.shape[2]  # rows of five and four
    large = explained(dark_image(1200, 1600))
    assert reconstruction_sheet([large] * 2).shape[2] < 2 * 512 + 100


def test_contact_sheet_shows_images_of_any_sizes_with_their_boxes() -> None:
    images = [dark_image(48, 60), dark_image(30, 40), dark_image(60, 60), dark_image(48, 48)]
    names = [f"{number}.png" for number in range(4)]
    sheet = contact_sheet(names, images, [NONE] * 4)
    for image, scale in zip(images, (4, 5, 4, 4), strict=True):
        assert contains(sheet, enlarged(image, scale))
    found = [NONE, detections([[5.0, 6.0, 20.0, 22.0]]), NONE, NONE]
    boxed_sheet = contact_sheet(names, images, found)
    assert boxed_sheet.shape == sheet.shape
    assert contains(boxed_sheet, enlarged(images[0], 4))
    assert not contains(boxed_sheet, enlarged(images[1], 5))
    named = contact_sheet(["a.png", *names[1:]], images, [NONE] * 4)
    assert not torch.equal(named, sheet), "names are shown"
    longer = contact_sheet(["x" * 500], images[:1], [NONE])
    assert longer.shape[2] < 1200, "long names are cut"


def test_drawing_is_deterministic_and_keeps_its_arguments() -> None:
    image, found = dark_image(48, 48), detections([[2.0, 2, 12, 12], [20, 2, 30, 12]])
    before = image.clone(), found.boxes.clone()
    first, second = boxed(image, found), boxed(image, found)
    assert torch.equal(first, second)
    assert torch.equal(image, before[0])
    assert torch.equal(found.boxes, before[1])


def test_other_shapes_are_refused() -> None:
    image = dark_image(8, 8)
    with pytest.raises(ValueError, match=r"image must be \[3, H, W\], got \[1, 8, 8\]"):
        draw_boxes(image[:1], NONE)
    with pytest.raises(ValueError, match=r"appearances must be \[0, P, P, 4\]"):
        panel(explained(image, NONE, image, torch.zeros(2, 14, 14, 4)))
    with pytest.raises(ValueError, match="truth must hold 1 images, got 0"):
        reconstruction_sheet([explained(image)], [])
    with pytest.raises(ValueError, match="at least one image"):
        reconstruction_sheet([])
