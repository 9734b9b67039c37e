"""`spairkit bench`: the speed of operators, training updates, detection, and reaching an AP."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spairkit.cli import options
from spairkit.cli.console import progress_bar, say, several
from spairkit.cli.figures import AUTHORS_RULE, called, listed
from spairkit.cli.ledger import print_table, recorded
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.benchmarks.detecting import Speed
    from spairkit.benchmarks.timing import Figure
    from spairkit.benchmarks.training import Attempt


OPERATOR = "render, presence_kl or presence_kl_relaxed; repeatable. Default: all."
OBJECTS = "Objects per image: 16, 64, 144 or 576; repeatable. Default: all."
BATCH = "Images per call or update; repeatable. Default: 32; on a GPU 32, 256 and 1024."
PRESET = "quick, laptop or paper; repeatable. Default: quick and paper."
CELLS = "Grid cells along each side of an image; repeatable. Default: 4 (4 x 4 cells)."
BatchOption = Annotated[list[int] | None, typer.Option(min=1, max=65536, help=BATCH)]
SecondsOption = Annotated[
    float, typer.Option(min=0.0, help="Least time to spend on each measurement.")
]
AP = "The AP to reach. Default: the published AP for data.max_objects digits."
ACCURACY = "Share of images whose count must be right in the same validation. Default: any."
SIZE = "Side of one large image that is tiled from scenes, px; 0 leaves it out."
MODES = "Mode of the search: off (default), refine or full; repeatable."
SCENES = "Scenes in a batch; repeatable. Default: 32."
EVERY = "Updates between validations. Default: the preset's."
SEEDS = "Number of runs; their seeds are 0, 1, ..."
Share = float | None
LEDGER = Path("benchmarks.jsonl")

app = typer.Typer(invoke_without_command=True)


@app.callback()
def bench(
    context: typer.Context,
    operator: Annotated[list[str] | None, typer.Option(help=OPERATOR)] = None,
    objects: Annotated[list[int] | None, typer.Option(help=OBJECTS)] = None,
    batch: BatchOption = None,
    device: options.DeviceOption = options.Device.AUTO,
    threads: options.ThreadsOption = None,
    seconds: SecondsOption = 1.0,
    ledger: options.LedgerOption = LEDGER,
    as_json: options.JsonOption = False,
) -> None:
    """Compare the speed and memory of the operators with plain torch.

    The operators are the renderer and the KL of presence, for hard and for relaxed samples. Their
    results are checked before anything is timed. On a GPU, times are those of CUDA graph replays.
    `bench train` and `bench time-to-ap` measure training, `bench search` the search for objects,
    `bench detect` detection in files.
    """
    if context.invoked_subcommand is not None:
        return
    from spairkit.benchmarks.operators import SIDES, WAYS, run

    operators, numbers = operator or list(WAYS), objects or list(SIDES)
    for option, given, known in (("operator", operators, WAYS), ("objects", numbers, SIDES)):
        for value in set(given) - set(known):
            names = ", ".join(map(str, known))
            raise InputError(f"--{option} must be one of {names}; got {value}")
    where, batches, about = _machine(device, threads, batch)
    chosen = list(product(operators, batches, numbers))
    with recorded({"benchmark": "operators", **about}, _show, ledger, as_json=as_json) as record:
        for figure in run(chosen, where, seconds, say):
            record(figure)


@app.command("train")
def bench_train(
    preset: Annotated[list[str] | None, typer.Option(help=PRESET)] = None,
    set_: options.SetOption = None,
    batch: BatchOption = None,
    cells: Annotated[list[int] | None, typer.Option(min=1, max=64, help=CELLS)] = None,
    device: options.DeviceOption = options.Device.AUTO,
    threads: options.ThreadsOption = None,
    seconds: SecondsOption = 10.0,
    ledger: options.LedgerOption = LEDGER,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Compare a training update of SPAIR with a plain torch version of the same update.

    The losses and gradients of both are compared before anything is timed.
    """
    from spairkit.benchmarks.training import run, sized
    from spairkit.config_values import assignments
    from spairkit.presets import DEFAULT, resolve

    over = assignments(set_ or [])
    if "batch_size" in over.get("train", {}):
        raise InputError("--set train.batch_size: a benchmark takes its batches from --batch")
    where, batches, about = _machine(device, threads, batch)
    chosen = {
        f"{name} {size}x{side**2}": sized(resolve(name, over), size, side)
        for name in preset or (DEFAULT, "paper")
        for size in batches
        for side in cells or [4]
    }
    about = {"benchmark": "train", **about, "set": set_ or []}
    with recorded(about, _show, ledger, as_json=as_json) as record:
        for figure in run(chosen, where, seconds, (lambda _: None) if quiet else say):
            record(figure)


