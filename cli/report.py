"""`spairkit report`: one page about a run."""

from pathlib import Path
from typing import Annotated

import typer

from spairkit.cli.console import print_document
from spairkit.errors import InputError


def report(
    run: Annotated[Path | None, typer.Argument(help="A run. Default: the newest.")] = None,
) -> None:
    """Write report.html into the folder of a run: figures, curves, pictures, settings."""
    from spairkit.report.page import write_report
    from spairkit.storage.runs import ROOT, newest_run

    folder = run or newest_run()
    if folder is None:
        raise InputError(f"there is no run under ./{ROOT}; name one, or run `spairkit train`")
    print_document(f"{write_report(folder)}\n")
