"""Scenes bit for bit against a composition in loops; distributions; determinism."""

import hashlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spairkit.config import DataConfig
from spairkit.data.glyphs import Split, load_glyphs, resize
from spairkit.data.hashing import below, draws, hashed, seeded
from spairkit.data.scenes import Batch, Scenes, scatter
from spairkit.errors import InputError

WORD = (1 << 64) - 1
SMALL: dict[str, Any] = {"image_height": 32, "image_width": 32, "max_objects": 3}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "small": SMALL,
    "wide": {"image_height": 20, "image_width": 33, "max_objects": 4},
    "tall, in colour": {
        "image_height": 40,
        "image_width": 24,
        "colour": "random",
        "max_objects": 4,
    },
    "varied": {"glyph_jitter": 4, "colour": "random", "background": "random", "max_objects": 5},
    "backgrounds": {"background": "random", "max_objects": 2, "min_objects": 0, "seed": 7},
    "tight": {"image_height": 13, "image_width": 14, "glyph_size": 6, "max_overlap": 0.0},
}
CASES["tight"] |= {"min_objects": 3, "max_objects": 3}


def scramble(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & WORD
    return word ^ (word >> 31)


def chain(*counters: int) -> int:
    word = 0
    for counter in counters:
        word = scramble((word + (counter + 1) * 0x9E3779B97F4A7C15) & WORD)
    return word


def share(word: int, bound: int) -> int:
    return ((word >> 32) * bound) >> 32


def overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> int:
    (top, left, side), (other_top, other_left, other_side) = a, b
    rows = min(top + side, other_top + other_side) - max(top, other_top)
    columns = min(left + side, other_left + other_side) - max(left, other_left)
    return max(rows, 0) * max(columns, 0)


class SceneInLoops:
    """One scene as docs/model.md 10 defines it: integers, loops, every position tried."""

    def __init__(self, config: DataConfig, split: Split, index: int) -> None:
        number = {"train": 0, "validation": 1, "test": 2}[split]
        self.key = (config.seed, number, index)
        self.config = config
        glyphs = load_glyphs(config, split)
        count = config.min_objects + share(
            self.word(0, 0), config.max_objects - config.min_objects + 1
        )
        self.attempts = 0
        while (squares := self.layout(count)) is None:
            self.attempts += 1
        height, width = config.image_height, config.image_width
        ground = [0, 0, 0]
        if config.background == "random":
            ground = [share(self.word(9 + c, 0), 64) for c in range(3)]
        image = [[list(ground) for _ in range(width)] for _ in range(height)]
        self.boxes, self.labels = [], []
        for k, (top, left, side) in enumerate(squares):
            kinds = sorted(set(glyphs.labels.tolist()))
            kind = kinds[share(self.word(1, k), len(kinds))]
            members = [g for g, label in enumerate(glyphs.labels) if label == kind]
            chosen = members[share(self.word(2, k), len(members))]
            patch = resize(glyphs.images[chosen][None], side, full=glyphs.full)[0]
            colour = [255, 255, 255]
            if config.colour == "random":
                colour = [share(self.word(5 + c, k), 256) for c in range(3)]
                colour[share(self.word(8, k), 3)] = 255
            ys, xs = np.nonzero(patch)
            self.labels.append(kind)
            self.boxes.append([left + xs.min(), top + ys.min(), left + xs.max() + 1])
            self.boxes[-1].append(top + ys.max() + 1)
            for y, x in zip(ys.tolist(), xs.tolist(), strict=True):
                pixel, alpha = image[top + y][left + x], int(patch[y, x])
                for c in range(3):
                    pixel[c] = round((pixel[c] * (255 - alpha) + colour[c] * alpha) / 255)
        self.image = torch.tensor(image).permute(2, 0, 1)

    def word(self, purpose: int, k: int, attempt: int = 0) -> int:
        return chain(*self.key, purpose + 16 * (k + 256 * attempt))

    def layout(self, count: int) -> list[tuple[int, int, int]] | None:
        config = self.config
        squares: list[tuple[int, int, int]] = []
        for k in range(count):
            side = config.glyph_size - config.glyph_jitter
            side += share(self.word(3, k, self.attempts), 2 * config.glyph_jitter + 1)
            allowed = [
                (top, left, side)
                for top in range(config.image_height - side + 1)
                for left in range(config.image_width - side + 1)
                if sum(overlap((top, left, side), other) for other in squares)
                <= config.max_overlap * config.glyph_size**2
            ]
            if not allowed:
                return None
            squares.append(allowed[share(self.word(4, k, self.attempts), len(allowed))])
        return squares


def chi_square(observed: Tensor, expected: Tensor) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def assert_equal(first: Batch, second: Batch) -> None:
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.boxes, second.boxes)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.counts, second.counts)


