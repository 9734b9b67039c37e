"""`spairkit train`: from images to a run with figures, and what to try next."""

import shlex
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli.console import as_json, print_json, progress_bar, results, say
from spairkit.cli.figures import AUTHORS_RULE, listed, measure, print_report
from spairkit.cli.interrupts import Interrupts
from spairkit.cli.options import (
    ConfigOption,
    DataOption,
    Device,
    DeviceOption,
    JsonOption,
    ModelOption,
    PresetOption,
    QuietOption,
    SetOption,
    choose_device,
    choose_preset,
    data_layer,
    layers,
)
from spairkit.errors import InputError

if TYPE_CHECKING:
    import torch

    from spairkit.config import Config
    from spairkit.data.datasets import Dataset
    from spairkit.storage.runs import Run
    from spairkit.training.distributed import World
    from spairkit.training.loop import Step, Validation

_LINE_EVERY_SECONDS = 10
_PATIENCE_SECONDS = 3.0
_NARROW = 0.5  # of the range of intensities


class Select(StrEnum):
    """What the best checkpoint is best at."""

    ELBO = "elbo"
    AP = "ap"


def train(
    preset: PresetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The run's folder, else ./runs/<data>-<preset>-N.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            help="Go on with the run in this folder from its last checkpoint, which Ctrl-C and "
            "every validation save.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            help="Updates to make in all, while the learning rate falls. Default: the preset's.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes", min=0, help="Stop after this many minutes and save; --resume goes on."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Seed of the initial weights and the noise. Default: 0."),
    ] = None,
    select: Annotated[
        Select | None,
        typer.Option(
            "--select",
            help="The best checkpoint has the highest validation ELBO (elbo, the default, without "
            f"labels) or AP paper (ap, with labels): {AUTHORS_RULE}.",
        ),
    ] = None,
    device: DeviceOption = Device.AUTO,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train on images, without labels. Without options: digits, the quick preset.

    Ctrl-C saves and ends; --resume goes on from there, to the bit. Several processes share each
    batch under torchrun --nproc-per-node=N -m spairkit train ...
    """
    if resume and out and out.resolve() != resume.resolve():
        raise InputError("--out names a new run and --resume an old one; give one of them")
    from spairkit.config_values import from_toml, to_toml
    from spairkit.data.datasets import open_splits
    from spairkit.models.loading import load
    from spairkit.report.page import write_report
    from spairkit.storage.durable import write_text
    from spairkit.storage.runs import Run
    from spairkit.training.distributed import joined
    from spairkit.training.loop import check, fit

    run, saved, shared = None, None, b""
    ending = 0  # the same in all processes: the number of a signal, or 1 when the time is over
    with joined(choose_device(device)) as (world, chosen), ExitStack() as stack:
        if world.rank == 0:
            try:
                over = layers(config, _options(model, data, steps, seed, select), set_)
                settings = _resumed(resume, preset, over) if resume else _new(preset, over)
                check(settings, chosen, world.size)
                images, _ = open_splits(settings)  # what is wrong shows before a run is made
                if not (resume or quiet or json):
                    _say_if_dim(images)
                run = Run.open(resume) if resume else Run.create(out, settings)
                stack.enter_context(run.lock())
                saved = _last_step(run)
                if settings.train.steps != run.config.train.steps:
                    run.extend(settings.train.steps)
            except Exception:
                with suppress(InputError):  # that another one has ended is not the reason
                    world.from_first(b"")  # so that the others end without a word
                raise
            shared = to_toml(run.config).encode()
        shared = world.from_first(shared)
        if not shared:
            raise typer.Exit(2)
        began = time.monotonic()
        interrupts = stack.enter_context(Interrupts(quiet=run is None))

        def stop() -> bool:
            over_time = minutes is not None and time.monotonic() - began >= minutes * 60
            nonlocal ending
            ending = world.greatest(interrupts.number or int(over_time))
            return ending > 0

        events = fit(from_toml(shared.decode()), run, chosen, stop, world)
        if run:
            if not quiet:
                _announce(run, chosen, world)
                if resume:
                    _say_how_far(run, saved)
            if not resume and not data:
                _say_whose_figures(run.config)
            step, validation = _follow(events, run, saved or 0, quiet=quiet)
        else:
            deque(events, maxlen=0)
    if not run:
        raise typer.Exit(128 + ending if ending > 1 else 0)
    command = "spairkit" if world.size == 1 else "torchrun ... -m spairkit"
    go_on = f"{command} train --resume {shlex.quote(str(run.path))}"
    if ending > 1:
        say(f"stopped after step {step}, saved; go on with: {go_on}")
        raise typer.Exit(128 + ending)
    if step < run.config.train.steps:
        say(f"ended after step {step} of {run.config.train.steps}; go on with: {go_on}")

    report = measure(load(run.path, chosen), run.config.data, "test", chosen, quiet=quiet)
    if report:
        write_text(run.path / "test.json", f"{as_json(report.to_json())}\n")
    page = write_report(run.path)
    if json:
        print_json(
            {
                "run": str(run.path),
                "report": str(page),
                "step": step,
                "seconds": round(time.monotonic() - began, 3),
                "validation": validation,
                "test": report.to_json() if report else None,
            }
        )
        return
    if report:
        print_report(report)
    else:
        say("these images have no annotations.json, so there are no test figures")
    _print_next(run, page, has_truth=report is not None)


def _announce(run: "Run", device: "torch.device", world: "World") -> None:
    processes = f" by {world.size} processes" if world.size > 1 else ""
    say(f"training in {run.path} on {device.type}{processes}, {run.config.train.steps} steps")
    if run.config.model.kind == "conncomp":
        say("connected components have no weights: the steps are thresholds that are tried")
    elif run.config.train.select == "ap":
        say(f"the best checkpoint is that of the highest validation AP paper: {AUTHORS_RULE}")


def _say_whose_figures(config: "Config") -> None:
    """A preset may have been measured on other images than those it takes by itself."""
    if config.preset == "laptop" and config.data.name == "digits":
        say(
            "the published figures of the laptop preset are of MNIST (--data FILE); this trains "
            "on the digits that ship with spairkit"
        )


def _last_step(run: "Run") -> int | None:
    """Of the checkpoint that training will go on from; None where there is none yet.

    Raises:
        InputError: there are checkpoints, and all are damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training itself warns of one that is passed over
        checkpoint = run.latest()
    return checkpoint.step if checkpoint else None


