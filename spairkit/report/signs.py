"""Signs that a model has failed, or does not fit the images; they need no labels.

They are kept in the run: RUN/signs.json holds `warnings`, which the report shows, and `failed`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spairkit.detections import Detections
from spairkit.detector import Detector
from spairkit.errors import InputError
from spairkit.report.objects import Objects
from spairkit.storage.durable import write_text
from spairkit.survey import Survey

AGREED = 0.3
"""F1 with the watershed, at least."""

JUDGED_UPDATES = 200
"""The signs of a shorter training are warnings."""

_FILE = "signs.json"
_CELLS = 0.7  # objects for each cell of the grid, at most
_COVERED = 0.9  # share of the image that masks cover, at most
_REGULAR = 0.59  # median confidence, where it follows the trust in objects
_DIM = 0.35  # of white: median intensity of objects, at least, of a model of white ones
_FEWEST = 5  # objects that an agreement is judged on
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Signs:
    """What speaks against a trained model."""

    failures: tuple[str, ...] = ()
    """Reasons not to use its boxes."""
    warnings: tuple[str, ...] = ()
    """Reasons to look at its boxes first."""


def misfit(detector: Detector, found: Detections) -> str | None:
    """Why the objects that SPAIR found in an image are hardly objects; None if they may be."""
    labels = found.label_image
    if labels is None or len(found) < _FEWEST:
        return None
    cells = detector.cells((labels.shape[0], labels.shape[1]))
    if not cells:
        return None
    if len(found) > _CELLS * cells:
        return f"{len(found)} objects on {cells} cells of the grid: they paint the background"
    covered = np.count_nonzero(labels.numpy()) / labels.numel()
    if covered > _COVERED:
        return f"objects cover {covered:.0%} of the image: they paint the background"
    data = detector.config.data
    if found.image is not None and data.name not in ("cards", "folder") and data.colour == "white":
        dim = float(found.intensity.nanmedian())
        if dim < _DIM:
            return f"objects have {dim:.0%} of the intensity of white; the model knows white ones"
    return None


def signs_of(
    detector: Detector,
    objects: Objects,
    survey: Survey | None = None,
    updates: int = JUDGED_UPDATES,
) -> Signs:
    """The signs in the objects that a report shows.

    Args:
        detector: has found them.
        objects: of some images.
        survey: of the folder, if it was looked at.
        updates: of the training; the signs of one of fewer than `JUDGED_UPDATES` are warnings.
    """
    doubts = survey.doubts() if survey else []
    cluttered = survey is not None and survey.is_cluttered
    failures, warnings = [], list(doubts)
    if not objects.count:
        failures.append("no object was found in any image")
    cells = sum(detector.cells(image.part or image.size) for image in objects.images)
    if cells and objects.count > max(_CELLS * cells, _FEWEST):
        failures.append(
            f"{objects.count} objects on {cells} cells of the grid: they paint the background"
        )
    by_shape = detector.search != "off" and detector.config.search.start == "watershed"
    if by_shape and objects.confidence is not None and objects.confidence < _REGULAR:
        said = f"outlines are irregular: half of the confidences are below {objects.confidence:.2f}"
        (failures if cluttered else warnings).append(said)
    floor = objects.floor
    if floor is not None and max(floor.count, objects.count) >= _FEWEST:
        said = (
            f"the encoder, before any search, agrees with a watershed by an F1 of "
            f"{floor.agreement:.2f} only"
        )
        if floor.agreement < AGREED:
            failures.append(said)
        elif floor.agreement < 2 * AGREED:
            warnings.append(f"{said}: look at both before you use one")
    if updates < JUDGED_UPDATES:
        return Signs(warnings=(*failures, *warnings))
    return Signs(tuple(failures), tuple(warnings))


def write_signs(run: Path, signs: Signs) -> None:
    """Writes `signs.json`. Raises InputError if the folder cannot be written."""
    values = {"warnings": [*signs.failures, *signs.warnings], "failed": bool(signs.failures)}
    write_text(run / _FILE, f"{json.dumps(values, indent=2)}\n")


def clear_signs(run: Path) -> None:
    """Removes the signs of a run that is trained further. Raises InputError if they stay."""
    path = run / _FILE
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be removed: {error.strerror}") from error


def has_signs(run: Path) -> bool:
    """Whether a training has ended there: then its signs are written, even if there are none."""
    return (run / _FILE).exists()


def failed_run(checkpoint: Path) -> Path | None:
    """The run of a checkpoint, or the folder itself, if it is marked as failed."""
    for folder in (checkpoint, *checkpoint.resolve().parents[:2]):
        if has_failed(folder):
            return folder
    return None


def has_failed(run: Path) -> bool:
    """Whether a run is marked as failed; false if nothing is known."""
    path = run / _FILE
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return False
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("failed") is True
