"""Scenes by Triton are bit-identical to plain torch, which `test_scenes.py` tests.

This file needs a GPU; `test_interpreter.py` runs it in Triton's interpreter.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from spairkit.config import DataConfig
from spairkit.data import scenes as scenes_module
from spairkit.data.datasets import open_dataset
from spairkit.data.hashing import below, draws, hashed
from spairkit.data.scenes import Batch, Scenes
from spairkit.errors import InputError
from spairkit.kernels import scenes_layout_triton

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="Triton cannot run here"
)

TIGHT: dict[str, Any] = {
    **{"image_height": 13, "image_width": 14, "glyph_size": 6, "max_overlap": 0.0},
    **{"min_objects": 3, "max_objects": 3},
}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "one": {"min_objects": 0, "max_objects": 1, "image_height": 14, "image_width": 14},
    "wide": {"image_height": 20, "image_width": 33, "max_objects": 4},
    "tall, in colour": {
        **{"image_height": 40, "image_width": 24, "max_objects": 4, "colour": "random"},
    },
    "varied": {"glyph_jitter": 4, "colour": "random", "background": "random", "max_objects": 5},
    "backgrounds": {"background": "random", "max_objects": 2, "min_objects": 0, "seed": 7},
    "no overlap": {"max_overlap": 0.0, "max_objects": 3},
    "tight": TIGHT,
    "cards": {"name": "cards", "min_objects": 7, "max_objects": 7, "max_overlap": 1 / 3},
    "few images": {"train_images": 2, "max_objects": 2},
    "several tiles": {"image_height": 40, "image_width": 200, "max_objects": 3},
    "one row per tile": {
        **{"image_height": 9, "image_width": 2100, "glyph_size": 8, "glyph_jitter": 1},
        **{"max_objects": 3, "min_objects": 3},
    },
}


def scenes_of(case: dict[str, Any], device: torch.device, *, fused: bool) -> Scenes:
    scenes = open_dataset(DataConfig(**case), "train", device)
    assert isinstance(scenes, Scenes)
    scenes.fused = fused
    return scenes


def keys_and_counts(scenes: Scenes, number: int) -> tuple[Tensor, Tensor]:
    least, most = scenes.config.min_objects, scenes.config.max_objects
    keys = hashed(scenes._key, torch.arange(number, device=scenes.device))
    return keys, least + below(draws(keys, 0), most - least + 1)


def assert_equal(found: Batch, wanted: Batch) -> None:
    for name in ("images", "boxes", "labels", "counts"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other.cpu()), name


@pytest.mark.parametrize("case", CASES)
def test_scenes_are_bit_identical_to_plain_torch(case: str, device: torch.device) -> None:
    indices = torch.tensor([0, 1_000_003, (29 << 32) + 5])
    wanted = scenes_of(CASES[case], torch.device("cpu"), fused=False).batch(indices)
    fused = scenes_of(CASES[case], device, fused=True)
    assert_equal(fused.unchecked(indices.to(device)), wanted)
    fused.check()


def test_indices_may_be_on_either_device(device: torch.device) -> None:
    case = {"image_height": 15, "image_width": 15, "max_objects": 1}
    fused, plain = scenes_of(case, device, fused=True), scenes_of(case, device, fused=False)
    for indices in (torch.tensor([3, 9]), torch.arange(2)):
        wanted = plain.batch(indices)
        assert_equal(fused.batch(indices), wanted)
        assert_equal(fused.batch(indices.to(device)), wanted)


@pytest.mark.parametrize("limit", [1, 64, 128])
def test_layouts_do_not_depend_on_the_tile_size(
    limit: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {"image_height": 17, "image_width": 24, "glyph_size": 10, "glyph_jitter": 2}
    case |= {"min_objects": 2, "max_objects": 3}
    fused, plain = (scenes_of(case, device, fused=way) for way in (True, False))
    monkeypatch.setattr(scenes_layout_triton, "_MAX_POSITIONS", limit)
    keys, counts = keys_and_counts(plain, 2)
    wanted = plain._numbers < counts[:, None]
    for found, expected in zip(
        fused._layout(keys, counts)[:2], plain._layout(keys, counts)[:2], strict=True
    ):
        assert torch.equal(found[wanted], expected[wanted])
        assert found.dtype == expected.dtype


def test_tight_case_takes_several_attempts(device: torch.device) -> None:
    plain = scenes_of(TIGHT, device, fused=False)
    _, _, complete = plain._attempt(*keys_and_counts(plain, 3), 0)
    assert not complete.all()


def test_scene_is_incomplete_after_the_last_attempt(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other scenes are unaffected."""
    monkeypatch.setattr(scenes_module, "_MAX_ATTEMPTS", 2)
    fused, plain = (scenes_of(TIGHT, device, fused=way) for way in (True, False))
    keys, counts = keys_and_counts(plain, 12)
    corners, sides, complete = fused._layout(keys, counts)
    wanted_corners, wanted_sides, wanted_complete = plain._layout(keys, counts)
    assert 0 < int(complete.sum()) < 12
    assert torch.equal(complete, wanted_complete)
    assert torch.equal(corners[complete], wanted_corners[complete])
    assert torch.equal(sides[complete], wanted_sides[complete])
    assert corners[~complete].abs().sum() == 0
    assert (sides[~complete] == 6).all()


