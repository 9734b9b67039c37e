"""`spairkit bench train` and `bench time-to-ap`: training, beside plain torch and the paper."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli.console import progress_bar, results, say, several
from spairkit.cli.figures import AUTHORS_RULE, called, listed
from spairkit.cli.interrupts import Interrupts
from spairkit.cli.ledger import recorded
from spairkit.cli.options import (
    ConfigOption,
    DataOption,
    Device,
    DeviceOption,
    JsonOption,
    LedgerOption,
    PresetOption,
    QuietOption,
    SetOption,
    ThreadsOption,
    choose_device,
    choose_preset,
    layers,
)
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.benchmarks.steps import Figure, Progress
    from spairkit.benchmarks.targets import Attempt

_REDRAW_SECONDS = 0.2
_TABLE_WIDTH = 100


def bench_train(
    preset: Annotated[
        list[str] | None,
        typer.Option(
            "--preset", help="quick, laptop or paper; repeatable. Default: quick and paper."
        ),
    ] = None,
    set_: SetOption = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            "--batch",
            min=1,
            max=65536,
            help="Images in an update; repeatable. Default: 32; on a GPU 32, 256 and 1024.",
        ),
    ] = None,
    cells: Annotated[
        list[int] | None,
        typer.Option(
            "--cells",
            min=1,
            max=64,
            help="Grid cells along each side of an image; repeatable. Default: 4 (4 x 4 cells).",
        ),
    ] = None,
    device: DeviceOption = Device.AUTO,
    threads: ThreadsOption = None,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds",
            min=0.0,
            help="Seconds for each preset, batch and number of cells, at least.",
        ),
    ] = 10.0,
    ledger: LedgerOption = Path("benchmarks.jsonl"),
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Time an update of SPAIR's training and its parts, beside a plain torch version of the same.

    Nothing is timed unless both have the same losses and gradients.
    """
    import torch

    from spairkit.benchmarks.steps import Case, run
    from spairkit.benchmarks.timing import machine
    from spairkit.config_values import assignments
    from spairkit.presets import DEFAULT, resolve

    chosen = choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    over = assignments(set_ or [])
    if "batch_size" in over.get("train", {}):
        raise InputError("--set train.batch_size: here the batch is given by --batch")
    configs = [resolve(name, over) for name in preset or (DEFAULT, "paper")]
    batches = batch or ([32, 256, 1024] if chosen.type == "cuda" else [32])
    cases = [
        Case(config=config, batch=size, cells=side)
        for config in configs
        for size in batches
        for side in cells or [4]
    ]
    about = {"benchmark": "train", **machine(chosen), "set": set_ or []}
    with (
        recorded(about, _print_figures, ledger, json=json) as figures,
        _progress(quiet=quiet) as (report, print_line),
    ):
        print_line(f"checking and timing {several(len(cases), 'case')} on {chosen.type}")
        for figure in run(cases, chosen, seconds, report):
            figures.append(figure)
            print_line(f"{_case(figure)}: {figure.way} {_ms(figure.step_ms) or figure.note}")


@contextmanager
def _progress(
    *, quiet: bool
) -> "Iterator[tuple[Callable[[Progress], None], Callable[[str], None]]]":
    """Functions that show how far the benchmark is, and that print a line above that.

    Without a terminal a line says what begins.
    """
    with progress_bar(quiet=quiet, auto_refresh=False) as bar:
        task = bar.add_task("", total=None, note="")
        shown, shown_at = "", 0.0

        def print_line(text: str) -> None:
            if not quiet:
                bar.console.print(text, soft_wrap=True)

        def report(progress: "Progress") -> None:
            nonlocal shown, shown_at
            case = progress.case
            name = f"{case.config.preset} {case.batch}x{case.cells**2}: {progress.doing}"
            begins = name != shown
            if begins and bar.disable:
                print_line(name)
            if begins:
                bar.reset(task, description=name, total=progress.total)
            elif monotonic() - shown_at < _REDRAW_SECONDS:
                return
            shown, shown_at = name, monotonic()
            bar.update(task, completed=progress.done, refresh=True)

        yield report, print_line