def _say_how_far(run: "Run", saved: int | None) -> None:
    """Where a run that is resumed goes on."""
    if saved is None:
        say("no checkpoint is there yet: it begins with the first step")
        return
    steps = run.config.train.steps
    say(f"goes on from its checkpoint of step {saved}: {max(steps - saved, 0)} of {steps} are left")


def _options(
    model: str | None,
    data: str | None,
    steps: int | None,
    seed: int | None,
    select: Select | None,
) -> dict[str, Any]:
    """The config values that have an option of their own."""
    given = {"steps": steps, "seed": seed, "select": select.value if select else None}
    loop = {name: value for name, value in given.items() if value is not None}
    return {
        **({"model": {"kind": model}} if model else {}),
        **(data_layer(data) if data else {}),
        **({"train": loop} if loop else {}),
    }


def _say_if_dim(images: "Dataset") -> None:
    """Says which levels would stretch a folder's images, where they use little of the range."""
    from spairkit.data.folder import ImageFolder

    if not isinstance(images, ImageFolder) or (images.config.black, images.config.white) != (0, 1):
        return
    low, high = (float(f"{level:.3g}") for level in images.levels())
    if low < high < low + _NARROW:
        say(
            f"98 % of the pixels lie between {low:g} and {high:g} of full intensity; where "
            f"objects are missed, try --set data.black={low:g} --set data.white={high:g}"
        )


def _new(preset: str | None, over: list[Mapping[str, Any]]) -> "Config":
    from spairkit.presets import resolve

    return resolve(choose_preset(preset, over), *over)