def test_scene_without_a_layout_is_reported_once(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes_module, "_MAX_ATTEMPTS", 2)
    scenes = scenes_of(TIGHT, device, fused=True)
    keys, counts = keys_and_counts(scenes, 12)
    complete = scenes._layout(keys, counts)[2]
    # equal indices are not consecutive: for consecutive ones, further scenes would be made
    good, bad = (which.nonzero()[[0, 0], 0] for which in (complete, ~complete))
    with pytest.raises(InputError, match="no layout in 2 attempts"):
        scenes.batch(bad.cpu())
    scenes.batch(good.cpu())
    scenes.unchecked(bad)
    scenes.unchecked(good)
    with pytest.raises(InputError, match="no layout in 2 attempts"):
        scenes.check()
    scenes.check()


def test_making_scenes_does_not_synchronise_with_the_device(
    device: torch.device, no_sync: Callable[[], AbstractContextManager[object]]
) -> None:
    scenes = scenes_of(CASES["varied"], device, fused=True)
    indices = torch.arange(2, device=device)
    wanted = scenes.unchecked(indices)
    with no_sync():
        found = scenes.unchecked(indices)
    assert_equal(found, wanted)
    scenes.fused = False
    with no_sync(), pytest.raises(AssertionError, match="synchronises with the device"):
        scenes.unchecked(indices)


def test_empty_scenes_and_empty_batches_are_supported(device: torch.device) -> None:
    empty = scenes_of({"min_objects": 0, "max_objects": 0}, device, fused=True)
    batch = empty.unchecked(torch.arange(2, device=device))
    assert batch.images.abs().sum() == 0
    assert batch.boxes.shape == (2, 0, 4)
    scenes = scenes_of({}, device, fused=True)
    assert len(scenes.unchecked(torch.arange(0, device=device)).images) == 0
    empty.check()
    scenes.check()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("case", ["default", "varied", "tight"])
def test_replayed_graph_makes_scenes_of_new_indices(case: str) -> None:
    device = torch.device("cuda")
    scenes = Scenes(DataConfig(**CASES[case]), "train", device)
    assert scenes.fused
    first = torch.zeros((), dtype=torch.int64, device=device)

    def made() -> Batch:
        return scenes.unchecked(first + torch.arange(64, device=device))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        made()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        played = made()
    plain = Scenes(DataConfig(**CASES[case]), "train")
    for start in (0, 64, 1_000_003, 29 << 32):
        first.fill_(start)
        graph.replay()
        assert_equal(played, plain.batch(torch.arange(start, start + 64)))
    scenes.check()
