"""Speed of detection in files, from reading to COCO results: `spairkit bench detect`."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from spairkit.benchmarks.search import scenes, tiled
from spairkit.config import DataConfig, SearchMode
from spairkit.detector import Detector, load
from spairkit.images import write_png
from spairkit.parts.plan import MAX_IMAGES

_SCENE, _MIDDLE = 48, 256


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one case: medians over passes through its files."""

    case: str
    """Number and side of the images, and the number of objects in them."""
    search: SearchMode
    images_per_second: float
    megapixels_per_second: float
    cpu_ms_per_image: float
    """CPU time of all threads."""
    found: int
    passes: int


def run(
    modes: list[SearchMode],
    size: int,
    device: torch.device,
    seconds: float,
    report: Callable[[str], None],
) -> Iterator[Speed]:
    """Yields the speed of each mode of the packaged model on small, middle and large images.

    These are 256 scenes of 48 x 48 px, 16 images of 256 x 256 and one of `size`, which hold the
    same digits. Files are read, objects are found, and results are made in COCO's form. A pass that
    compiles comes first; then passes take at least `seconds`. `report` is called with each case.

    Args:
        modes: of the search.
        size: side of the large image, px; 0 leaves it out.
    """
    for mode in modes:
        detector = load(device=device, search=mode)
        base = detector.config.data
        data = replace(base, image_height=_SCENE, image_width=_SCENE, min_objects=1, max_objects=3)
        for number, side in ((256, _SCENE), (16, _MIDDLE), (1, size)):
            if side:
                report(f"{number} x {side} px: timing {mode}")
                with tempfile.TemporaryDirectory(prefix="spairkit-") as folder:
                    objects = _write(data, number, side, Path(folder))
                    yield _speed(detector, sorted(Path(folder).iterdir()), side, objects, seconds)


def _write(data: DataConfig, number: int, side: int, folder: Path) -> int:
    """Writes the images of a case, and gives the number of their objects."""
    if side == _SCENE:
        images, objects = scenes(data, number)
    else:
        image, objects = tiled(data, side)
        images = image.expand(number, -1, -1, -1)
        objects *= number
    for index, image in enumerate(images):
        write_png(folder / f"{index:03}.png", image)
    return objects


def _speed(detector: Detector, files: list[Path], side: int, objects: int, seconds: float) -> Speed:
    wall: list[float] = []
    cpu: list[float] = []
    found = 0
    end = float("inf")
    while not wall or time.perf_counter() < end:
        if len(wall) == 1 and end == float("inf"):
            del wall[0], cpu[0]  # of the pass that compiles
            end = time.perf_counter() + seconds
        began, used = time.perf_counter(), time.process_time()
        found = sum(
            len(detections.to_coco(number))
            for number, detections in enumerate(detector.detect_many(files, batch_size=MAX_IMAGES))
        )
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    rate = len(files) / median(wall)
    return Speed(
        case=f"{len(files)} x {side} px, {objects} objects",
        search=detector.search,
        images_per_second=rate,
        megapixels_per_second=rate * side**2 / 1e6,
        cpu_ms_per_image=1e3 * median(cpu) / len(files),
        found=found,
        passes=len(wall),
    )
