"""`spairkit train`: from images to a run with figures, and the commands to try next."""

import shlex
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli import options
from spairkit.cli.console import (
    counted,
    json_text,
    print_json,
    results,
    say,
    several,
)
from spairkit.cli.figures import AUTHORS_RULE, measure, print_report, say_skipped
from spairkit.cli.interrupts import Interrupts
from spairkit.cli.train_progress import show_compiling, show_events
from spairkit.cli.workers import parent_ended
from spairkit.errors import InputError

if TYPE_CHECKING:
    import torch

    from spairkit.config import Config
    from spairkit.detector import Detector
    from spairkit.report.objects import Objects
    from spairkit.storage.runs import Run
    from spairkit.survey import Survey
    from spairkit.training.distributed import World


class Select(StrEnum):
    """The validation figure of the best checkpoint."""

    ELBO = "elbo"
    AP = "ap"


def train(
    data: options.DataOption = None,
    preset: options.PresetOption = None,
    model: options.ModelOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    out: Annotated[
        Path | None,
        options.output_option(help="The folder of the run. Default: ./runs/DATA-PRESET-N."),
    ] = None,
    resume: Annotated[
        Path | None,
        options.training_option(help="Continue the run in this folder from its last checkpoint."),
    ] = None,
    steps: Annotated[
        int | None,
        options.training_option(
            help="Number of updates; the learning rate falls over them. Default: the preset's."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        options.training_option(
            min=0, help="Stop after this many minutes with a checkpoint; --resume continues."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        options.training_option(help="Seed of the initial weights and the noise. Default: 0."),
    ] = None,
    select: Annotated[
        Select | None,
        options.training_option(
            help="The best checkpoint has the highest validation ELBO (elbo, default; needs no "
            f"labels) or AP paper (ap; needs labels): {AUTHORS_RULE}."
        ),
    ] = None,
    device: options.DeviceOption = options.Device.AUTO,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Train on images, without labels. Without options: digits, the quick preset.

    A checkpoint is written at every validation and on Ctrl-C, SIGTERM and SIGHUP; --resume
    continues from it.

    torchrun --nproc-per-node=N -m spairkit train ... shares each batch among N processes.
    """
    if resume and out and out.resolve() != resume.resolve():
        raise InputError("--out names a new run and --resume an old one; give one of them")
    from spairkit.training.distributed import joined

    began = time.monotonic()
    looks: list[Survey] = []
    orphaned = parent_ended()

    def stop() -> int:
        """0, the exit status of a signal, or 1 when the time is over; the same in all processes."""
        over_time = minutes is not None and time.monotonic() - began >= minutes * 60
        number = signal.SIGTERM if orphaned.is_set() else interrupts.number
        return world.greatest(128 + number if number else int(over_time))

    with joined(options.choose_device(device)) as (world, chosen), ExitStack() as stack:

        def prepare() -> "Run":
            loop = {"steps": steps, "seed": seed, "select": select and select.value}
            over = options.layers(config, set_, data=data, model=model, **loop)
            if resume:
                settings = _resumed(resume, preset, over)
                survey = _surveyed(settings, quiet=quiet)
                looks.extend([survey] if survey else [])
            else:
                measured = looked(preset, over, looks, quiet=quiet)
                settings = options.resolved(preset, [*measured, *over])
            return stack.enter_context(_opened(settings, resume, out, chosen, world))

        run, settings = _on_first(prepare, world)
        interrupts = stack.enter_context(Interrupts(quiet=run is None))
        if run and not quiet:
            _announce(run, chosen, world, resumed=resume is not None)
        by_default = run and not (resume or data) and run.config.data.name == "digits"
        if run and by_default and run.config.preset == "laptop":
            say(
                "the published figures of the laptop preset are for MNIST (--data FILE); this run "
                "uses the packaged digits"
            )
        ending, step, validation = _train(run, settings, chosen, world, stop, quiet=quiet)
    if not run:
        raise typer.Exit(ending if ending > 1 else 0)
    command = "spairkit" if world.size == 1 else "torchrun ... -m spairkit"
    continues = f"continue with: {command} train --resume {shlex.quote(str(run.path))}"
    if ending > 1:
        say(f"stopped after step {step}, checkpoint saved; {continues}")
        raise typer.Exit(ending)
    if step < run.config.train.steps:
        say(f"ended after step {step} of {run.config.train.steps}; {continues}")
    try:
        _finish(run, chosen, step, validation, looks, began, as_json=as_json, quiet=quiet)
    except SystemExit:  # a signal
        say(f"the training is saved, but test figures and report are not complete; {continues}")
        raise


@contextmanager
def _opened(
    settings: "Config",
    resume: Path | None,
    out: Path | None,
    device: "torch.device",
    world: "World",
) -> "Iterator[Run]":
    """Checks settings and data, then makes or opens the run and locks it."""
    from spairkit.data.datasets import open_splits
    from spairkit.report.signs import clear_signs
    from spairkit.storage.runs import Run
    from spairkit.training.loop import check

    check(settings, device, world.size)
    images, _ = open_splits(settings)  # mistakes show before a run is made
    say_skipped(images)
    model = settings.model
    if model.kind == "conncomp" and model.threshold == "fit" and not images.has_truth:
        say("these images have no annotations.json: the threshold is Otsu's")
    run = Run.open(resume) if resume else Run.create(out, settings)
    with run.lock():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # training itself warns of a damaged checkpoint
            run.latest()  # raises if all are damaged
        run.adopt(settings)
        clear_signs(run.path)  # they are judged again at the end
        yield run


def _on_first(prepare: "Callable[[], Run]", world: "World") -> "tuple[Run | None, Config]":
    """Prepares on rank 0 and sends the config to all ranks; if it fails, all ranks end."""
    from spairkit.config_values import from_toml, to_toml

    run, shared = None, b""
    if world.rank == 0:
        try:
            run = prepare()
        except Exception:
            with suppress(InputError):  # another process that has ended is not the reason
                world.from_first(b"")  # lets the others end without a message
            raise
        shared = to_toml(run.config).encode()
    shared = world.from_first(shared)
    if not shared:
        raise typer.Exit(2)
    return run, from_toml(shared.decode())


def _train(
    run: "Run | None",
    settings: "Config",
    device: "torch.device",
    world: "World",
    stop: Callable[[], int],
    *,
    quiet: bool,
) -> tuple[int, int, dict[str, float]]:
    """Trains; returns the last value of `stop`, the last step and the last figures."""
    from spairkit.training.loop import fit

    ending = 0

    def stops() -> bool:
        nonlocal ending
        ending = stop()
        return ending > 0

    show_compiling(settings, device, quiet=quiet or run is None)
    events = fit(settings, run, device, stops, world)
    if run is None:
        deque(events, maxlen=0)
        return ending, 0, {}
    first = _last_step(run)
    step, validation = show_events(events, run.config, first, quiet=quiet)
    return ending, step, validation


def _finish(
    run: "Run",
    device: "torch.device",
    step: int,
    validation: dict[str, float],
    looks: "list[Survey]",
    began: float,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Calibrates and measures the best checkpoint, writes the report and prints both."""
    from spairkit.detector import load
    from spairkit.report.page import write_report
    from spairkit.report.signs import signs_of, write_signs
    from spairkit.storage.durable import write_text

    _calibrate(run, device, quiet=quiet)
    detector = load(run.path, device)
    report = measure(detector, run.config.data, "test", quiet=quiet)
    if report:
        write_text(run.path / "test.json", f"{json_text(report.to_json())}\n")
    image = _example(run)
    objects = _find(run, detector, quiet=quiet)
    signs = signs_of(detector, objects, looks[0] if looks else None, step)
    write_signs(run.path, signs)
    page = write_report(run.path)
    if as_json:
        print_json(
            {
                "run": str(run.path),
                "report": str(page),
                "step": step,
                "seconds": round(time.monotonic() - began, 3),
                "validation": validation,
                "test": report.to_json() if report else None,
                "found": objects.count,
                "failures": signs.failures,
                "warnings": signs.warnings,
            }
        )
        if signs.failures:
            raise typer.Exit(options.FAILED)
        return
    for warning in signs.warnings:
        say(f"warning: {warning}")
    if signs.failures:
        say(f"this training failed: {'; '.join(signs.failures)}")
        say(
            f"see {page}; try another --seed, `spairkit data look` and its settings, or "
            "--model watershed"
        )
        raise typer.Exit(options.FAILED)
    if report:
        print_report(report)
    else:
        say("these images have no annotations.json, so there are no test figures")
    results().print(_answer(objects), soft_wrap=True)
    _print_next(run, page, image, has_truth=report is not None)


def _answer(objects: "Objects") -> str:
    """How many objects the model finds, and the watershed beside it, in one line."""
    images = several(len(objects.images), "image")
    middle = "the middle of " if any(image.part for image in objects.images) else ""
    found = f"found: {several(objects.count, 'object')} in {middle}{images}"
    if objects.floor is None:
        return found
    beside = f"a watershed finds {objects.floor.count}"
    return f"{found}; {beside} (agreement with the encoder: F1 {objects.floor.agreement:.2f})"


def _find(run: "Run", detector: "Detector", *, quiet: bool) -> "Objects":
    """Finds the objects of a few images, for the report."""
    from spairkit.data.datasets import open_dataset
    from spairkit.report.objects import MAX_IMAGES, write_objects

    dataset = open_dataset(run.config.data, "test", detector.device)
    total = min(len(dataset), MAX_IMAGES)
    with counted("images of the report", total, quiet=quiet) as show_done:
        detector.on_progress = show_done.search
        return write_objects(run.path, detector, dataset, show_done)


def _calibrate(run: "Run", device: "torch.device", *, quiet: bool) -> None:
    """Calibrates the search of the best checkpoint, where objects are known."""
    from spairkit.training.calibration import IMAGES, calibrate, calibrates

    if not calibrates(run):
        return
    total = min(run.config.data.validation_images, IMAGES)
    with counted("calibrating the search", total, quiet=quiet) as show_done, run.lock():
        calibrate(run, device, show_done)


def _announce(run: "Run", device: "torch.device", world: "World", *, resumed: bool) -> None:
    steps = run.config.train.steps
    processes = f" by {world.size} processes" if world.size > 1 else ""
    say(f"training in {run.path} on {device.type}{processes}, {steps} steps")
    if run.config.model.kind == "conncomp":
        say("connected components have no weights: each step tries one threshold")
    elif run.config.model.kind == "watershed":
        say("a watershed has no weights and nothing to fit: the only step saves it")
    elif run.config.train.select == "ap":
        say(f"the best checkpoint has the highest validation AP paper: {AUTHORS_RULE}")
    if run.config.search.mode != "off":
        say(
            "validations are quick, without the search; test figures are with it "
            f"(search.mode = '{run.config.search.mode}')"
        )
    if resumed and (saved := _last_step(run)):
        say(f"resuming from step {saved}: {max(steps - saved, 0)} of {steps} steps left")
    elif resumed:
        say("there is no checkpoint yet: starting at the first step")


def _last_step(run: "Run") -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return run.checkpoints[0][0] if run.checkpoints else 0


def looked(
    preset: str | None, over: list[Mapping[str, Any]], looks: "list[Survey]", *, quiet: bool
) -> list[dict[str, Any]]:
    """The settings that a look at the images of a folder proposes; none for generated scenes.

    Without `quiet` it says them.

    The look is added to `looks`.
    """
    from spairkit.config_values import merge
    from spairkit.survey import preparation

    given = merge(*over)
    chosen = preparation(given)
    # a preparation may need the contrast that is measured
    settings = options.resolved(preset, [{k: v for k, v in given.items() if k != "prepare"}])
    survey = _surveyed(settings, chosen, quiet=quiet)
    if survey is None:
        return []
    measured = survey.settings(settings.model, given)
    if not quiet:
        prepare = options.resolved(preset, [measured, *over]).prepare
        for line in survey.lines(prepare, chosen) + _replaced(measured, given):
            say(line)
        for doubt in survey.doubts():
            say(f"warning: {doubt}")
    looks.append(survey)
    return [measured]


def _replaced(measured: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Says which settings of the model and the search are the user's, not those of the look."""
    names = [
        f"{table}.{name}"
        for table in ("model", "search")
        for name, value in measured.get(table, {}).items()
        if given.get(table, {}).get(name, value) != value
    ]
    if not names:
        return []
    return [f"yours, in place of what the images call for: {', '.join(names)}"]


def _surveyed(
    settings: "Config", chosen: Mapping[str, Any] | None = None, *, quiet: bool
) -> "Survey | None":
    from spairkit.survey import survey_of

    with counted("looking at the images", 100, quiet=quiet) as show_done:
        return survey_of(settings, lambda share: show_done(round(100 * share)), chosen)


def _resumed(path: Path, preset: str | None, over: list[Mapping[str, Any]]) -> "Config":
    """The config of the run in the folder `path`, with `train.steps` and `data.path` as asked for.

    Raises:
        InputError: there is no run, another setting is asked for, or its images are not there.
    """
    from spairkit.config_values import from_dict, merge, model_kind, to_dict
    from spairkit.data.files import data_files, sha256_of_files
    from spairkit.storage.runs import Run, fixed_differences, recorded_data

    config = Run.open(path).config
    kind = model_kind(merge(*over))
    if kind not in (None, config.model.kind):
        raise InputError(
            f"--resume {path}: the model of this run is {config.model.kind}, not {kind}; remove "
            "--model, or start a new run"
        )
    asked = from_dict(merge(to_dict(config), *over, {"preset": preset} if preset else {}))
    if changes := fixed_differences(config, asked):
        raise InputError(
            f"--resume {path}: a run keeps its settings, but these differ: {'; '.join(changes)}; "
            "leave them out, or start a new run"
        )
    options.refuse_absent(asked.data)
    before = recorded_data(path)
    if before and asked.data.path != config.data.path:
        now = sha256_of_files(data_files(asked.data))
        if not set(before.values()) & set(now.values()):
            raise InputError(
                f"--resume {path}: none of the files in {asked.data.path} is one that the run was "
                "trained on; if these have moved, give their new place with --data, or start a new "
                "run"
            )
    return asked


def _print_next(run: "Run", page: Path, image: Path, *, has_truth: bool) -> None:
    """The path of the run, and two commands to copy."""
    from spairkit.report.page import next_commands

    first, second = next_commands(run, image, has_truth=has_truth)
    results().print(
        f"run: {run.path}\nreport: {page}\ntry next:\n  {first}\n  {second}", soft_wrap=True
    )


def _example(run: "Run") -> Path:
    """An image to look at: the first test scene, or the first readable image of the folder."""
    import torch

    from spairkit.data.datasets import open_dataset
    from spairkit.data.folder import ImageFolder
    from spairkit.images import write_png

    scenes = open_dataset(run.config.data, "test")
    if isinstance(scenes, ImageFolder):
        return scenes.files()[0][0]
    path = run.path / "example.png"
    write_png(path, scenes.batch(torch.zeros(1, dtype=torch.int64)).images[0])
    return path