@pytest.mark.parametrize("case", CASES)
def test_scenes_match_composition_in_loops(case: str) -> None:
    config = DataConfig(**CASES[case])
    split: Split = "validation" if case == "default" else "train"
    indices = [0, 1, 2, 1_000_003]
    batch = Scenes(config, split).batch(torch.tensor(indices))
    for b, index in enumerate(indices):
        scene = SceneInLoops(config, split, index)
        count = int(batch.counts[b])
        assert count == len(scene.labels)
        assert torch.equal((batch.images[b] * 255).round().long(), scene.image)
        assert batch.boxes[b, :count].tolist() == scene.boxes
        assert batch.labels[b, :count].tolist() == scene.labels
        assert batch.boxes[b, count:].abs().sum() == 0
        assert (batch.labels[b, count:] == -1).all()


def test_tight_layouts_are_restarted() -> None:
    """Some first attempts at the tight case fail."""
    config = DataConfig(**CASES["tight"])
    assert max(SceneInLoops(config, "train", index).attempts for index in (0, 1, 2, 1_000_003)) > 0


@pytest.mark.parametrize("case", ["default", "varied"])
def test_scenes_are_a_pure_function_of_the_index(case: str) -> None:
    config = DataConfig(**CASES[case])
    whole = Scenes(config, "train").batch(torch.arange(40))
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    scenes = Scenes(config, "train")
    again = scenes.batch(shuffled)
    back = shuffled.argsort()
    assert_equal(
        whole,
        Batch(again.images[back], again.boxes[back], again.labels[back], again.counts[back]),
    )
    # forwards, backwards and across the end of scenes made in advance
    for start, end in [(0, 3), (3, 6), (20, 29), (29, 38), (5, 6), (4, 40)]:
        part = scenes.batch(torch.arange(start, end))
        run = slice(start, end)
        assert_equal(
            part, Batch(whole.images[run], whole.boxes[run], whole.labels[run], whole.counts[run])
        )


@pytest.mark.parametrize("stride", [4, 12])
def test_batches_are_made_several_at_a_time(monkeypatch: pytest.MonkeyPatch, stride: int) -> None:
    """For consecutive batches, and for every third one, as one of three processes makes them."""
    scenes = Scenes(DataConfig(**SMALL), "train")
    whole = Scenes(DataConfig(**SMALL), "train").batch(torch.arange(1000, 1300))
    made: list[int] = []
    make = Scenes._make

    def noted(self: Scenes, indices: Tensor) -> Batch:
        made.append(len(indices))
        return make(self, indices)

    monkeypatch.setattr(Scenes, "_make", noted)
    for turn in range(24):
        start = turn * stride + 8
        part = scenes.batch(torch.arange(1000 + start, 1004 + start))
        run = slice(start, start + 4)
        assert_equal(
            part, Batch(whole.images[run], whole.boxes[run], whole.labels[run], whole.counts[run])
        )
    assert made == [32] * (3 if stride == 4 else 4)


