"""What a fit tells whoever follows it, and how a detector does on the validation split."""

from dataclasses import dataclass
from pathlib import Path

from spairkit.data.datasets import Dataset, evaluation_batches
from spairkit.detector import Detector
from spairkit.evaluation import evaluate
from spairkit.images import write_png
from spairkit.report.drawing import reconstruction_sheet
from spairkit.storage.runs import Run

_PICTURED = 8  # images in a picture


@dataclass(frozen=True)
class Step:
    """An update was made, or a threshold tried."""

    step: int
    """How many have been made, from 1."""
    steps: int
    """How many there will be, unless something ends the fit earlier."""
    losses: dict[str, float] | None
    """Means over the batch in nats, every `training.REPORT_EVERY` updates: see `Losses.means`."""
    seconds: float
    """Since the first update of this process, validations included."""


@dataclass(frozen=True)
class Validation:
    """The model was tried on the validation split and saved."""

    step: int
    figures: dict[str, float]
    """`elbo` in nats or `threshold`; those of `box_figures` where boxes are known."""
    picture: Path
    """Images, their reconstructions and the boxes found."""
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
        detector.explain_batch(batch.images, counts=batch.counts if detector.told else None),
        batch.truth() if dataset.has_truth else None,
    )
    path = run.path / "pictures" / f"step-{step}.png"
    path.parent.mkdir(exist_ok=True)
    write_png(path, sheet)
    return path
