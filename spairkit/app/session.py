"""What the page shows: a folder, the model that looks at it, corrections and a training."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from spairkit.app.corrections import Corrections, CorrectionsFile
from spairkit.app.exports import Filter, ImageObjects
from spairkit.app.finder import Finder, Found
from spairkit.app.pictures import Pictures
from spairkit.app.trainings import Start, Training
from spairkit.config import WatershedConfig
from spairkit.counts import CountPosterior
from spairkit.detector import Detector, load
from spairkit.errors import ImageFileError, InputError
from spairkit.images import list_images
from spairkit.models.watershed import Watershed
from spairkit.names import in_utf8
from spairkit.presets import DEFAULT, resolve
from spairkit.report.signs import failed_run
from spairkit.survey import look

WATERSHED = "watershed"
"""The name of the model that needs no training."""


class Picked(NamedTuple):
    """Counts of the objects that a filter keeps."""

    images: list[int | None]
    """Of each image; None if it is not done, or cannot be read."""
    total: int


class Session:
    """Everything behind one page; its methods may be called from several threads.

    Args:
        folder: of images.
        corrections: the file that corrections are kept in.
        checkpoint: the model to begin with; None is a watershed.
        device: to compute on.
        start: starts a training.

    Raises:
        InputError: there is no image in the folder, or the corrections or the checkpoint cannot be
            read.
    """

    def __init__(
        self,
        folder: Path,
        corrections: Path,
        checkpoint: Path | None,
        device: Any,
        start: Start,
    ) -> None:
        self.folder = folder
        self.paths = list_images(folder)
        self.names = [in_utf8(path.relative_to(folder).as_posix()) for path in self.paths]
        self.corrections = CorrectionsFile(corrections)
        self.pictures = Pictures()
        self.training: Training | None = None
        self._doubts: list[str] = []  # of the watershed
        self._device, self._start = device, start
        self._models: list[Path | None] = [None]
        self._chosen = 0
        self._generation = 0  # changes with the model
        self._revisions: dict[int, int] = {}
        self._interval: tuple[int, int] | None = None  # of all images together
        self._lock = threading.Lock()
        opened: Callable[[], Detector] = self._watershed
        if checkpoint is not None:
            detector = load(checkpoint, device)  # what is wrong with it shows before the page
            self._models.append(checkpoint)
            self._chosen = 1
            opened = lambda: detector  # noqa: E731
        self.finder = Finder(self.paths, opened)

    def close(self) -> bool:
        """Stops the training, which saves, and the search for objects; see `Finder.close`."""
        training = self.training
        if training is not None:
            training.close()
        return self.finder.close()

    def to_json(self) -> dict[str, Any]:
        """The state, for the page."""
        finder, training = self.finder, self.training
        counts, misfits, failures = self._summary(finder)
        detector = finder.detector
        if len(counts) + len(failures) < len(self.paths):
            self._interval = None
        elif counts and self._interval is None:
            self._interval = CountPosterior.total(counts).interval()
        return {
            "folder": in_utf8(str(self.folder)),
            "corrections": in_utf8(str(self.corrections.path)),
            "models": [WATERSHED if path is None else in_utf8(str(path)) for path in self._models],
            "model": self._chosen,
            "generation": self._generation,
            "images": len(self.paths),
            "done": finder.done,
            "busy": finder.is_busy,
            "phase": finder.phase,
            "share": finder.share,
            "error": finder.error,
            "least_threshold": finder.least_threshold,
            "interval": self._interval,
            "rough": detector is not None
            and detector.search != "off"
            and not detector.has_intervals,
            "doubts": self._doubts_of(self._models[self._chosen]),
            "misfits": len(misfits),
            "misfit": misfits[0] if misfits else None,
            "unreadable": failures[:3],
            "num_unreadable": len(failures),
            "groups": [asdict(group) for group in finder.groups],
            "training": None if training is None else training.to_json(),
            "uses_training": training is not None and self._models[self._chosen] == training.run,
        }

    def picked(self, chosen: Filter) -> Picked:
        """The counts of the objects that a filter keeps; boxes that were added count."""
        finder = self.finder
        images: list[int | None] = []
        for index, name in enumerate(self.names):
            found = finder.result(index)
            if not isinstance(found, Found):
                images.append(None)
                continue
            corrections = self.corrections.of(name)
            rows = chosen.kept(found, finder.group_numbers(index), corrections)
            images.append(len(rows) + len(corrections.added))
        return Picked(images, sum(count or 0 for count in images))

    def objects(self, index: int, seconds: float) -> dict[str, Any] | None:
        """The objects of an image for the page; None if they are not known in time.

        Raises:
            InputError: the image cannot be read, or the model cannot be opened.
        """
        finder = self.finder
        found = finder.wait(index, seconds)
        if isinstance(found, str):
            raise ImageFileError(found)
        if found is None:
            if finder.error:
                raise InputError(finder.error)
            return None
        return {
            "size": list(found.size),
            "boxes": found.boxes.tolist(),
            "scores": found.scores.tolist(),
            "sides": found.sides.tolist(),
            "groups": finder.group_numbers(index),
            "outlines": finder.outlines(index),
            "mean": None if found.counts is None else found.counts.mean,
            "interval": None if found.counts is None else list(found.counts.interval()),
            "misfit": found.misfit,
            **self._corrected(index, found),
        }

    def correct(self, index: int, corrections: Corrections, revision: int) -> dict[str, Any] | None:
        """Takes over the corrections of an image, which are durable when this returns.

        Args:
            revision: of the corrections that these follow on.

        Returns:
            The corrections and the rows that they cover; None if others came in between.

        Raises:
            InputError: they cannot be written.
        """
        with self._lock:
            if self._revisions.get(index, 0) != revision:
                return None
            self.corrections.put(self.names[index], corrections)
            self._revisions[index] = revision + 1
        found = self.finder.result(index)
        return self._corrected(index, found if isinstance(found, Found) else None)

    def exported(self, chosen: Filter) -> Iterator[ImageObjects]:
        """The objects of each image that could be read.

        Raises:
            InputError: some images are not done.
        """
        finder = self.finder
        if finder.done < len(self.paths):
            left = len(self.paths) - finder.done
            raise InputError(f"{left} of {len(self.paths)} images are not done yet; try again then")
        return self._exported(finder, chosen)

    def sizes(self) -> list[dict[str, Any]]:
        """COCO's entry of each image that could be read."""
        entries = []
        for index, name in enumerate(self.names):
            found = self.finder.result(index)
            if isinstance(found, Found):
                height, width = found.size
                entry = {"id": index + 1, "file_name": name, "width": width, "height": height}
                entries.append(entry)
        return entries

    def choose(self, model: int) -> None:
        """Begins anew with another of the models. Raises InputError if it cannot be opened."""
        with self._lock:
            if not 0 <= model < len(self._models):
                raise InputError(f"there is no model {model}")
            path, before = self._models[model], self.finder
            opened = self._watershed if path is None else lambda: load(path, self._device)
            self._chosen, self._interval = model, None
            self._generation += 1
            self.finder = Finder(self.paths, opened)
        before.close()

    def train(self) -> None:
        """Starts a training on the folder. Raises InputError if one runs."""
        with self._lock:
            if self.training is not None:
                if self.training.status in ("running", "stopping"):
                    raise InputError("a training runs already; stop it first")
                self.training.close()
            self.training = Training(self.folder, self._start)

    def stop_training(self) -> None:
        """Asks the training to save and end, if one runs."""
        if self.training is not None:
            self.training.stop()

    def take_trained(self) -> None:
        """Begins anew with the model that was trained. Raises InputError if there is none."""
        training = self.training
        if training is None or not training.has_model:
            raise InputError("there is no trained model yet")
        if training.run not in self._models:
            self._models.append(training.run)
        self.choose(self._models.index(training.run))

    def _doubts_of(self, model: Path | None) -> list[str]:
        """Reasons not to trust a model, in sentences; None is the watershed."""
        if model is None:
            return [f"{doubt[:1].upper()}{doubt[1:]}." for doubt in self._doubts]
        failed = failed_run(model)
        if failed is None:
            return []
        return [f"The training of {in_utf8(str(failed))} failed: do not trust these objects."]

    def _corrected(self, index: int, found: Found | None) -> dict[str, Any]:
        corrections = self.corrections.of(self.names[index])
        return {
            "removed": corrections.removed,
            "added": corrections.added,
            "covers": [] if found is None else corrections.covers(found.boxes),
            "revision": self._revisions.get(index, 0),
        }

    def _exported(self, finder: Finder, chosen: Filter) -> Iterator[ImageObjects]:
        for index, name in enumerate(self.names):
            found = finder.result(index)
            if isinstance(found, Found):
                groups, corrections = finder.group_numbers(index), self.corrections.of(name)
                yield ImageObjects(
                    number=index + 1,
                    name=name,
                    found=found,
                    rows=chosen.kept(found, groups, corrections),
                    groups=groups,
                    segmentations=finder.segmentations(index),
                    added=corrections.added,
                )

    def _summary(self, finder: Finder) -> tuple[list[CountPosterior], list[str], list[str]]:
        """The posteriors of counts, reasons of misfits, and of files that cannot be read."""
        counts, misfits, failures = [], [], []
        for index, name in enumerate(self.names):
            found = finder.result(index)
            if isinstance(found, str):
                failures.append(found)
            elif found is not None:
                counts += [found.counts] if found.counts is not None else []
                misfits += [f"{name}: {found.misfit}"] if found.misfit else []
        return counts, misfits, failures

    def _watershed(self) -> Detector:
        """A watershed with the settings that a look at the folder proposes."""
        survey = look(self.paths)
        self._doubts = survey.doubts()
        model = {"data": {"name": "folder", "path": "."}, "model": {"kind": WATERSHED}}
        config = resolve(DEFAULT, survey.settings(WatershedConfig(), {}), model)
        assert isinstance(config.model, WatershedConfig)
        return Detector(Watershed(config.model), config, name=WATERSHED)