def test_autocast_does_not_change_scenes() -> None:
    scenes = Scenes(DataConfig(min_objects=9), "train")
    indices = torch.arange(0, 64, 2)
    plain = scenes.batch(indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(plain, scenes.batch(indices))


def test_caller_may_modify_its_batch() -> None:
    scenes = Scenes(DataConfig(**SMALL), "train")
    first = scenes.batch(torch.arange(4))
    kept = first.images.clone()
    first.images.zero_()
    assert torch.equal(scenes.batch(torch.arange(4)).images, kept)


def test_scenes_differ_by_index_split_and_seed() -> None:
    def images(split: Split, seed: int) -> Tensor:
        return Scenes(DataConfig(seed=seed), split).batch(torch.arange(8)).images.flatten(1)

    every = torch.cat([images("train", 0), images("validation", 0), images("train", 1)])
    assert len(every.unique(dim=0)) == len(every)


GOLDEN = {
    "default": "72a745e70bdf8f72d8ddc6faf3d6f7702e78ec47107b5218ca1f094fcee8ea2b",
    "varied": "0bad932a1458e5fd327d5e789b74c4f47ddb83cff9e9339a3eeacbc21878f014",
}


@pytest.mark.parametrize("case", GOLDEN)
def test_bytes_equal_the_recorded_hashes(case: str) -> None:
    """Reports identify scenes by seed and index, so their bytes must never change."""
    batch = Scenes(DataConfig(**CASES[case]), "test").batch(torch.arange(16))
    digest = hashlib.sha256(batch.images.numpy().tobytes())
    for part in (batch.boxes, batch.labels, batch.counts):
        digest.update(part.numpy().tobytes())
    assert digest.hexdigest() == GOLDEN[case]


def test_boxes_are_tight_and_contain_all_lit_pixels() -> None:
    batch = Scenes(DataConfig(max_objects=1), "train").batch(torch.arange(64))
    for image, truth in zip(batch.images, batch.truth(), strict=True):
        ys, xs = image[0].nonzero().unbind(1)
        extent = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert torch.equal(extent.float(), truth.boxes[0])
    crowd = Scenes(DataConfig(min_objects=9), "train").batch(torch.arange(16))
    for image, truth in zip(crowd.images, crowd.truth(), strict=True):
        assert len(truth) == 9
        for x1, y1, x2, y2 in truth.boxes.int().tolist():
            assert image[:, y1:y2, x1:x2].max() > 0
            image[:, y1:y2, x1:x2] = 0
        assert image.max() == 0


def test_counts_and_classes_are_uniform() -> None:
    """Chi-square at a level of 1e-4: 31.8 for 8 degrees of freedom, 33.7 for 9."""
    batch = Scenes(DataConfig(image_height=64, image_width=64), "train").batch(torch.arange(2000))
    counts = batch.counts.bincount(minlength=10)[1:].double()
    assert chi_square(counts, torch.full((9,), 2000 / 9)) < 31.8
    labels = batch.labels[batch.labels >= 0].bincount(minlength=10).double()
    assert chi_square(labels, labels.mean().expand(10)) < 33.7


def test_positions_follow_rejection_sampling() -> None:
    """The third square has the histogram of the paper's loop of draws and rejections."""
    rng = np.random.default_rng(0)
    height, width, side, limit, number = 9, 10, 4, 8, 6000

    def rejection() -> int:
        squares: list[tuple[int, int, int]] = []
        while len(squares) < 3:
            for _ in range(1000):
                new = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1)), 4
                if sum(overlap(new, other) for other in squares) <= limit:
                    squares.append(new)
                    break
            else:
                squares = []
        return squares[2][0] * (width - side + 1) + squares[2][1]

    theirs = torch.tensor([rejection() for _ in range(number)]).bincount(minlength=42).double()
    random = torch.from_numpy(rng.integers(0, 1 << 32, (number, 3)))
    corners, complete = scatter(
        random,
        torch.full((number,), 3),
        torch.full((number, 3), side),
        least_side=side,
        greatest_side=side,
        height=height,
        width=width,
        max_overlap_px2=limit,
    )
    assert complete.double().mean() > 0.99
    third = corners[complete][:, 2]
    ours = (third[:, 0] * (width - side + 1) + third[:, 1]).bincount(minlength=42).double()
    ours *= number / ours.sum()
    # two samples of equal size; 83.5 at a level of 1e-4 for 41 degrees of freedom
    assert float(((ours - theirs) ** 2 / (ours + theirs)).sum()) < 84.0


def test_first_square_is_uniform() -> None:
    random = draws(seeded(3), torch.arange(4900))[:, None]
    corners, _ = scatter(
        random,
        torch.ones(4900),
        torch.full((4900, 1), 4),
        least_side=4,
        greatest_side=4,
        height=10,
        width=10,
        max_overlap_px2=0,
    )
    places = (corners[:, 0, 0] * 7 + corners[:, 0, 1]).bincount(minlength=49).double()
    # 93.2 at a level of 1e-4 for 48 degrees of freedom
    assert chi_square(places, torch.full((49,), 100.0)) < 93.3


CROPPED: dict[str, Any] = {
    "image_height": 20,
    "image_width": 33,
    "scene_height": 40,
    "scene_width": 60,
    "max_objects": 6,
    "background": "random",
}


def test_crops_are_cut_from_whole_scenes() -> None:
    """Places are read off the pixels; boxes are those of the scene, cut at the ends."""
    scenes = Scenes(DataConfig(**CROPPED), "train")
    sizes = {"image_height": 40, "image_width": 60, "scene_height": 0, "scene_width": 0}
    whole = Scenes(DataConfig(**CROPPED | sizes), "train").batch(torch.arange(40))
    cut = scenes.batch(torch.arange(40))
    assert cut.images.shape == (40, 3, 20, 33)
    places, outside = [], 0
    for b in range(40):
        windows = whole.images[b].unfold(1, 20, 1).unfold(2, 33, 1)  # [3, 21, 28, 20, 33]
        equal = (windows == cut.images[b, :, None, None]).flatten(3).all(3).all(0)
        found = [
            (y, x, boxes)
            for y, x in equal.nonzero().tolist()
            if (boxes := cut_boxes(whole.truth()[b].boxes, x, y)).shape
            == cut.truth()[b].boxes.shape
            and torch.equal(boxes, cut.truth()[b].boxes)
        ]
        assert found
        assert int(cut.counts[b]) == len(found[0][2])
        outside += int(whole.counts[b] - cut.counts[b])
        assert (cut.labels[b, cut.counts[b] :] == -1).all()
        assert (cut.boxes[b, cut.counts[b] :] == 0).all()
        if len(found) == 1:
            places.append(found[0][:2])
    assert outside > 20
    tops, lefts = (set(axis) for axis in zip(*places, strict=True))
    assert len(tops) > 10
    assert len(lefts) > 10
    assert max(tops) <= 20
    assert max(lefts) <= 27


