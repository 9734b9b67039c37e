"""`spairkit compare`: train and evaluate several models on the same images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli import options
from spairkit.cli.console import echo, json_text, print_json, results, say, several, table_of
from spairkit.cli.figures import AUTHORS_RULE
from spairkit.cli.workers import WorkersOption, is_worker, resume_command, run_shared
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.experiments.folder import Comparison
    from spairkit.experiments.intervals import Interval
    from spairkit.experiments.settings import Settings
    from spairkit.experiments.table import Cell, Row

_TITLES = {
    "ap": "AP (IoU .1 to .9, COCO matching)",
    "ap_spair": f"AP paper ({AUTHORS_RULE})",
    "count_accuracy": "count right (share of images)",
    "seconds": "seconds of training (updates; for ConnComp, thresholds)",
}
_FOLDER_WIDTH = 120
_FOLDER_NAMES = {"ap": "AP", "ap50": "AP50", "f1": "F1", "count_error": "count error"}


def compare(
    models: Annotated[
        str | None,
        options.runs_option(
            help="Some of spair,air,dair,conncomp,watershed. Default: the first four; for a folder "
            "spair,watershed,conncomp."
        ),
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
            "default, 5 for a folder). Time is converted to updates after timing a few. "
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
    """Train several models on digits or on your images, compare them, and recommend one.

    Writes a table, results.json and a picture: on digits a chart with the paper's results, on a
    folder a few images with the boxes of each model. A folder needs no annotations. Each run is
    a folder like those of `spairkit train`. Ctrl-C saves. Run the same command with --out to
    resume, or to add a process from another terminal. --set MODEL.KEY=VALUE applies to one model
    only, such as spair.model.what=24.
    """
    from spairkit.config_values import assignments, merge
    from spairkit.data.datasets import data_settings
    from spairkit.experiments.compare import compare as run_all
    from spairkit.experiments.compare import is_evaluated
    from spairkit.experiments.settings import config_of, open_comparison
    from spairkit.storage.durable import write_bytes, write_text

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

    def show(lines: list[str]) -> None:
        for line in () if quiet or is_worker() else lines:
            say(line)

    folder, settings = open_comparison(out, asked, show)
    tasks = settings.tasks()
    left = [task for task in tasks if not is_evaluated(settings, folder / "runs" / task.name)]
    if left or settings.is_folder:  # whose picture shows images
        options.refuse_absent(config_of(settings, tasks[0]).data)
    if not is_worker():
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
    if not all(is_evaluated(settings, folder / "runs" / task.name) for task in tasks):
        say(f"other processes are running the rest; for the table: {resume_command(*words)}")
        return
    conclude = _on_folder if settings.is_folder else _on_digits
    values, text, picture = conclude(settings, folder)
    values = {"comparison": str(folder), **values}
    write_bytes(folder / "figure.png", picture)
    write_text(folder / "results.json", f"{json_text(values)}\n")
    write_text(folder / "table.txt", text)
    if as_json:
        print_json(values)
    else:
        echo(f"{text}\nwritten to {folder}: table.txt, figure.png, results.json, runs/")


def _on_digits(settings: "Settings", folder: Path) -> tuple[dict[str, Any], str, bytes]:
    """The content of results.json, of table.txt and of figure.png."""
    from spairkit.experiments.picture import draw_comparison
    from spairkit.experiments.table import summary, tabulate

    rows = tabulate(settings, folder)
    more = ", ".join(str(row.objects) for row in rows[1:])
    spair = rows[0].models.get("spair")
    search = f"; SPAIR's search: {spair.search}" if spair else ""
    heading = (
        f"{rows[0].measured_on}{f'; also {more} glyphs' if more else ''}\n"
        f"{_seeds(settings)}; {settings.described_budget()}{search}"
    )
    return (
        summary(settings, rows),
        _table(settings, rows, heading),
        draw_comparison(rows, heading),
    )


def _on_folder(settings: "Settings", folder: Path) -> tuple[dict[str, Any], str, bytes]:
    """The same for a folder of images."""
    from spairkit.experiments.folder import folder_summary, runs_of, tabulate_folder
    from spairkit.experiments.settings import WITHOUT_WEIGHTS
    from spairkit.experiments.side_by_side import draw_folder

    runs = runs_of(settings, folder)
    result = tabulate_folder(settings, runs)
    heading = result.measured_on
    if result.methods.keys() - set(WITHOUT_WEIGHTS):
        heading += f"\n{_seeds(settings)}; {settings.described_budget()}"
    if "spair" in result.methods:
        heading += f"; SPAIR's search: {result.methods['spair'].search}"
    return (
        folder_summary(settings, result),
        _folder_table(result, heading),
        draw_folder(settings, runs, heading),
    )


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
                table.add_row(
                    str(row.objects), *(_cell(row.models[model], name) for model in settings.models)
                )
            console.print(f"\n{title}{notes.get(name, '')}", soft_wrap=True)
            console.print(table)
        for line in advice(rows):
            console.print(f"- {line}", soft_wrap=True)
    return captured.get()


def _seeds(settings: "Settings") -> str:
    if settings.seeds == 1:
        return "one seed"
    return f"{settings.seeds} seeds, means and 95 % t-intervals"


def _folder_table(result: "Comparison", heading: str) -> str:
    """A line for each model, the agreement between them, and the advice."""
    from spairkit.experiments.folder import folder_advice
    from spairkit.experiments.found import FIGURES
    from spairkit.experiments.settings import MODELS

    console = results(_FOLDER_WIDTH)
    figures = FIGURES if result.annotated else ()
    names = [_FOLDER_NAMES[name] for name in figures]
    with console.capture() as captured:
        console.print(heading, soft_wrap=True)
        known = f"; {result.objects} in {result.annotated} annotated" if result.annotated else ""
        console.print(f"\nobjects in {several(result.images, 'image')}{known}", soft_wrap=True)
        table = table_of(("found", "per image", *names, "seconds"), first="model")
        for model, method in result.methods.items():
            seconds = "-" if method.seconds is None else f"{method.seconds:.0f}"
            table.add_row(
                MODELS[model],
                _number(method.found),
                f"{method.found.mean / result.images:.1f}",
                *(str(method.figures[name]) for name in figures),
                seconds,
            )
        console.print(table)
        console.print("agreement (F1 at IoU .5 of one model's boxes against another's)")
        table = table_of((MODELS[model] for model in result.methods), first="model")
        for one, row in result.agreement.items():
            cells = (f"{row[two]:.2f}" if two in row else "-" for two in result.methods)
            table.add_row(MODELS[one], *cells)
        console.print(table)
        for line in folder_advice(result):
            console.print(f"- {line}", soft_wrap=True)
    return captured.get()


def _number(found: "Interval") -> str:
    half_width = f" ± {found.high - found.mean:.0f}" if len(found.values) > 1 else ""
    return f"{found.mean:.0f}{half_width}"


def _cell(cell: "Cell", name: str) -> str:
    if name == "seconds":
        return "-" if cell.seconds is None else f"{cell.seconds:.0f} ({cell.steps})"
    paper = cell.published_ap_spair if name == "ap_spair" else None
    return f"{cell.figures[name]}" + (f"\n({paper.mean:.3f})" if paper else "")
