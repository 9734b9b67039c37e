"""`spairkit bench`: the operators, or all of training, beside plain torch."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spairkit.cli.bench_train import bench_train, time_to_ap
from spairkit.cli.console import results, say, several
from spairkit.cli.ledger import recorded
from spairkit.cli.options import (
    Device,
    DeviceOption,
    JsonOption,
    LedgerOption,
    ThreadsOption,
    choose_device,
)
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.benchmarks.operators import Figure


_TABLE_WIDTH = 180  # with the longest notes, on a GPU

app = typer.Typer(invoke_without_command=True)
app.command("train")(bench_train)
app.command("time-to-ap")(time_to_ap)


class OperatorName(StrEnum):
    """What can be timed."""

    RENDER = "render"
    PRESENCE_KL = "presence_kl"
    PRESENCE_KL_RELAXED = "presence_kl_relaxed"


@app.callback()
def bench(
    context: typer.Context,
    operator: Annotated[
        list[OperatorName] | None,
        typer.Option("--operator", help="Time this one alone; repeatable."),
    ] = None,
    objects: Annotated[
        list[int] | None,
        typer.Option(
            "--objects", help="In an image: 16, 64, 144 or 576; repeatable. Default: all of these."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            "--batch", min=1, help="Images; repeatable. Default: 32; on a GPU 32, 256 and 1024."
        ),
    ] = None,
    device: DeviceOption = Device.AUTO,
    threads: ThreadsOption = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Also time torch.compile of the plain versions. Default: on a GPU only.",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.0, help="Seconds for each figure, at least.")
    ] = 1.0,
    ledger: LedgerOption = Path("benchmarks.jsonl"),
    json: JsonOption = False,
) -> None:
    """Time the operators (renderer, KL of the counts) beside plain torch, checked first.

    `bench train` and `bench time-to-ap` time training.
    """
    if context.invoked_subcommand is not None:
        return
    import torch

    from spairkit.benchmarks.operators import SIDES, cases, run
    from spairkit.benchmarks.timing import machine

    unknown = set(objects or ()) - set(SIDES)
    if unknown:
        raise InputError(f"--objects must be 16, 64, 144 or 576, got {min(unknown)}")
    where = choose_device(device)
    on_gpu = where.type == "cuda"
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = cases(
        [name.value for name in operator or list(OperatorName)],
        batch or ([32, 256, 1024] if on_gpu else [32]),
        objects or list(SIDES),
    )
    about = machine(where)
    with recorded(about, _print_table, ledger, json=json) as figures:
        number = several(len(chosen), "case")
        say(f"checking and timing {number} on {where.type}; those of many objects take minutes")
        for figure in run(
            chosen,
            where,
            compiled=on_gpu if compiled is None else compiled,
            seconds=seconds,
            report=say,
        ):
            figures.append(figure)
            say(_line(figure))


def _line(figure: "Figure") -> str:
    time = figure.note if figure.median_ms is None else f"{figure.median_ms:.3f} ms"
    return f"{_case(figure)}: {figure.way} {time}"


def _case(figure: "Figure") -> str:
    from spairkit.benchmarks.operators import describe

    return describe(figure, figure.backward)


def _print_table(about: dict[str, object], figures: list["Figure"]) -> None:
    from rich.table import Table

    table = Table("batch x objects", "way", "ms", "20-80 %", "times", "MiB", box=None)
    case = ""
    for figure in figures:
        note = figure.note
        if figure.bytes_per_second and figure.copy_bytes_per_second:
            note += (
                f", {figure.bytes_per_second / 1e9:.1f} GB/s, {figure.bandwidth:.0%} of a copy's "
                f"{figure.copy_bytes_per_second / 1e9:.1f}"
            )
        timed = figure.median_ms is not None
        peak = figure.peak_bytes
        table.add_row(
            _case(figure) if _case(figure) != case else "",
            figure.way + (f" ({note})" if note else ""),
            f"{figure.median_ms:.3f}" if timed else "-",
            f"{figure.p20_ms:.3f}-{figure.p80_ms:.3f}" if timed else "",
            f"{figure.ratio:.1f}" if figure.ratio is not None else "",
            "" if peak is None else f"{peak / 2**20:.1f}",
        )
        case = _case(figure)
    console = results(_TABLE_WIDTH)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), soft_wrap=True)
    console.print(table)