@app.command("search")
def bench_search(
    size: Annotated[int, typer.Option(min=0, max=8192, help=SIZE)] = 2048,
    batch: Annotated[list[int] | None, typer.Option(min=1, max=65536, help=SCENES)] = None,
    device: options.DeviceOption = options.Device.AUTO,
    threads: options.ThreadsOption = None,
    seconds: SecondsOption = 10.0,
    ledger: options.LedgerOption = LEDGER,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Compare the speed and memory of the modes of the search.

    The packaged model finds digits in batches of 48 x 48 scenes of one to three, and in one large
    image.
    """
    from spairkit.benchmarks.search import SCENE, run

    if 0 < size < SCENE:
        raise InputError(f"--size {size}: must be 0, or at least the side of a scene, {SCENE}")
    where, _, about = _machine(device, threads, None)
    shown = (lambda _: None) if quiet else say
    about = {"benchmark": "search", **about}
    with recorded(about, _show_search, ledger, as_json=as_json) as record:
        for figure in run(batch or [32], size, where, seconds, shown):
            record(figure)


@app.command("detect")
def bench_detect(
    search: Annotated[list[options.Search] | None, typer.Option(help=MODES)] = None,
    size: Annotated[int, typer.Option(min=0, max=8192, help=SIZE)] = 4096,
    device: options.DeviceOption = options.Device.AUTO,
    threads: options.ThreadsOption = None,
    seconds: SecondsOption = 10.0,
    ledger: options.LedgerOption = LEDGER,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Measure detection in files, from reading to COCO results, in images per second.

    The packaged model finds digits in 256 images of 48 x 48, 16 of 256 x 256 and a large one.
    """
    from spairkit.benchmarks.detecting import run
    from spairkit.benchmarks.search import SCENE

    if 0 < size < SCENE:
        raise InputError(f"--size {size}: must be 0, or at least the side of a scene, {SCENE}")
    where, _, about = _machine(device, threads, None)
    modes: list[Any] = [mode.value for mode in search or [options.Search.OFF]]
    shown = (lambda _: None) if quiet else say
    about = {"benchmark": "detect", **about}
    with recorded(about, _show_speeds, ledger, as_json=as_json) as record:
        for speed in run(modes, size, where, seconds, shown):
            record(speed)


@app.command("time-to-ap")
def time_to_ap(
    preset: options.PresetOption = None,
    data: options.DataOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    ap: Annotated[Share, typer.Option(min=0.0, max=1.0, help=AP)] = None,
    count_accuracy: Annotated[Share, typer.Option(min=0.0, max=1.0, help=ACCURACY)] = None,
    every: Annotated[int | None, typer.Option(min=1, help=EVERY)] = None,
    seeds: Annotated[int, typer.Option(min=1, help=SEEDS)] = 3,
    device: options.DeviceOption = options.Device.AUTO,
    threads: options.ThreadsOption = None,
    ledger: options.LedgerOption = LEDGER,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Measure the minutes of training until validation first reaches an AP, over several seeds.

    The AP is AP paper, computed by the rule of the SPAIR authors' code. A seed fails if it does not
    reach the AP by the last update of the preset. Ctrl-C drops the current seed and prints the
    finished ones. Exit status: 0 if any seed succeeded, 2 if none did.
    """
    from spairkit.benchmarks.training import attempt, target
    from spairkit.training.validation import Validation

    where, _, about = _machine(device, threads, None)
    over = options.layers(config, set_, data=data, validation_every=every, threads=threads)
    settings = options.resolved(preset, over)
    targets = {"ap_spair": target(settings.data, ap)}
    if count_accuracy is not None:
        targets["count_accuracy"] = count_accuracy
    about = {"benchmark": "time-to-ap", **about, "preset": settings.preset, "set": set_ or []}
    about |= {"data": settings.data.name, "validation_every": settings.train.validation_every}
    found: list[Attempt] = []
    recording = recorded(about, _show_attempts, ledger, as_json=as_json)
    with recording as record, progress_bar(quiet=quiet) as bar:
        task = bar.add_task("", total=settings.train.steps, note="")

        def report(event: Any) -> None:
            bar.update(task, completed=event.step, description=f"seed {len(found)}")
            if isinstance(event, Validation):
                figures = listed({name: event.figures[name] for name in targets})
                bar.say(f"seed {len(found)}, step {event.step}: {figures}")

        for seed in range(seeds):
            train = replace(settings.train, seed=seed)
            found.append(attempt(replace(settings, train=train), targets, where, report))
            record(found[-1])
    if not any(run.reached for run in found):
        best = listed({name: max(run.best[name] for run in found) for name in targets})
        raise InputError(
            f"no seed reached {listed(targets, 'g')}; the best figures are {best}. Train longer "
            "(--set train.steps=N) or lower the target (--ap, --count-accuracy)"
        )


def _machine(
    device: options.Device, threads: int | None, batch: list[int] | None
) -> tuple[Any, list[int], dict[str, Any]]:
    """The device, the batches to time there, and a description of the machine."""
    import torch

    from spairkit.benchmarks.timing import machine

    where = options.choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    return where, batch or ([32, 256, 1024] if where.type == "cuda" else [32]), machine(where)


def _show(figures: list["Figure"]) -> None:
    note = "ms: median; times: slower than spairkit; MiB: rise in memory during a call"
    if any("eagerly" in figure.note for figure in figures):
        note += "; launched eagerly: not recorded as a CUDA graph, so gaps between kernels count"
    _print("batch x objects or cells", "way", figures, note)


def _show_search(figures: list["Figure"]) -> None:
    note = (
        "ms: median wall time per image; times: slower than off; MiB: rise in memory during a "
        "call; CPU ms: of all threads, per image"
    )
    _print("scenes", "search", figures, note)


def _show_speeds(speeds: list["Speed"]) -> None:
    rows = [
        [speed.case, speed.search, *map(_short, numbers), str(speed.found)]
        for speed in speeds
        for numbers in [
            (speed.images_per_second, speed.megapixels_per_second, speed.cpu_ms_per_image)
        ]
    ]
    columns = ["images", "search", "images/s", "megapixels/s", "CPU ms", "found"]
    print_table(columns, rows, "medians of wall time; CPU ms: of all threads, per image")


def _print(cases: str, ways: str, figures: list["Figure"], note: str) -> None:
    rows, last = [], ""
    for figure in figures:
        way = f"{figure.way} ({figure.note})" if figure.note else figure.way
        rows.append([figure.case if figure.case != last else "", way, _short(figure.median_ms)])
        rows[-1] += [f"{_short(figure.p20_ms)}-{_short(figure.p80_ms)}", _short(figure.times)]
        rows[-1] += ["" if figure.peak_mib is None else f"{figure.peak_mib:.1f}"]
        rows[-1] += map(_short, figure.more.values())
        last = figure.case
    columns = [cases, ways, "ms", "20-80 %", "times", "MiB"]
    print_table([*columns, *figures[0].more], rows, note)


def _short(value: float) -> str:
    return f"{value:.{4 if value < 1 else 2 if value < 10 else 1 if value < 1000 else 0}f}"


def _show_attempts(found: "list[Attempt]") -> None:
    targets = found[0].targets
    rows = []
    for run in found:
        row = [str(run.seed), "yes" if run.reached else "no", f"{run.minutes:.1f}"]
        best = [f"{run.best[name]:.3f}" for name in targets]
        rows.append([*row, f"{run.cpu_minutes:.1f}", str(run.step), *best])
    times = [run.minutes for run in found if run.reached]
    middle = f" in {median(times):.1f} minutes (median)" if times else ""
    note = f"{len(times)} of {several(len(found), 'seed')} reached {listed(targets, 'g')}{middle}."
    columns = ["seed", "reached", "minutes", "CPU min", "step"]
    columns += [f"best {called(name)}" for name in targets]
    print_table(columns, rows, f"{note} AP paper: {AUTHORS_RULE}.")
