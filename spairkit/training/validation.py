"""The events of a fit, and the figures and picture of a validation."""

from dataclasses import dataclass
from pathlib import Path

from spairkit.data.datasets import Dataset, evaluation_batches
from spairkit.detector import Detector
from spairkit.evaluation import evaluate
from spairkit.images import write_png
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
    """`elbo` in nats and `found`, objects an image, or `threshold`; and those of `box_figures` if
    boxes are known."""
    picture: Path
    """Path of the picture: images, reconstructions and boxes."""
    is_best: bool


def box_figures(detector: Detector, dataset: Dataset, batch_size: int) -> dict[str, float]:
    """`ap`, `ap_spair`, `count_accuracy` and `count_error` on a split whose boxes are known."""
    overall = evaluate(detector, evaluation_batches(dataset, batch_size)).overall
    names = ("ap", "ap_spair", "count_accuracy", "count_error")
    return {name: getattr(overall, name) for name in names}


def draw(detector: Detector, dataset: Dataset, run: Run, step: int) -> Path:
    """Writes the picture of a validation into the run's folder."""
    batch = next(iter(evaluation_batches(dataset, _PICTURED)))
    sheet = reconstruction_sheet(
        detector.explain_batch(
            batch.images, counts=batch.counts if detector.count_is_given else None
        ),
        batch.truth() if dataset.has_truth else None,
    )
    path = run.path / "pictures" / f"step-{step}.png"
    make_folder(path.parent)
    write_png(path, sheet)
    return path
