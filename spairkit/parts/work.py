"""The computation of a part: a `Worker` finds the objects of one part at a time.

worker = Worker(job)
result = worker.result(part)
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch

from spairkit.config import SearchMode
from spairkit.detections import Detections
from spairkit.detector import Detector, chosen_device, detector_of
from spairkit.errors import ImageFileError, InputError
from spairkit.images import ImageLike, reading_once
from spairkit.names import printable
from spairkit.parts.files import in_place, version
from spairkit.parts.plan import MAX_IMAGES, Found, Item, Part, Result
from spairkit.report.signs import misfit
from spairkit.storage.checkpoints import load_checkpoint


class Describe(Protocol):
    """Can be pickled, hashed and compared."""

    def __call__(self, item: Item, detections: Detections) -> tuple[list[str], str]:
        """Gives `Found.rows` and `Found.measured` of an image, and writes its files."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process needs to compute parts; it can be pickled."""

    checkpoint: str
    sha256: str
    """Of the checkpoint."""
    device: Literal["cpu", "cuda"]
    search: SearchMode
    box_contrast: float | None
    threshold: float
    count: int | None
    threads: int
    """CPU threads. The full search rounds otherwise with others."""
    describe: Describe
    folder: str = ""
    """That relative paths start from; empty is the working directory."""


class Worker:
    """Computes parts. Not for several threads at once.

    Args:
        job: what to compute.
        detector: of the job's checkpoint; None loads it.
        index: of the process on this machine; each takes a GPU of its own if there are several.

    Raises:
        InputError: the checkpoint cannot be used here, or is another one.
    """

    def __init__(self, job: Job, detector: Detector | None = None, index: int = 0) -> None:
        self.job = job
        self.detector = _opened(job, index) if detector is None else detector

    def result(self, part: Part, on_image: Callable[[], None] = lambda: None) -> Result:
        """Finds the objects of a part; `on_image` is called after each image.

        Raises:
            InputError: a model does not take the images, a file of an image cannot be written, or a
                remote store not be reached. Images that cannot be read are in the result.
        """
        job = self.job
        # before they are read: if one changes meanwhile, its part is computed again
        versions = [version(item, job.folder) for item in part]
        found: list[Found] = []
        with (
            in_place(part, job.folder) as (places, skipped),
            _threads(job.threads),
            reading_once(),
        ):

            def skip(place: ImageLike, error: ImageFileError) -> None:
                name = next(item.name for other, item in places if other is place)
                reason = str(error).replace(printable(place), printable(name), 1)
                skipped.append([name, reason])

            many = self.detector.detect_many(
                [place for place, _ in places],
                threshold=job.threshold,
                count=job.count,
                batch_size=MAX_IMAGES,
                on_unreadable=skip,
            )
            rest = iter(places)
            for detections in many:
                item = next(item for place, item in rest if place is detections.image)
                found.append(self._found(item, detections))
                on_image()
        return Result(versions=versions, found=found, skipped=skipped)

    def _found(self, item: Item, detections: Detections) -> Found:
        counts = detections.counts
        files = tuple(os.path.join(self.job.folder, file) for file in item.files)
        rows, measured = self.job.describe(replace(item, files=files), detections)
        return Found(
            name=item.name,
            number=item.number,
            objects=len(detections),
            has_masks=detections.label_image is not None,
            least_count=None if counts is None else counts.least,
            count_probabilities=[] if counts is None else counts.probabilities.tolist(),
            count_is_shared=counts is not None and counts.is_shared,
            misfit=misfit(self.detector, detections),
            rows=rows,
            measured=measured,
        )


def _opened(job: Job, index: int) -> Detector:
    loaded = load_checkpoint(Path(job.folder, job.checkpoint))
    if loaded.sha256 != job.sha256:
        raise InputError(f"{job.checkpoint}: is another checkpoint on this machine")
    device: torch.device = chosen_device(job.device)
    if device.type == "cuda":
        device = torch.device("cuda", index % torch.cuda.device_count())
    return detector_of(loaded, device, box_contrast=job.box_contrast, search=job.search)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
