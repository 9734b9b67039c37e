"""The events of a fit, and the figures and picture of a validation."""

from dataclasses import dataclass, replace
from pathlib import Path

from spairkit.config import PrepareConfig
from spairkit.data.datasets import Dataset, validation_batches
from spairkit.detector import Detector
from spairkit.evaluation import evaluate
from spairkit.images import write_picture
from spairkit.report.drawing import reconstruction_sheet
from spairkit.storage.durable import make_folder
from spairkit.storage.runs import Run

_PICTURED = 8  # images in a picture


@dataclass(frozen=True)
class Step:
    """An update was made, or a threshold was tried."""

    step: int
    """Number of updates so far, from 1."""
    steps: int
    """Number of updates planned."""
    losses: dict[str, float] | None
    """Batch means, in nats except `found`, every `loop.REPORT_EVERY` updates, else None: see
    `Losses.means`."""
    seconds: float
    """Seconds since the first update of this process, validations included."""


@dataclass(frozen=True)
class Validation:
    """The model was measured on the validation split and saved."""

    step: int
    figures: dict[str, float]
    """`elbo` in nats and `found`, objects in an image or a crop of one, or `threshold`; and those
    of `box_figures` if boxes are known."""
    picture: Path
    """Path of the picture: images, reconstructions and boxes."""
    is_best: bool


def box_figures(detector: Detector, dataset: Dataset, batch_size: int) -> dict[str, float]:
    """`ap`, `ap_spair`, `count_accuracy` and `count_error` on validation images of known boxes."""
    batches = validation_batches(dataset, batch_size, detector.config.prepare)
    overall = evaluate(of_prepared(detector), batches).overall
    names = ("ap", "ap_spair", "count_accuracy", "count_error")
    return {name: getattr(overall, name) for name in names}


def draw(detector: Detector, dataset: Dataset, run: Run, step: int) -> Path:
    """Writes the picture of a validation into the run's folder."""
    batch = next(iter(validation_batches(dataset, _PICTURED, detector.config.prepare)))
    sheet = reconstruction_sheet(
        of_prepared(detector).explain_batch(
            batch.images, counts=batch.counts if detector.count_is_given else None
        ),
        batch.truth() if dataset.has_truth else None,
    )
    path = run.path / "pictures" / f"step-{step}.png"
    make_folder(path.parent)
    write_picture(path, sheet)
    return path


def of_prepared(detector: Detector) -> Detector:
    """The detector for images that are prepared already."""
    config = replace(detector.config, prepare=PrepareConfig())
    return Detector(
        detector.network, config, box_contrast=detector.box_contrast, search=detector.search
    )
