"""`spairkit compare`: train and evaluate SPAIR, AIR, DAIR and ConnComp under one protocol."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spairkit.cli import options
from spairkit.cli.console import json_text, print_json, results, say, several, table_of
from spairkit.cli.figures import AUTHORS_RULE
from spairkit.cli.workers import WorkersOption, is_worker, resume_command, run_shared
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.experiments.settings import Settings
    from spairkit.experiments.table import Cell, Row

_TITLES = {
    "ap": "AP (IoU .1 to .9, COCO matching)",
    "ap_spair": f"AP paper ({AUTHORS_RULE})",
    "count_accuracy": "count right (share of images)",
    "seconds": "seconds of training (updates; for ConnComp, thresholds)",
}


def compare(
    models: Annotated[
        str | None, options.runs_option(help="Some of spair,air,dair,conncomp. Default: all.")
    ] = None,
    objects: Annotated[
        str | None, options.runs_option(help="Numbers of objects per image. Default: 1,3,5,7,9.")
    ] = None,
    seeds: Annotated[
        int | None, options.runs_option(help="Runs per model and number of objects. Default: 3.")
    ] = None,
    budget: Annotated[
        str | None,
        options.runs_option(
            help="Updates (2000) or training time (90s, 3m, 1.5h) for each of the runs (60 by "
            "default, 6 for a folder). Time is converted to updates after timing a few. "
            "Default: the preset's updates."
        ),
    ] = None,
    data: options.DataOption = None,
    preset: options.PresetOption = None,
    set_: options.SetOption = None,
    search: options.SearchOption = None,
    out: Annotated[
        Path | None,
        options.output_option(
            help="Folder of the comparison, new or to resume. Default: ./runs/compare-N."
        ),
    ] = None,
    workers: WorkersOption = 1,
    device: options.DeviceOption = options.Device.AUTO,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Train and evaluate SPAIR, AIR, DAIR and ConnComp under one protocol; recommend one.

    Writes a table, results.json, and a chart that shows the paper's results as well. Each run is
    a folder like those of `spairkit train`. Ctrl-C saves. Run the same command with --out to
    resume, or to add a process from another terminal. --set MODEL.KEY=VALUE applies to one model
    only, such as spair.model.what=24.
    """
    from spairkit.config_values import assignments, merge
    from spairkit.data.datasets import data_settings
    from spairkit.experiments.compare import compare as run_all
    from spairkit.experiments.compare import is_evaluated
    from spairkit.experiments.settings import open_comparison

    try:
        numbers = [int(word) for word in objects.split(",")] if objects else None
    except ValueError:
        raise InputError(f"--objects {objects}: write numbers, as 1,3,5") from None
    chosen_models = models.split(",") if models else None
    if search is not None and "spair" not in (chosen_models or ("spair",)):
        raise InputError(f"--search {search.value}: only SPAIR has a search; add spair to --models")
    mode = {} if search is None else {"spair": {"search": {"mode": search.value}}}
    given = {
        "models": chosen_models,
        "objects": numbers,
        "seeds": seeds,
        "budget": budget,
        "preset": preset,
        "over": merge(data_settings(data) if data else {}, mode, assignments(set_ or ())),
    }
    asked = {name: value for name, value in given.items() if value is not None}
    chosen = options.choose_device(device)
    folder, settings = open_comparison(out, asked)
    tasks = settings.tasks()
    if not is_worker():
        if not settings.objects and models is None and "air" not in settings.models:
            say("AIR and DAIR need images of one size and are left out; --models can add them")
        say(
            f"comparing in {folder} on {chosen.type}: {several(len(tasks), 'run')}, "
            f"{settings.described_budget()}"
        )
    words = ["compare", "--out", str(folder)]
    signal = run_shared(
        lambda stop, busy: run_all(settings, folder, chosen, stop, busy),
        len(tasks),
        workers,
        words,
        device,
        quiet=quiet,
    )
    if is_worker():
        return
    if signal is not None:
        say(f"stopped and saved; to resume: {resume_command(*words)}")
        raise typer.Exit(128 + signal)
    if not all(is_evaluated(folder / "runs" / task.name) for task in tasks):
        say(f"other processes are running the rest; for the table: {resume_command(*words)}")
        return
    _conclude(settings, folder, as_json=as_json)


def _conclude(settings: "Settings", folder: Path, *, as_json: bool) -> None:
    """Writes table.txt, results.json and figure.png, and prints the table or the JSON."""
    from spairkit.experiments.picture import draw_comparison
    from spairkit.experiments.table import summary, tabulate
    from spairkit.storage.durable import write_bytes, write_text

    rows = tabulate(settings, folder)
    more = ", ".join(str(row.objects) for row in rows[1:])
    seeds = f"{settings.seeds} seeds, means and 95 % t-intervals"
    spair = rows[0].models.get("spair")
    search = f"; SPAIR's search: {spair.search}" if spair else ""
    heading = (
        f"{rows[0].measured_on}{f'; also {more} glyphs' if more else ''}\n"
        f"{seeds if settings.seeds > 1 else 'one seed'}; {settings.described_budget()}{search}"
    )
    values = {"comparison": str(folder), **summary(settings, rows)}
    text = _table(settings, rows, heading)
    write_bytes(folder / "figure.png", draw_comparison(rows, heading))
    write_text(folder / "results.json", f"{json_text(values)}\n")
    write_text(folder / "table.txt", text)
    if as_json:
        print_json(values)
    else:
        typer.echo(f"{text}\nwritten to {folder}: table.txt, figure.png, results.json, runs/")


def _table(settings: "Settings", rows: "list[Row]", heading: str) -> str:
    """A table for each figure, with a line for each number of objects; then the advice."""
    from spairkit.experiments.settings import MODELS
    from spairkit.experiments.table import advice, models_given_counts

    given = models_given_counts(rows)
    published = any(cell.published_ap_spair for row in rows for cell in row.models.values())
    notes = {
        "ap_spair": "; in brackets: the paper, on EMNIST digits" if published else "",
        "count_accuracy": f"; {given} given the count" if given else "",
    }
    console = results()
    with console.capture() as captured:
        console.print(heading, soft_wrap=True)
        for name, title in _TITLES.items():
            table = table_of((MODELS[model] for model in settings.models), first="objects")
            for row in rows:
                label = "all" if row.objects is None else str(row.objects)
                table.add_row(label, *(_cell(row.models[model], name) for model in settings.models))
            console.print(f"\n{title}{notes.get(name, '')}", soft_wrap=True)
            console.print(table)
        for line in advice(rows):
            console.print(f"- {line}", soft_wrap=True)
    return captured.get()


def _cell(cell: "Cell", name: str) -> str:
    if name == "seconds":
        return "-" if cell.seconds is None else f"{cell.seconds:.0f} ({cell.steps})"
    paper = cell.published_ap_spair if name == "ap_spair" else None
    return f"{cell.figures[name]}" + (f"\n({paper.mean:.3f})" if paper else "")
