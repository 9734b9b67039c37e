"""What `spairkit train` shows while it compiles and trains: a bar, and lines now and then."""

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING

from spairkit.cli.console import LINE_EVERY_SECONDS, progress_bar, say
from spairkit.cli.figures import listed

if TYPE_CHECKING:
    import torch

    from spairkit.config import Config
    from spairkit.training.loop import Event

_COMPILING_SECONDS = 3.0  # between lines about kernels


def show_compiling(config: "Config", device: "torch.device", *, quiet: bool) -> None:
    """Compiles the CPU kernels, or loads them from the cache on disk, and shows the progress."""
    from spairkit.models.compiling import compiling

    line_at = time.monotonic()
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("compiling kernels (first use only)", total=None, note="")
        for step in compiling(config.model, device):
            bar.update(task, completed=step.done, total=step.total)
            if not quiet and bar.disable and time.monotonic() - line_at >= _COMPILING_SECONDS:
                line_at = time.monotonic()
                share = f"{step.done / step.total:.0%}"
                say(f"compiling kernels (first use only): {share}, next: {step.name}")


def show_events(
    events: "Iterable[Event]", config: "Config", step: int, *, quiet: bool
) -> tuple[int, dict[str, float]]:
    """Shows the events of a training that starts after `step`.

    Returns:
        The last step, and the figures of the last validation.
    """
    from spairkit.training.loop import Restart, Step

    figures: dict[str, float] = {}
    place = "a crop" if config.data.name == "folder" else "an image"
    losses, line_at = "", 0.0
    rate_from = step, 0.0
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("training", total=config.train.steps, completed=step, note="")

        for event in events:
            if isinstance(event, Restart):
                step, figures, rate_from = 0, {}, (0, 0.0)
                bar.update(task, completed=step)
                bar.say(str(event))
                continue
            if not isinstance(event, Step):
                figures = event.figures
                best = ", the best so far" if event.is_best else ""
                bar.say(f"step {event.step}: validation {_validation(figures, place)}{best}")
                continue
            step = event.step
            if event.losses:
                losses = _elbo(event.losses, place)
            if not rate_from[1]:
                # the first step compiles, so its time says nothing of the others
                rate_from = step, event.seconds
                continue
            rate = (step - rate_from[0]) / max(event.seconds - rate_from[1], 1e-9)
            bar.update(task, completed=step, note=f"{rate:.1f}/s  {losses}")
            if bar.disable and event.seconds - line_at >= LINE_EVERY_SECONDS:
                line_at = event.seconds
                left = timedelta(seconds=round((event.steps - step) / max(rate, 1e-9)))
                line = f"step {step} of {event.steps}, {rate:.1f}/s, {left} left  {losses}"
                bar.say(line.rstrip())
    return step, figures


def _validation(figures: dict[str, float], place: str) -> str:
    """Objects in a place, if the model counts them, and the other figures."""
    rest = {name: value for name, value in figures.items() if name != "found"}
    return _found(figures, place, ", " if rest else "") + listed(rest)


def _found(figures: dict[str, float], place: str, end: str) -> str:
    return f"{figures['found']:.1f} objects {place}{end}" if "found" in figures else ""


def _elbo(losses: dict[str, float], place: str) -> str:
    """Objects in a place, the ELBO and its terms in nats."""
    terms = ", ".join(
        f"{name.removeprefix('kl_')} {value:.1f}"
        for name, value in losses.items()
        if name not in ("total", "elbo", "found")
    )
    return f"{_found(losses, place, '  ')}elbo {losses['elbo']:.1f} = -({terms})"
