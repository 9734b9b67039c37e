"""`spairkit report`: a run as one page."""

from pathlib import Path
from typing import Annotated

import typer

from spairkit.errors import InputError


def report(
    run: Annotated[Path | None, typer.Argument(help="A run's folder, else the newest.")] = None,
) -> None:
    """Write report.html into a run's folder: figures, curves, pictures, settings."""
    from spairkit.report.page import write_report
    from spairkit.storage.runs import ROOT, newest_run

    folder = run or newest_run()
    if folder is None:
        raise InputError(f"no run under ./{ROOT}; name one, or make one with `spairkit train`")
    typer.echo(write_report(folder))
