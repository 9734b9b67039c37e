"""`spairkit config`: the settings of a preset or a config file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spairkit.cli.console import print_json, say
from spairkit.cli.options import (
    ConfigOption,
    JsonOption,
    PresetOption,
    SetOption,
    choose_preset,
    layers,
)
from spairkit.errors import InputError

if TYPE_CHECKING:
    from spairkit.config import Config

app = typer.Typer(no_args_is_help=True, help="Show or copy the settings of a preset.")


@app.command()
def show(
    preset: PresetOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print every setting as TOML."""
    from spairkit.config_values import to_dict, to_toml

    resolved = _resolved(preset, config, set_)
    if as_json:
        print_json(to_dict(resolved))
    else:
        typer.echo(to_toml(resolved), nl=False)


@app.command()
def copy(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.")],
    preset: PresetOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Write every setting to a new TOML file, to edit and pass to `train --config`."""
    from spairkit.config_values import to_toml
    from spairkit.storage.durable import write_text

    if file.exists():
        raise InputError(f"{file} already exists; name a new file")
    write_text(file, to_toml(_resolved(preset, config, set_)))
    say(f"wrote {file}; train with: spairkit train --config {file}")


def _resolved(preset: str | None, config: Path | None, words: list[str] | None) -> "Config":
    from spairkit.presets import resolve

    over = layers(config, {}, words)
    return resolve(choose_preset(preset, over), *over)