def _resumed(path: Path, preset: str | None, over: list[Mapping[str, Any]]) -> "Config":
    """The config of the run in the folder `path`, which may be given other steps.

    Raises:
        InputError: there is no run, or a setting is asked for that is not the run's.
    """
    from spairkit.config_values import differences, from_dict, merge, model_kind, to_dict
    from spairkit.storage.runs import Run

    config = Run.open(path).config
    kind = model_kind(merge(*over))
    if kind not in (None, config.model.kind):
        raise InputError(
            f"--resume {path}: its model is {config.model.kind}, not {kind}; leave --model out, or "
            "begin a new run"
        )
    asked = from_dict(merge(to_dict(config), *over, {"preset": preset} if preset else {}))
    changes = [line for line in differences(config, asked) if not line.startswith("train.steps:")]
    if changes:
        raise InputError(
            f"--resume {path}: a run keeps its settings, and these differ: {'; '.join(changes)}; "
            "leave them out, or begin a new run"
        )
    return asked


def _follow(
    events: "Iterable[Step | Validation]", run: "Run", step: int, *, quiet: bool
) -> tuple[int, dict[str, float]]:
    """Shows what happens from `step` on; gives the last step and the last validation's figures."""
    from spairkit.training.loop import Step

    figures: dict[str, float] = {}
    losses, line_at = "", 0.0
    rate_from = step, 0.0
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("training", total=run.config.train.steps, completed=step, note="")

        def print_line(text: str) -> None:
            if not quiet:
                bar.console.print(text, soft_wrap=True)

        for event in _explained(events, print_line):
            if not isinstance(event, Step):
                figures = event.figures
                best = ", the best so far" if event.is_best else ""
                print_line(f"step {event.step}: validation {listed(figures)}{best}")
                continue
            step = event.step
            if event.losses:
                losses = _elbo(event.losses)
            if not rate_from[1]:
                # the first step compiles, and says nothing of those to come
                rate_from = step, event.seconds
                continue
            rate = (step - rate_from[0]) / max(event.seconds - rate_from[1], 1e-9)
            bar.update(task, completed=step, note=f"{rate:.1f}/s  {losses}")
            if bar.disable and event.seconds - line_at >= _LINE_EVERY_SECONDS:
                line_at = event.seconds
                left = (event.steps - step) / max(rate, 1e-9)
                print_line(
                    f"step {step} of {event.steps}, {rate:.1f}/s, {_duration(left)} left"
                    f"{'  ' if losses else ''}{losses}"
                )
    return step, figures


def _explained(
    events: "Iterable[Step | Validation]", print_line: Callable[[str], None]
) -> "Iterator[Step | Validation]":
    """The same; says why nothing is seen yet, if the first one keeps people waiting."""
    words = (
        "the first step is slow where kernels are compiled: up to a minute, once for each kind of "
        "network"
    )
    timer = threading.Timer(_PATIENCE_SECONDS, print_line, [words])
    timer.daemon = True
    timer.start()
    try:
        for event in events:
            timer.cancel()
            yield event
    finally:
        timer.cancel()


def _elbo(losses: dict[str, float]) -> str:
    """The ELBO and its terms, in nats."""
    terms = ", ".join(
        f"{name.removeprefix('kl_')} {value:.1f}"
        for name, value in losses.items()
        if name not in ("total", "elbo")
    )
    return f"elbo {losses['elbo']:.1f} = -({terms})"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _print_next(run: "Run", page: Path, *, has_truth: bool) -> None:
    """Where the run is, and two commands that work as they stand."""
    path = shlex.quote(str(run.path))
    image = shlex.quote(str(_example(run)))
    folder = shlex.quote(run.config.data.path)
    told = f" --count {run.config.data.max_objects}" if run.config.model.told else ""
    second = "eval" if has_truth else f"detect {folder} --out found.json"
    results().print(
        f"run: {run.path}\n"
        f"report: {page}\n"
        "try next:\n"
        f"  spairkit viz {image} --checkpoint {path}{told}\n"
        f"  spairkit {second} --checkpoint {path}",
        soft_wrap=True,
    )


def _example(run: "Run") -> Path:
    """An image for the person to look at: the first test scene, or the first of their own."""
    import torch

    from spairkit.data.datasets import open_dataset
    from spairkit.images import list_images, write_png

    if run.config.data.name == "folder":
        return list_images(Path(run.config.data.path))[0]
    path = run.path / "example.png"
    scenes = open_dataset(run.config.data, "test")
    write_png(path, scenes.batch(torch.zeros(1, dtype=torch.int64)).images[0])
    return path
