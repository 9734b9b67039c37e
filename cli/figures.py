"""Figures of a model on a split, and their table, for `train` and `eval`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spairkit.cli.console import counted, results, say, table_of

if TYPE_CHECKING:
    from spairkit.config import DataConfig
    from spairkit.data.datasets import Dataset
    from spairkit.data.glyphs import Split
    from spairkit.detector import Detector
    from spairkit.evaluation import Figures, Report

AUTHORS_RULE = "the rule of the SPAIR authors' code"
"""Definition of AP paper."""

_COLUMNS = ("ap", "ap_spair", "ap_coco", "ap50", "count_accuracy", "count_error", "count_bias")
_INTERVAL_COLUMNS = ("interval_coverage", "interval_width")
_WIDTH_WITH_INTERVALS = 100
_BATCH_SIZE = 32


def called(key: str) -> str:
    """The name of a figure in tables; its key if it has none."""
    from spairkit.metrics import NAMES

    return NAMES.get(key, key.replace("_", " "))


def listed(figures: Mapping[str, float], form: str = ".3f") -> str:
    """`AP 0.804, AP paper 0.751`."""
    return ", ".join(f"{called(key)} {value:{form}}" for key, value in figures.items())


def measure(
    detector: "Detector",
    data: "DataConfig",
    split: "Split",
    *,
    threshold: float = 0.5,
    trained_on: bool = True,
    quiet: bool = False,
) -> "Report | None":
    """The detector's figures on a split; None where there is no ground truth.

    `trained_on` says whether the detector was trained on this folder.
    """
    from spairkit.data.datasets import described, evaluation_batches, open_dataset
    from spairkit.evaluation import evaluate

    dataset = open_dataset(data, split, detector.device)
    if not dataset.has_truth:
        return None
    total = None if data.name == "folder" else len(dataset)
    batches = evaluation_batches(dataset, _BATCH_SIZE)
    with counted(f"{split} images", total, quiet=quiet) as show_done:
        detector.on_progress = show_done.search
        words = described(data, split, trained_on=trained_on)
        report = evaluate(detector, batches, threshold, show_done, measured_on=words)
    say_skipped(dataset, "; the figures leave such files out")
    return report


def say_skipped(dataset: "Dataset", consequence: str = "") -> None:
    """Names the image files that could not be read so far, if there are any."""
    from spairkit.data.folder import ImageFolder
    from spairkit.images import skipped_files

    if isinstance(dataset, ImageFolder) and dataset.skipped:
        say(f"{skipped_files(dataset.skipped, dataset.num_files)}{consequence}")


def print_report(report: "Report") -> None:
    """The table on stdout: all images first, then those of each number of objects."""
    has_intervals = report.overall.interval_width is not None
    columns = _COLUMNS + (_INTERVAL_COLUMNS if has_intervals else ())
    table = table_of(("objects", "images", *map(called, columns)))
    table.add_row("all", *_cells(report.overall, columns), end_section=True)
    for number, figures in report.by_objects.items():
        table.add_row(str(number), *_cells(figures, columns))
    console = results(_WIDTH_WITH_INTERVALS) if has_intervals else results()
    console.print(report.measured_on, soft_wrap=True)
    console.print(table)
    console.print(
        f"AP: IoU .1 to .9, COCO matching, 101 points. AP paper: {AUTHORS_RULE}.\n"
        f"AP COCO: IoU .5 to .95. Counts: scores above {report.threshold:g}."
        + (" 90 %: intervals of the count." if has_intervals else "")
        + f"\nSearch: {report.search}.",
        soft_wrap=True,
    )


def _cells(figures: "Figures", columns: Sequence[str]) -> list[str]:
    values = figures.to_json()
    shown = [values[name] for name in columns]
    return [str(figures.images), *("-" if value is None else f"{value:.3f}" for value in shown)]