def time_to_ap(
    preset: PresetOption = None,
    data: DataOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    ap: Annotated[
        float | None,
        typer.Option(
            "--ap",
            min=0.0,
            max=1.0,
            help="The AP to reach. Default: what the paper published for data.max_objects.",
        ),
    ] = None,
    count_accuracy: Annotated[
        float | None,
        typer.Option(
            "--count-accuracy",
            min=0.0,
            max=1.0,
            help="Share of images that must be counted right too. Default: any.",
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            "--every",
            min=1,
            help="Updates between validations, which show it. Default: the preset's.",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="How many trainings; their seeds are 0, 1, ...")
    ] = 3,
    device: DeviceOption = Device.AUTO,
    threads: ThreadsOption = None,
    ledger: LedgerOption = Path("benchmarks.jsonl"),
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure the minutes until training first reaches an AP on validation images, over seeds.

    The AP is AP paper: the rule of the SPAIR authors' code. A seed fails that has not reached it
    when its preset's training ends. Ctrl-C ends and keeps what was measured, the seed under way as
    broken off. Exit status: 0 if a seed succeeded, 2 if none.
    """
    from spairkit.benchmarks.targets import attempts, check_truth, paper_target, success_rate
    from spairkit.benchmarks.timing import machine
    from spairkit.presets import resolve

    chosen = choose_device(device)
    from spairkit.data.datasets import data_settings

    options: dict[str, Any] = data_settings(data) if data else {}
    loop = {"validation_every": every, "threads": threads}
    options["train"] = {name: value for name, value in loop.items() if value is not None}
    over = layers(config, options, set_)
    settings = resolve(choose_preset(preset, over), *over)
    check_truth(settings.data)
    targets = {"ap_spair": paper_target(settings.data) if ap is None else ap}
    if ap is None:
        count = settings.data.max_objects
        say(f"aims at {listed(targets, 'g')}, which was published for {count} objects")
    if count_accuracy is not None:
        targets["count_accuracy"] = count_accuracy
    about = {
        "benchmark": "time-to-ap",
        **machine(chosen),
        "preset": settings.preset,
        "data": settings.data.name,
        "set": set_ or [],
        "validation_every": settings.train.validation_every,
        "validation_images": settings.data.validation_images,
    }

    def print_tables(about: dict[str, Any], found: "list[Attempt]") -> None:
        _print_attempts(about, targets, found)

    tasks: dict[int, Any] = {}
    with (
        Interrupts("ending after this update") as interrupts,
        recorded(about, print_tables, ledger, json=json) as found,
    ):
        with progress_bar(quiet=quiet) as bar:

            def show(seed: int, step: int, validation: Any) -> None:
                if seed not in tasks:
                    tasks[seed] = bar.add_task(f"seed {seed}", total=settings.train.steps, note="")
                bar.update(tasks[seed], completed=step)
                if validation and not quiet:
                    figures = {name: validation.figures[name] for name in targets}
                    line = f"seed {seed}, step {step}: {listed(figures)}"
                    bar.console.print(line, soft_wrap=True)

            def stop() -> bool:
                return interrupts.number is not None

            for attempt in attempts(settings, targets, list(range(seeds)), chosen, show, stop):
                found.append(attempt)
                about["success_rate"] = success_rate(found)
                bar.remove_task(tasks.pop(attempt.seed))
        if interrupts.number is not None:
            raise typer.Exit(128 + interrupts.number)
    if not about["success_rate"]:
        raise InputError(_missed(targets, found))


def _case(figure: "Figure") -> str:
    return f"{figure.preset} {figure.batch}x{figure.cells}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} ms"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _print_figures(about: dict[str, Any], figures: "list[Figure]") -> None:
    from rich.table import Table

    from spairkit.benchmarks.steps import PARTS

    console = results(_TABLE_WIDTH)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), soft_wrap=True)
    whole = Table(
        *(
            "batch x cells",
            "ms",
            "20-80 %",
            "CPU ms",
            "updates/s",
            "images/s",
            "us/cell",
            "times",
            "MiB",
        ),
        box=None,
    )
    parts = Table("share of parts, %", *PARTS, box=None)
    lines = []
    case = ""
    for figure in figures:
        if _case(figure) != case:
            case = _case(figure)
            whole.add_row(case)
            parts.add_row(case)
        if figure.step_ms is None:
            whole.add_row(f"  {figure.way} ({figure.note})")
            continue
        whole.add_row(
            f"  {figure.way}" + (f" ({figure.note})" if figure.note else ""),
            f"{figure.step_ms:.1f}",
            f"{figure.p20_ms:.1f}-{figure.p80_ms:.1f}",
            f"{figure.cpu_ms:.1f}",
            f"{figure.updates_per_second:.1f}",
            f"{figure.images_per_second:.0f}",
            f"{figure.cell_us:.1f}",
            _times(figure.ratio),
            "" if figure.peak_bytes is None else f"{figure.peak_bytes / 2**20:.0f}",
        )
        total = sum(figure.parts_ms.values()) or 1.0
        parts.add_row(
            f"  {figure.way}", *(f"{100 * figure.parts_ms[name] / total:.0f}" for name in PARTS)
        )
        if figure.backbone_ms is None:
            continue
        if figure.way == "spairkit":
            lines.append(
                f"{case}: the step takes {_times(figure.times_backbone)} times as long as the "
                f"backbone's own forward and backward ({figure.backbone_ms:.1f} ms); of CPU time, "
                f"{_times(figure.times_backbone_cpu)} times"
            )
            if figure.times_plain_backbone is None:
                continue
            lines.append(
                f"{case}: the step takes {_times(figure.times_plain_backbone)} times as long as "
                "the plain version's backbone, which is torch's convolutions; of CPU time, "
                f"{_times(figure.times_plain_backbone_cpu)} times"
            )
        else:
            lines.append(
                f"{case}: everything but the backbone takes the plain version "
                f"{_times(figure.rest_ratio)} times as long; of CPU time, "
                f"{_times(figure.rest_ratio_cpu)} times"
            )
    console.print(whole)
    console.print(parts)
    console.print(
        "batch x cells of an image; ms: median of an update; us/cell: of one cell of one image; "
        "times: slower than spairkit; MiB: memory above what was there before",
        soft_wrap=True,
    )
    for line in lines:
        console.print(line, soft_wrap=True)


def _print_attempts(
    about: dict[str, Any], targets: dict[str, float], found: "list[Attempt]"
) -> None:
    from statistics import median

    from rich.table import Table

    # of one target alone the first time is that of all
    single = list(targets) if len(targets) > 1 else []
    columns = ["seed", "reached", *map(called, single), "step", "CPU min"]
    table = Table(*columns, *(f"best {called(name)}" for name in targets), box=None)
    for attempt in found:
        every = attempt.all
        unseen = "-" if attempt.broken_off else "never"
        ended = f"broken off, {attempt.minutes:.1f} min" if attempt.broken_off else "never"
        table.add_row(
            str(attempt.seed),
            f"{every.minutes:.1f} min" if every else ended,
            *(f"{at.minutes:.1f} min" if at else unseen for at in map(attempt.first.get, single)),
            str(every.step if every else attempt.steps),
            f"{every.cpu_minutes if every else attempt.cpu_minutes:.1f}",
            *(f"{attempt.best[name]:.3f}" for name in targets),
        )
    console = results(_TABLE_WIDTH)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), soft_wrap=True)
    console.print(f"until validation first reaches {listed(targets, 'g')}:", soft_wrap=True)
    console.print(table)
    console.print(
        "reached: all at one validation, in minutes of wall time, with step and CPU minutes then; "
        f"best: of any validation. AP paper: {AUTHORS_RULE}.",
        soft_wrap=True,
    )
    ended_seeds = sum(not attempt.broken_off for attempt in found)
    times = [attempt.all.minutes for attempt in found if attempt.all]
    middle = f", in {median(times):.1f} minutes (median)" if times else ""
    broken = "; one was broken off and does not count" if ended_seeds < len(found) else ""
    console.print(f"reached by {len(times)} of {ended_seeds} seeds{middle}{broken}")


def _missed(targets: dict[str, float], found: "list[Attempt]") -> str:
    """What to say where no seed reached the targets."""
    best = {name: max(attempt.best[name] for attempt in found) for name in targets}
    return (
        f"no seed reached {listed(targets, 'g')} (the best: {listed(best)}); train for longer "
        "(--set train.steps=N), or aim lower (--ap, --count-accuracy)"
    )
