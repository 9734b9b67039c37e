"""`spairkit experiment`: an experiment of the paper, from data to picture and table."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spairkit.cli import options
from spairkit.cli.console import echo, json_text, print_json, results, say, several, table_of
from spairkit.cli.workers import WorkersOption, is_worker, resume_command, run_shared

if TYPE_CHECKING:
    from spairkit.experiments.experiment import Conclusion
    from spairkit.experiments.picture import Chart

_WIDTH = 160


class Scale(StrEnum):
    """How much an experiment does."""

    SMOKE = "smoke"
    CPU = "cpu"
    FULL = "full"


def experiment(
    name: Annotated[
        str | None, typer.Argument(help="The experiment. Without it, all are listed.")
    ] = None,
    scale: Annotated[
        Scale | None,
        options.runs_option(
            help="smoke: a test of under a minute with tiny networks; cpu (default): a result "
            "in 3 to 16 minutes of CPU time; full: the paper's protocol, for a GPU."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        options.runs_option(
            min=1, max=1000, help="Runs of each neural model. Default: by experiment and scale."
        ),
    ] = None,
    data: Annotated[
        str | None,
        options.data_option(
            metavar="FILE",
            help="An MNIST file (EMNIST, if its name says emnist). Default: the digits that ship "
            "with spairkit.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        options.output_option(
            help="Folder of the experiment, new or to resume. Default: ./runs/NAME-N."
        ),
    ] = None,
    workers: WorkersOption = 1,
    device: options.DeviceOption = options.Device.AUTO,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Repeat an experiment of the paper, and draw the published results beside ours.

    Writes figure.png, table.txt and results.json. Ctrl-C saves. Run the same command with --out to
    resume, or to add a process from another terminal.
    """
    from spairkit.experiments.picture import draw_charts
    from spairkit.experiments.work import (
        EXPERIMENTS,
        carry_out,
        concluded,
        is_measured,
        open_experiment,
    )
    from spairkit.storage.durable import write_bytes, write_text

    if name is None:
        if as_json:
            print_json({key: item.about for key, item in EXPERIMENTS.items()})
        else:
            width = max(map(len, EXPERIMENTS)) + 2
            echo("\n".join(f"{key:<{width}}{item.about}" for key, item in EXPERIMENTS.items()))
        return
    chosen = options.choose_device(device)
    size = None if scale is None else scale.value
    found, settings, folder, trials = open_experiment(name, out, scale=size, seeds=seeds, data=data)
    if not all(is_measured(trial, folder) for trial in trials):
        options.refuse_absent(trials[0].config.data)
    if not is_worker():
        say(
            f"{name} in {folder} on {chosen.type}, scale {settings.scale}: "
            f"{several(len(trials), 'run')}"
        )
    words = ["experiment", name, "--out", str(folder)]
    signal = run_shared(
        lambda stop, busy: carry_out(trials, folder, chosen, stop, busy),
        len(trials),
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
    if not all(is_measured(trial, folder) for trial in trials):
        say(f"other processes are running the rest; for the table: {resume_command(*words)}")
        return
    conclusion, heading, values = concluded(found, settings, folder, trials)
    text = _text(conclusion, heading)
    draw = conclusion.picture or (lambda note: draw_charts(conclusion.charts, note))
    write_bytes(folder / "figure.png", draw(heading))
    write_text(folder / "results.json", f"{json_text(values)}\n")
    write_text(folder / "table.txt", text)
    if as_json:
        print_json(values)
    else:
        echo(f"{text}\nwritten to {folder}: table.txt, figure.png, results.json, runs/")


def _text(conclusion: "Conclusion", heading: str) -> str:
    """A table for each chart, then the trends."""
    console = results(_WIDTH)
    with console.capture() as captured:
        console.print(heading, soft_wrap=True)
        for chart in conclusion.charts:
            paper = any(line.published for line in chart.lines)
            note = "; in brackets: the paper" if paper else ""
            console.print(f"\n{chart.title}{note}", soft_wrap=True)
            table = table_of((line.name for line in chart.lines), first=chart.x_label)
            for x in chart.lines[0].ours:
                table.add_row(str(x), *_row(chart, x))
            console.print(table)
        for line in conclusion.trends:
            console.print(f"- {line}", soft_wrap=True)
    return captured.get()


def _row(chart: "Chart", x: object) -> list[str]:
    """Our mean and interval on each line, and the published mean below it."""
    cells = []
    for line in chart.lines:
        paper = line.published.get(x)
        cells.append(f"{line.ours[x]}" + (f"\n({paper.mean:.3f})" if paper else ""))
    return cells
