"""`spairkit sweep`: train with many randomly drawn settings and rank them."""

import json as json_module
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli import options
from spairkit.cli.console import json_text, print_json, results, say, table_of
from spairkit.cli.figures import AUTHORS_RULE, called
from spairkit.cli.train import Select, looked
from spairkit.cli.workers import WorkersOption, is_worker, resume_command, run_shared
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.sweeps.sweep import Sweep, Trial


def sweep(
    preset: options.PresetOption = None,
    model: options.ModelOption = None,
    data: options.DataOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    space: Annotated[
        Path | None,
        options.runs_option(
            help="TOML file with a list of choices or {low = A, high = B, log = true} for each "
            "key. Default: the priors on position and size."
        ),
    ] = None,
    trials: Annotated[int, options.runs_option(min=1, max=100_000, help="Trials in total.")] = 20,
    workers: WorkersOption = 1,
    out: Annotated[
        Path | None,
        options.output_option(
            help="Folder of the sweep, new or to resume. Default: ./runs/sweep-N."
        ),
    ] = None,
    seed: Annotated[
        int | None, options.runs_option(min=0, help="Seed of the drawn settings. Default: 0.")
    ] = None,
    select: Annotated[
        Select | None,
        options.runs_option(
            help="Rank by validation ELBO (elbo, the default, without labels) or AP paper (ap, "
            f"with labels): {AUTHORS_RULE}."
        ),
    ] = None,
    device: options.DeviceOption = options.Device.AUTO,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Train with many randomly drawn settings and rank them.

    Ctrl-C saves the current trial. Run the same command with --out to resume, or to add a
    process from another terminal or a machine that shares the folder.
    """
    over = options.layers(config, set_, data=data, model=model, select=select and select.value)
    chosen = options.choose_device(device)
    opened, resumed = _open(out, preset, over, space, seed, quiet=quiet)
    total = min(trials, opened.combinations or trials)
    if sum(trial.state != "running" for trial in opened.trials()) < total:
        options.refuse_absent(opened.config.data)
    if not is_worker():
        few = f"; the search space has only {total} combinations" if total < trials else ""
        say(
            f"{'resuming' if resumed else 'starting'} {opened.path} on {chosen.type}: {total} "
            f"trials, ranked by validation {called(opened.figure)}{few}"
        )
    words = ["sweep", "--out", str(opened.path), "--trials", str(trials)]
    signal = run_shared(
        lambda stop, busy: opened.work(total, chosen, stop, busy),
        total,
        workers,
        words,
        device,
        quiet=quiet,
    )
    if is_worker():
        return
    found = opened.trials()
    summary = _write(opened, found)
    finished = sum(trial.state != "running" for trial in found)
    if signal is not None:
        say(f"stopped after {finished} of {total} trials; to resume: {resume_command(*words)}")
        raise typer.Exit(128 + signal)
    if as_json:
        print_json(summary)
    else:
        _print_table(opened, found, summary)
    if finished < len(found):
        say(
            f"{finished} of {total} trials are finished, and other processes are running the "
            f"rest; for the final table: {resume_command(*words)}"
        )


def _open(
    out: Path | None,
    preset: str | None,
    over: list[Any],
    space: Path | None,
    seed: int | None,
    *,
    quiet: bool,
) -> "tuple[Sweep, bool]":
    """The sweep in the folder `out` or a new one, and whether it existed before.

    Raises:
        InputError: the requested settings are invalid, or differ from those of the sweep.
    """
    from spairkit.config_values import from_dict, merge, model_kind, to_dict
    from spairkit.data.datasets import open_dataset
    from spairkit.sweeps.search_space import default_space, load_space
    from spairkit.sweeps.sweep import Sweep

    found = Sweep.open(out) if out is not None else None
    if found is not None:
        own, kind = found.config.model.kind, model_kind(merge(*over))
        if kind not in (None, own):
            raise InputError(f"{out}: the model of this sweep is {own}, not {kind}")
        asked = from_dict(merge(to_dict(found.config), *over, {"preset": preset} if preset else {}))
        found.check(asked, load_space(space, asked) if space else None, seed)
        found.adopt(asked)
        return found, True
    measured = looked(preset, over, [], quiet=quiet)
    fixed: dict[str, Any] = {"train": {"retries": []}}  # a trial has the settings that were drawn
    config = options.resolved(preset, [*measured, fixed, *over])
    varied = load_space(space, config) if space else default_space(config)
    open_dataset(config.data, "train")  # before the folder is made, in case it fails
    if config.train.select == "ap" and not open_dataset(config.data, "validation").has_truth:
        raise InputError("--select ap needs annotations.json with the images; use --select elbo")
    return Sweep.create(out, config, varied, seed or 0), False


def _write(sweep: "Sweep", trials: "list[Trial]") -> dict[str, Any]:
    """Writes sweep.json and sweep.png to the sweep's folder; returns the content of sweep.json."""
    from dataclasses import asdict

    from spairkit.report.trials import trials_chart
    from spairkit.storage.durable import write_bytes, write_text
    from spairkit.sweeps.search_space import as_word, plain

    complete = [(trial.values, trial.figure) for trial in trials if trial.figure is not None]
    space = plain(sweep.space)
    log = {key for key, values in space.items() if isinstance(values, dict) and values["log"]}
    chart = trials_chart(complete, called(sweep.figure), log)
    path = sweep.path / "sweep.png"
    if chart:
        write_bytes(path, chart)
    best = trials[0] if complete else None
    summary: dict[str, Any] = {
        "sweep": str(sweep.path),
        "figure": sweep.figure,
        "seed": sweep.seed,
        "space": space,
        "chart": str(path) if chart else None,
        "trials": [asdict(trial) for trial in trials],
        "best": None,
    }
    if best:
        words = [as_word(key, value) for key, value in best.values.items()]
        summary["best"] = {
            "trial": best.number,
            "figure": best.figure,
            "set": words,
            "run": best.run,
        }
    write_text(sweep.path / "sweep.json", f"{json_text(summary)}\n")
    return summary


def _print_table(sweep: "Sweep", trials: "list[Trial]", summary: dict[str, Any]) -> None:
    keys = [key.partition(".")[2] for key in sweep.space]
    table = table_of(("trial", called(sweep.figure), "steps", *keys))
    for trial in trials:
        table.add_row(
            str(trial.number),
            trial.state if trial.figure is None else f"{trial.figure:.4f}",
            "" if trial.steps is None else str(trial.steps),
            *(_cell(trial.values[key]) for key in sweep.space),
        )
    console = results()
    console.print(table)
    if summary["chart"]:
        console.print(f"chart: {summary['chart']}", soft_wrap=True)
    if best := summary["best"]:
        words = " ".join(f"--set {shlex.quote(word)}" for word in best["set"])
        console.print(f"best: {words}", soft_wrap=True)
        console.print(f"run: {best['run']}", soft_wrap=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json_module.dumps(value)
