"""`spairkit compare`: SPAIR, AIR, DAIR and ConnComp by one ruler, and which of them to use."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli.console import json_text, print_json, progress_bar, results, say, several
from spairkit.cli.figures import AUTHORS_RULE, listed
from spairkit.cli.interrupts import Interrupts
from spairkit.cli.options import (
    DataOption,
    Device,
    DeviceOption,
    JsonOption,
    PresetOption,
    QuietOption,
    SetOption,
    choose_device,
)
from spairkit.errors import InputError

if TYPE_CHECKING:
    import torch

    from spairkit.experiments.settings import Settings
    from spairkit.experiments.table import Row


_LINE_EVERY_SECONDS = 10
_TITLES = {
    "ap": "AP (IoU .1 to .9, COCO matching)",
    "ap_spair": f"AP paper ({AUTHORS_RULE})",
    "count_accuracy": "count right (share of images)",
    "seconds": "seconds of training, and updates; for ConnComp, thresholds",
}


def compare(
    models: Annotated[
        str | None,
        typer.Option("--models", help="Some of spair,air,dair,conncomp. Default: all."),
    ] = None,
    objects: Annotated[
        str | None,
        typer.Option("--objects", help="Objects in every image. Default: 1,3,5,7,9."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", help="Runs of each, with seeds 0, 1, ... Default: 3.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="For each of the runs (60 by default, of a folder 6): updates, as 2000, or "
            "training time, as 90s, 3m or 1.5h, which becomes updates by the speed of a few. "
            "Default: the preset's updates.",
        ),
    ] = None,
    data: DataOption = None,
    preset: PresetOption = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The comparison's folder, new or begun, else runs/compare-N."),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, max=1024, help="Processes, of one CPU thread each.")
    ] = 1,
    device: DeviceOption = Device.AUTO,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train SPAIR, AIR, DAIR and ConnComp, measure them alike, and say which to use.

    Writes a table, figure.png beside the paper's figures, and results.json. Every run is a folder
    of its own, as `spairkit train` makes them. Ctrl-C saves; the same command with --out goes on,
    and helps from another terminal. --set MODEL.KEY=VALUE is for one model alone, as
    spair.model.what=24.
    """
    asked = _asked(models, objects, seeds, budget, data, preset, set_)
    chosen = choose_device(device)
    from spairkit.experiments.folder import is_finished

    folder, settings = _begin(out, asked)
    runs = several(len(settings.tasks()), "run")
    say(f"comparing in {folder} on {chosen.type}: {runs}, {settings.budget}")
    with Interrupts() as interrupts, _helpers(folder, workers - 1, device, interrupts):
        _follow(settings, folder, chosen, lambda: interrupts.number is not None, quiet=quiet)
    go_on = f"spairkit compare --out {shlex.quote(str(folder))}"
    if interrupts.number is not None:
        say(f"stopped, saved; go on with: {go_on}")
        raise typer.Exit(128 + interrupts.number)
    if not is_finished(settings, folder):
        say(f"the other runs are made by other processes; once they are done: {go_on}")
        return
    _conclude(settings, folder, json=json)


def _asked(
    models: str | None,
    objects: str | None,
    seeds: int | None,
    budget: str | None,
    data: str | None,
    preset: str | None,
    set_: list[str] | None,
) -> dict[str, Any]:
    """The settings that the options stand for; what was not given is absent."""
    from spairkit.config_values import assignments
    from spairkit.experiments.settings import parse_budget

    asked: dict[str, Any] = parse_budget(budget) if budget is not None else {}
    if models is not None:
        asked["models"] = models.split(",")
    if objects is not None:
        try:
            asked["objects"] = [int(word) for word in objects.split(",")]
        except ValueError:
            raise InputError(f"--objects {objects}: write numbers, as 1,3,5") from None
    if seeds is not None:
        asked["seeds"] = seeds
    if data is not None:
        from spairkit.data.datasets import data_settings

        asked["data"] = data_settings(data)["data"]
    if preset is not None:
        asked["preset"] = preset
    if set_:
        asked["over"] = assignments(set_)
    return asked


def _begin(out: Path | None, asked: dict[str, Any]) -> "tuple[Path, Settings]":
    """The comparison in the folder `out`, or a new one."""
    from spairkit.experiments.folder import begin, read_settings
    from spairkit.experiments.settings import MODELS, OBJECTS, settings_from
    from spairkit.experiments.settings import to_json as plain
    from spairkit.presets import DEFAULT
    from spairkit.storage.runs import next_folder

    before = read_settings(out) if out is not None else None
    if before is not None and out is not None:
        begin(out, settings_from({**plain(before), **asked}, "compare"))
        return out, before
    folder = asked.get("data", {}).get("name") == "folder"
    if folder and "objects" in asked:
        raise InputError("--objects: a folder's images hold what they hold; leave it out")
    if folder and "models" not in asked:
        say("AIR and DAIR take images of one size and are left out; --models names them")
    defaults = {
        "models": ["spair", "conncomp"] if folder else list(MODELS),
        "objects": [] if folder else list(OBJECTS),
        "seeds": 3,
        "preset": DEFAULT,
        "data": {},
        "over": {},
    }
    settings = settings_from({**defaults, **asked}, "compare")
    path = out or next_folder("compare")
    begin(path, settings)
    return path, settings