def cut_boxes(boxes: Tensor, left: int, top: int) -> Tensor:
    kept = []
    for x1, y1, x2, y2 in (boxes - torch.tensor([left, top] * 2)).tolist():
        box = max(x1, 0.0), max(y1, 0.0), min(x2, 33.0), min(y2, 20.0)
        if box[0] < box[2] and box[1] < box[3]:
            kept.append(box)
    return torch.tensor(kept).reshape(-1, 4)


def test_test_scenes_are_whole() -> None:
    scenes = Scenes(DataConfig(**CROPPED), "test")
    assert scenes.batch(torch.arange(2)).images.shape == (2, 3, 40, 60)
    assert_equal(
        scenes.batch(torch.arange(3)),
        Scenes(DataConfig(**CROPPED | {"image_height": 40, "image_width": 60}), "test").batch(
            torch.arange(3)
        ),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scene_height": 40}, r"a crop of 48x48 px does not fit a scene of 40x48"),
        ({"name": "folder", "path": "x", "scene_width": 90}, "for scenes, not for a folder"),
    ],
)
def test_impossible_crops_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_hash_equals_splitmix64_in_python_integers() -> None:
    counters = [0, 1, 2, 10**6, (1 << 62) + 12345]
    ours = hashed(seeded(5, 9), torch.tensor(counters))
    assert [int(bits) & WORD for bits in ours] == [chain(5, 9, counter) for counter in counters]
    assert int(hashed(seeded(5), 9)) == int(seeded(5, 9))


def test_below_covers_its_range_in_order() -> None:
    steps = torch.linspace(0, 2**32 - 1, 1001, dtype=torch.float64).long()
    values = below(steps, 7).tolist()
    assert set(values) == set(range(7))
    assert all(a <= b for a, b in pairwise(values))
    assert below(steps, 0).abs().sum() == 0


def test_scenes_without_objects_are_black() -> None:
    batch = Scenes(DataConfig(min_objects=0, max_objects=0), "test").batch(torch.arange(3))
    assert batch.images.shape == (3, 3, 48, 48)
    assert batch.images.abs().sum() == 0
    assert batch.boxes.shape == (3, 0, 4)
    assert [len(truth) for truth in batch.truth()] == [0, 0, 0]


def test_empty_batch_is_supported() -> None:
    batch = Scenes(DataConfig(), "test").batch(torch.arange(0))
    assert batch.images.shape == (0, 3, 48, 48)
    assert batch.truth() == []


def test_length_is_that_of_the_split() -> None:
    config = DataConfig(validation_images=30, test_images=20)
    assert len(Scenes(config, "validation")) == 30
    assert len(Scenes(config, "test")) == 20
    with pytest.raises(TypeError, match="no length"):
        len(Scenes(config, "train"))


def test_objects_that_cannot_fit_are_reported() -> None:
    with pytest.raises(InputError, match="more area than the image has"):
        Scenes(DataConfig(image_height=28, image_width=28, max_overlap=0.0), "train")
    # two squares of 6 in 9 by 9: enough area, no place
    config = DataConfig(
        image_height=9, image_width=9, glyph_size=6, max_overlap=0.0, min_objects=2, max_objects=2
    )
    with pytest.raises(InputError, match="no layout in 1000 attempts") as caught:
        Scenes(config, "train").batch(torch.arange(1))
    assert "data.max_objects" in str(caught.value)


def test_wrong_indices_are_refused() -> None:
    scenes = Scenes(DataConfig(), "train")
    with pytest.raises(ValueError, match=r"int64 \[B\]"):
        scenes.batch(torch.zeros(3))
    with pytest.raises(ValueError, match=r"int64 \[B\]"):
        scenes.batch(torch.zeros(3, 1, dtype=torch.int64))


def test_overlap_limit_is_not_rounded_below_a_whole_pixel() -> None:
    """.29 of 100 square pixels are 29, though the product in float64 is less."""
    assert 0.29 * 10**2 < 29
    scenes = Scenes(DataConfig(glyph_size=10, max_overlap=0.29), "train")
    assert scenes._max_overlap_px2 == 29
