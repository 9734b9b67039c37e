"""`spairkit sweep`: many runs with settings drawn at random, and which were best."""

import json as json_module
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli.console import json_text, print_json, progress_bar, results, say
from spairkit.cli.figures import AUTHORS_RULE, called
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
    layers,
)
from spairkit.cli.train import Select
from spairkit.errors import InputError

if TYPE_CHECKING:
    import torch

    from spairkit.sweeps.sweep import Ended, Progress, Sweep, Trial

PICTURE = "sweep.png"


def sweep(
    preset: PresetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    space: Annotated[
        Path | None,
        typer.Option(
            "--space",
            help="TOML file: for each key a list of choices, or {low = A, high = B, log = true}. "
            "Default: the priors on position and size.",
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option("--trials", min=1, max=100_000, help="Runs to complete in all.")
    ] = 20,
    workers: Annotated[
        int,
        typer.Option("--workers", min=1, max=1024, help="Processes, of one CPU thread if several."),
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The sweep's folder, new or begun, else ./runs/sweep-N."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="URL",
            help="SQL database for machines that share no folder, as "
            "postgresql://user@host/name. Default: a journal file in --out.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of the settings drawn. Default: 0.")
    ] = None,
    select: Annotated[
        Select | None,
        typer.Option(
            "--select",
            help="Best is the highest validation ELBO (elbo, the default, without labels) or AP "
            f"paper (ap, with labels): {AUTHORS_RULE}.",
        ),
    ] = None,
    device: DeviceOption = Device.AUTO,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train many times with settings drawn at random, and say which were best.

    The same command goes on with its folder, and helps it from another terminal or machine.
    Ctrl-C saves the trial in progress.
    """
    from spairkit.data.datasets import data_settings

    options: dict[str, Any] = data_settings(data) if data else {}
    if model:
        options["model"] = {"kind": model}
    if select:
        options["train"] = {"select": select.value}
    over = layers(config, options, set_)
    if storage is not None and out is None:
        raise InputError("--storage needs --out: its name is that of the sweep in the database")
    chosen = choose_device(device)
    begun = _begun(out, storage, preset, over, space, seed)
    opened = begun or _begin(out, storage, preset, over, space, seed)
    say(
        f"{'going on with' if begun else 'sweeping in'} {opened.path} on {chosen.type}: "
        f"{trials} trials, compared by validation {called(opened.figure)}"
    )
    with Interrupts() as interrupts:
        _work(opened, trials, workers, chosen, lambda: interrupts.number is not None, quiet=quiet)
    found = opened.trials()
    summary = _write(opened, found)
    done = sum(trial.state in ("complete", "failed") for trial in found)
    words = f"--out {shlex.quote(str(opened.path))}"
    if storage is not None:
        words += " --storage URL"
    go_on = f"spairkit sweep {words} --trials {trials}"
    if interrupts.number is not None:
        say(f"stopped with {done} of {trials} trials done; go on with: {go_on}")
        raise typer.Exit(128 + interrupts.number)
    if json:
        print_json(summary)
    else:
        _print_table(opened, found, summary)
    if done < trials:
        running = sum(trial.state == "running" for trial in found)
        where = f"{running} run in other processes" if running else "their processes have died"
        say(f"{done} of {trials} trials are done, {where}; go on with: {go_on}")
        raise typer.Exit(0 if running else 1)


def _begun(
    out: Path | None,
    storage: str | None,
    preset: str | None,
    over: list[Any],
    space: Path | None,
    seed: int | None,
) -> "Sweep | None":
    """The sweep that is in the folder or the database already; what is asked for must be its own.

    Raises:
        InputError: it is not.
    """
    from spairkit.config_values import from_dict, merge, model_kind, to_dict
    from spairkit.sweeps.search_space import load_space
    from spairkit.sweeps.sweep import Sweep

    found = Sweep.find(out, storage) if out is not None else None
    if found is not None:
        own = found.definition.config
        kind = model_kind(merge(*over))
        if kind not in (None, own.model.kind):
            raise InputError(f"{found.path}: its model is {own.model.kind}, not {kind}")
        asked = from_dict(merge(to_dict(own), *over, {"preset": preset} if preset else {}))
        found.check(asked, load_space(space, asked) if space else None, seed)
    return found


def _begin(
    out: Path | None,
    storage: str | None,
    preset: str | None,
    over: list[Any],
    space: Path | None,
    seed: int | None,
) -> "Sweep":
    from spairkit.data.datasets import open_dataset
    from spairkit.presets import resolve
    from spairkit.sweeps.search_space import default_space, load_space
    from spairkit.sweeps.study import Definition
    from spairkit.sweeps.sweep import Sweep

    settings = resolve(choose_preset(preset, over), *over)
    tried = load_space(space, settings) if space else default_space(settings)
    # what is wrong with the data shows before a folder is made
    open_dataset(settings.data, "train")
    if settings.train.select == "ap" and not open_dataset(settings.data, "validation").has_truth:
        raise InputError("--select ap needs annotations.json with the images; use --select elbo")
    return Sweep.create(out, storage, Definition(settings, tried, seed or 0))


def _work(
    sweep: "Sweep",
    trials: int,
    workers: int,
    device: "torch.device",
    stop: Callable[[], bool],
    *,
    quiet: bool,
) -> None:
    """Shows what happens while the trials are made."""
    from spairkit.sweeps.processes import work_in_processes
    from spairkit.sweeps.sweep import Ended, Progress

    with progress_bar(quiet=quiet) as bar:
        tasks: dict[int, Any] = {}

        def show(event: "Progress | Ended | int") -> None:
            if isinstance(event, Progress):
                if event.trial not in tasks:
                    name = f"trial {event.trial}"
                    tasks[event.trial] = bar.add_task(name, total=event.steps, note="")
                bar.update(tasks[event.trial], completed=event.step)
                return
            if isinstance(event, Ended) and event.trial in tasks:
                bar.remove_task(tasks.pop(event.trial))
            if not quiet:
                bar.console.print(_told(event, sweep.figure), soft_wrap=True)

        if workers == 1:
            sweep.work(trials, device, stop, show)
            return
        for event in work_in_processes(sweep, trials, device, workers, stop):
            show(event)


def _told(event: "Ended | int", figure: str) -> str:
    if isinstance(event, int):
        return f"a process has died (status {event}); its trial will be gone on with"
    if event.error:
        return f"trial {event.trial}: failed: {event.error}"
    if event.figure is None:
        return f"trial {event.trial}: stopped and saved"
    return f"trial {event.trial}: {called(figure)} {event.figure:.4f}"


def _write(sweep: "Sweep", trials: "list[Trial]") -> dict[str, Any]:
    """The results as JSON and as a picture in the sweep's folder; gives those for JSON."""
    from dataclasses import asdict

    from spairkit.report.trials import trials_chart
    from spairkit.storage.durable import write_bytes, write_text
    from spairkit.sweeps.search_space import Range, as_word
    from spairkit.sweeps.sweep import RESULTS

    complete = [(trial, trial.figure) for trial in trials if trial.figure is not None]
    space = sweep.definition.space.settings
    picture = trials_chart(
        [trial.values for trial, _ in complete],
        [figure for _, figure in complete],
        called(sweep.figure),
        frozenset(key for key, s in space.items() if isinstance(s, Range) and s.log),
    )
    if picture:
        write_bytes(sweep.path / PICTURE, picture)
    best = complete[0][0] if complete else None
    summary = {
        "sweep": str(sweep.path),
        "figure": sweep.figure,
        "seed": sweep.definition.seed,
        "space": sweep.definition.space.to_dict(),
        "picture": str(sweep.path / PICTURE) if picture else None,
        "trials": [asdict(trial) for trial in trials],
        "best": {
            "trial": best.number,
            "figure": best.figure,
            "set": [as_word(key, value) for key, value in best.values.items()],
            "run": best.run,
        }
        if best
        else None,
    }
    write_text(sweep.path / RESULTS, f"{json_text(summary)}\n")
    return summary


def _print_table(sweep: "Sweep", trials: "list[Trial]", summary: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    keys = list(sweep.definition.space.settings)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("trial", called(sweep.figure), "steps", *(key.partition(".")[2] for key in keys)):
        table.add_column(name, justify="right")
    for trial in trials:
        table.add_row(
            str(trial.number),
            trial.state if trial.figure is None else f"{trial.figure:.4f}",
            "" if trial.steps is None else str(trial.steps),
            *(_cell(trial.values[key]) for key in keys),
        )
    console = results()
    console.print(table)
    if summary["picture"]:
        console.print(f"picture: {summary['picture']}", soft_wrap=True)
    best = summary["best"]
    if best:
        words = " ".join(f"--set {shlex.quote(word)}" for word in best["set"])
        console.print(f"best: {words}", soft_wrap=True)
        console.print(f"run: {best['run']}", soft_wrap=True)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json_module.dumps(value)
