"""Time and memory of the search, beside the encoder alone: `spairkit bench search`."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import get_args

import torch
from torch import Tensor

from spairkit.benchmarks import timing
from spairkit.benchmarks.timing import Figure
from spairkit.config import Config, DataConfig, SearchMode
from spairkit.data.datasets import open_dataset
from spairkit.detector import Detector, load

SCENE = 48
"""Side of a scene of one to three digits, px."""


def run(
    batches: list[int],
    size: int,
    device: torch.device,
    seconds: float,
    report: Callable[[str], None],
) -> Iterator[Figure]:
    """Yields a figure for each mode of the packaged model, on batches and on one large image.

    Times are per image. At least `seconds` are spent on each case. `report` receives a line at the
    start of each step.

    Args:
        batches: numbers of scenes in a batch.
        size: side of the image that is tiled from scenes, px; 0 leaves it out.
    """
    modes: tuple[SearchMode, ...] = get_args(SearchMode)
    detectors = {mode: load(device=device, search=mode) for mode in modes}
    data = _data(detectors["off"].config)
    for batch in batches:
        images, objects = scenes(data, batch)
        name = f"{batch} x {SCENE} px, {objects} objects"
        yield from _figures(name, images.to(device), detectors, seconds, report)
    if size:
        image, objects = tiled(data, size)
        name = f"{size} px, {objects} objects"
        yield from _figures(name, image[None].to(device), detectors, seconds, report)


def _data(config: Config) -> DataConfig:
    return replace(config.data, image_height=SCENE, image_width=SCENE, min_objects=1, max_objects=3)


def scenes(data: DataConfig, number: int) -> tuple[Tensor, int]:  # [number, 3, SCENE, SCENE]
    """Test scenes, and the number of objects in all of them."""
    batch = open_dataset(replace(data, test_images=number), "test").batch(torch.arange(number))
    return batch.images, sum(map(len, batch.truth()))


def tiled(data: DataConfig, size: int) -> tuple[Tensor, int]:  # [3, size, size]
    """One image of as many whole scenes as fit, black beyond, and the number of its objects."""
    side = size // SCENE
    images, objects = scenes(data, side**2)
    rows = images.unflatten(0, (side, side)).permute(2, 0, 3, 1, 4)
    image = images.new_zeros(3, size, size)
    image[:, : side * SCENE, : side * SCENE] = rows.reshape(3, side * SCENE, side * SCENE)
    return image, objects


class _Timed:
    """Finds objects, and notes the wall and CPU time of every call, ms per image."""

    def __init__(self, detector: Detector, images: Tensor) -> None:
        self.detector, self.images, self.found = detector, images, 0
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.found = sum(map(len, self.detector.detect_batch(self.images)))
        share = 1e3 / len(self.images)
        self.wall.append(share * (time.perf_counter() - wall))
        self.cpu.append(share * (time.process_time() - cpu))


def _figures(
    name: str,
    images: Tensor,
    detectors: dict[SearchMode, Detector],
    seconds: float,
    report: Callable[[str], None],
) -> Iterator[Figure]:
    end = time.perf_counter() + seconds
    calls = {mode: _Timed(detector, images) for mode, detector in detectors.items()}
    peaks = {}
    for mode, call in calls.items():
        report(f"{name}: timing {mode}")
        peaks[mode] = timing.peak_mib(call, images.device)
        del call.wall[0], call.cpu[0]  # of the call that compiles
    while time.perf_counter() < end:
        for call in calls.values():
            call()
    off = median(calls["off"].wall)
    for mode, call in calls.items():
        more = {"CPU ms": median(call.cpu), "found": float(call.found)}
        times, taken = median(call.wall) / off, timing.spread(call.wall)
        yield Figure(case=name, way=mode, times=times, peak_mib=peaks[mode], more=more, **taken)