@contextmanager
def _helpers(folder: Path, number: int, device: Device, interrupts: Interrupts) -> Iterator[None]:
    """So many more processes that do the same in the same folder; waits for them at the end."""
    words = ["compare", "--out", str(folder), "--device", device.value, "--quiet"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "spairkit", *words],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for this process, which tells them once
        )
        for _ in range(number)
    ]
    try:
        yield
        while interrupts.number is None and any(process.poll() is None for process in started):
            time.sleep(0.1)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def _follow(
    settings: "Settings",
    folder: Path,
    device: "torch.device",
    stop: Callable[[], bool],
    *,
    quiet: bool,
) -> None:
    """Shows what happens while the runs are made."""
    from spairkit.experiments.compare import Finished, Probing, Started
    from spairkit.experiments.compare import compare as run_all
    from spairkit.training.loop import Step

    tasks = settings.tasks()
    finished, line_at = 0, 0.0
    with progress_bar(quiet=quiet) as bar:
        all_of_them = bar.add_task("runs", total=len(tasks), note="")
        current = bar.add_task("", total=None, visible=False, note="")
        name = ""

        def print_line(text: str) -> None:
            if not quiet:
                bar.console.print(text, soft_wrap=True)

        began = False
        for event in run_all(settings, folder, device, stop):
            if isinstance(event, Probing):
                print_line(f"{event.task.name}: measuring the speed")
            elif isinstance(event, Started):
                name, began, line_at = event.task.name, True, 0.0
                bar.reset(current, description=name, total=event.steps, visible=True)
                why = ", by the speed of a few" if event.measured else ""
                place = f"run {tasks.index(event.task) + 1} of {len(tasks)}"
                print_line(f"{place}: {name}, {several(event.steps, 'step')}{why}")
            elif isinstance(event, Step):
                bar.update(current, completed=event.step)
                if bar.disable and event.seconds - line_at >= _LINE_EVERY_SECONDS:
                    line_at = event.seconds
                    print_line(f"{name}: step {event.step} of {event.steps}")
            elif isinstance(event, Finished):
                finished += 1
                bar.update(all_of_them, completed=finished)
                if began:
                    names = ("ap", "ap_spair", "count_accuracy")
                    figures = {name: event.figures[name] for name in names}
                    print_line(f"{event.task.name}: {listed(figures)}")
                began = False


def _conclude(settings: "Settings", folder: Path, *, json: bool) -> None:
    """Writes table.txt, results.json and figure.png, and prints the table or the JSON."""
    from spairkit.experiments.picture import draw_comparison
    from spairkit.experiments.table import summary, tabulated
    from spairkit.storage.durable import write_bytes, write_text

    rows = tabulated(settings, folder)
    values = {"comparison": str(folder), **summary(settings, rows)}
    text = _written(settings, rows)
    dashed = "; dashed: the paper, on EMNIST digits" if rows[0].is_papers else ""
    note = f"{rows[0].measured_on}{_others(rows)}\n{_seeds(settings)}; {settings.budget}{dashed}"
    write_bytes(folder / "figure.png", draw_comparison(rows, note))
    write_text(folder / "results.json", f"{json_text(values)}\n")
    write_text(folder / "table.txt", text)
    if json:
        print_json(values)
    else:
        typer.echo(f"{text}\nthe same in {folder}: table.txt, figure.png, results.json, runs/")


def _seeds(settings: "Settings") -> str:
    many = f"{settings.seeds} seeds, means and 95 % t-intervals"
    return many if settings.seeds > 1 else "one seed"


def _written(settings: "Settings", rows: "list[Row]") -> str:
    """A table for each figure, with a line for each number of objects; then the advice."""
    from rich import box
    from rich.table import Table

    from spairkit.experiments.settings import MODELS
    from spairkit.experiments.table import advice, told_models

    console = results()
    with console.capture() as captured:
        console.print(
            f"{rows[0].measured_on}{_others(rows)}\nbudget: {settings.budget}; {_seeds(settings)}",
            soft_wrap=True,
        )
        for name, title in _TITLES.items():
            table = Table("objects", box=box.SIMPLE_HEAD, pad_edge=False)
            for model in settings.models:
                table.add_column(MODELS[model], justify="right")
            for row in rows:
                number = "all" if row.objects is None else str(row.objects)
                table.add_row(number, *(_cell(row, model, name) for model in settings.models))
            if name == "ap_spair" and rows[0].is_papers:
                title += "; in brackets what the paper published, on EMNIST digits"
            if name == "count_accuracy" and (told := told_models(rows)):
                title += f"; {told} told the count"
            console.print(f"\n{title}", soft_wrap=True)
            console.print(table)
        for line in advice(rows):
            console.print(f"- {line}", soft_wrap=True)
    return captured.get()


def _others(rows: "list[Row]") -> str:
    numbers = ", ".join(str(row.objects) for row in rows[1:])
    return f"; likewise {numbers} glyphs" if numbers else ""


def _cell(row: "Row", model: str, name: str) -> str:
    """A figure and its interval; below AP paper, what the paper published."""
    from spairkit.experiments.table import shown

    cell = row.cells[model]
    if name == "seconds":
        return "-" if cell.seconds is None else f"{cell.seconds:.0f} ({cell.steps})"
    text = shown(cell.figures[name])
    published = row.published(model)
    return f"{text}\n({published.mean:.3f})" if published and name == "ap_spair" else text
