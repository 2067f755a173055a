"""`protlm config`: a configuration in, its settings with their meanings out."""

from typing import Annotated

import typer

from protlm.cli import output
from protlm.cli.options import JsonOption


def config_command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped configuration or a TOML file.")] = "tiny",
    is_list: Annotated[bool, typer.Option("--list", help="List the shipped configurations instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print a configuration as TOML, with the meaning of each setting.

    Save the text to a file, edit it, and give the file to protlm train --config.

    \b
    Examples:
      protlm config --list
      protlm config small
      protlm config run/config.toml --json
    """  # noqa: D301  \b must reach Typer as a backspace
    source = context.get_parameter_source("name")
    if is_list and source is not None and source.name != "DEFAULT":
        raise typer.BadParameter(f"lists all configurations, so it takes no name; got {name!r}", param_hint="--list")
    from protlm.config_files import explain_config, load_config, shipped_summaries

    summaries = shipped_summaries()
    if is_list:
        output.print_json(summaries) if as_json else output.print_pairs(summaries.items())
        return
    config = load_config(name)
    if as_json:
        output.print_json(config.model_dump())
        return
    if name in summaries:
        print(f"# {summaries[name]}\n")
    print(explain_config(config), end="")
