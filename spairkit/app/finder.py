"""Finds the objects of a folder's images, one after another, beside the server.

Boxes, confidences and embeddings of finished images stay in memory; masks and outlines go into
files of a temporary folder.
"""

import json
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spairkit.app.grouping import Group, groups_of
from spairkit.config import ClassicalConfig
from spairkit.counts import CountPosterior
from spairkit.detections import Detections
from spairkit.detector import Detector
from spairkit.errors import InputError, lacks_memory
from spairkit.images import image_size
from spairkit.label_images import coco_segmentations
from spairkit.polygons import polygons
from spairkit.report.signs import misfit

LEAST_THRESHOLD = 0.05
"""Objects with a confidence above this are found; the page shows those above its slider."""

_PATIENCE_SECONDS = 2.0  # in which a thread may end


@dataclass(frozen=True, eq=False)
class Found:
    """The objects of one image; rounded, so that the page and the exports have the same values."""

    size: tuple[int, int]
    """Height and width of the image, px."""
    boxes: npt.NDArray[np.float64]  # [n, 4] xyxy, hundredths of pixels
    scores: npt.NDArray[np.float64]  # [n] four decimals
    sides: npt.NDArray[np.float64]  # [n] square root of the area of the box, px, two decimals
    areas: npt.NDArray[np.int64]  # [n] of the masks, px; empty if the model gives none
    embeddings: npt.NDArray[np.float32]  # [n, A]
    counts: CountPosterior | None
    misfit: str | None
    """Why the model does not fit the image."""


class Finder:
    """The thread of one detector, and what it has found.

    Args:
        paths: of the images.
        open_detector: called in the thread, as it may take seconds; its InputErrors become `error`.
    """

    def __init__(self, paths: Sequence[Path], open_detector: Callable[[], Detector]) -> None:
        self.paths = paths
        self.error: str | None = None
        """Why nothing is found: the detector cannot be opened."""
        self.phase = "getting ready"
        self.share = 0.0
        """Of the image that is worked on; 0 where a model does not tell."""
        self.detector: Detector | None = None
        self.groups: list[Group] = []
        """Groups of objects that look alike, known when all images are done; none are no groups."""
        self._results: dict[int, Found | str] = {}
        self._numbers: dict[int, npt.NDArray[np.int64]] = {}
        self._changed = threading.Condition()
        self._next: int | None = None
        self._ends = False
        self._files = tempfile.TemporaryDirectory(
            prefix="spairkit-app-", ignore_cleanup_errors=True
        )
        self._open = open_detector
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def done(self) -> int:
        """Number of images that are done, those that cannot be read included."""
        return len(self._results)

    @property
    def is_busy(self) -> bool:
        """Whether there is more to come."""
        return self._thread.is_alive()

    @property
    def least_threshold(self) -> float:
        """The lowest confidence that an object may have."""
        classical = self.detector and isinstance(self.detector.config.model, ClassicalConfig)
        return 0.5 if classical else LEAST_THRESHOLD

    def result(self, index: int) -> Found | str | None:
        """The objects of an image, or why it cannot be read; None if it is not done."""
        return self._results.get(index)

    def wait(self, index: int, seconds: float) -> Found | str | None:
        """`result`, for which it waits; the image is the next to be worked on."""
        with self._changed:
            self._next = index
            self._changed.wait_for(
                lambda: index in self._results or self.error or self._ends, seconds
            )
            return self._results.get(index)

    def group_numbers(self, index: int) -> list[int]:
        """The number of each object's group, from 1; empty if it is not known."""
        numbers = self._numbers.get(index)
        return [] if numbers is None else numbers.tolist()

    def outlines(self, index: int) -> list[list[list[int]]]:
        """For each object the rings of its outline, each as x, y, x, y ... in pixels."""
        value: list[list[list[int]]] = self._stored(index, "outlines")
        return value

    def segmentations(self, index: int) -> list[dict[str, Any]]:
        """COCO's segmentation of each object; empty if the model gives no masks."""
        value: list[dict[str, Any]] = self._stored(index, "masks")
        return value

    def close(self) -> bool:
        """Stops at the next sign of progress, and removes the temporary files.

        Returns:
            Whether the thread has ended. It is not waited for long, as some work on large images
            shows no progress for a while; what it finds is lost.
        """
        self._ends = True
        with self._changed:
            self._changed.notify_all()
        self._thread.join(_PATIENCE_SECONDS)
        self._files.cleanup()
        return not self._thread.is_alive()

    def _stored(self, index: int, kind: str) -> Any:
        return json.loads(Path(self._files.name, f"{index}.{kind}.json").read_text())

    def _run(self) -> None:
        try:
            detector = self._open()
            if detector.count_is_given:
                raise InputError("this model needs the number of objects of each image; take SPAIR")
            detector.on_progress = self._progress
            self.detector = detector
            left = set(range(len(self.paths)))
            while left and not self._ends:
                index = self._next if self._next in left else min(left)
                left.remove(index)
                self.phase, self.share = "finding objects", 0.0
                result = self._found(detector, index)
                with self._changed:
                    self._results[index] = result
                    self._changed.notify_all()
            if not self._ends:
                self.phase = "looking for objects that look alike"
                self._group()
        except _Ended:
            return
        except Exception as error:
            if self._ends:
                return  # its files are gone
            with self._changed:
                self.error = str(error) or type(error).__name__
                self._changed.notify_all()
            if not isinstance(error, InputError) and not lacks_memory(error):
                raise
        finally:
            self.phase = ""

    def _progress(self, phase: str, share: float) -> None:
        if self._ends:
            raise _Ended
        self.phase, self.share = phase, share

    def _found(self, detector: Detector, index: int) -> Found | str:
        path = self.paths[index]
        try:
            found = detector.detect(path, threshold=self.least_threshold)
            reason = misfit(detector, found)
        except InputError as error:
            return str(error)
        self._store(index, found)
        has_masks = found.label_image is not None
        boxes = found.boxes.double().numpy().round(2)
        area = (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)
        return Found(
            size=_size(path, found),
            boxes=boxes,
            scores=found.scores.double().numpy().round(4),
            sides=np.sqrt(area).round(2),
            areas=found.area.numpy() if has_masks else np.zeros(0, np.int64),
            embeddings=found.what.numpy(),
            counts=found.counts,
            misfit=reason,
        )

    def _store(self, index: int, found: Detections) -> None:
        masks: list[dict[str, Any]] = []
        lines: list[list[list[int]]] = []
        if found.label_image is not None and found.labels is not None:
            masks = coco_segmentations(found.label_image, found.labels)
            lines = [
                [ring.ravel().tolist() for polygon in pieces for ring in polygon]
                for pieces in polygons(found.label_image, found.labels)
            ]
        for kind, value in (("masks", masks), ("outlines", lines)):
            path = Path(self._files.name, f"{index}.{kind}.json")
            path.write_text(json.dumps(value, separators=(",", ":")))

    def _group(self) -> None:
        found = {i: item for i, item in self._results.items() if isinstance(item, Found)}
        groups, numbers = groups_of(
            {i: (item.embeddings, item.scores, item.boxes) for i, item in found.items()}
        )
        self._numbers = numbers
        self.groups = groups


class _Ended(Exception):
    """The finder is closed in the middle of an image."""


def _size(path: Path, found: Detections) -> tuple[int, int]:
    if found.label_image is None:
        return image_size(path)
    height, width = found.label_image.shape
    return height, width
