"""`spairkit config`: the settings of a preset or a config file."""

from pathlib import Path
from typing import Annotated

import typer

from spairkit.cli import options
from spairkit.cli.console import print_document, print_json, say
from spairkit.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Show or copy the settings of a preset.")


@app.command()
def show(
    preset: options.PresetOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Print every setting as TOML."""
    from spairkit.config_values import to_dict, to_toml

    settings = options.resolved(preset, options.layers(config, set_))
    if as_json:
        print_json(to_dict(settings))
    else:
        print_document(to_toml(settings))


@app.command()
def copy(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.")],
    preset: options.PresetOption = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
) -> None:
    """Write every setting to a new TOML file, to edit and pass to `train --config`."""
    from spairkit.config_values import to_toml
    from spairkit.storage.durable import write_text

    if file.exists():
        raise InputError(f"{file} already exists; name a new file")
    write_text(file, to_toml(options.resolved(preset, options.layers(config, set_))))
    say(
        f"wrote {file}; train with: spairkit train --config {file} (on a folder of images, remove "
        "the settings that are to be measured, such as [prepare])"
    )
