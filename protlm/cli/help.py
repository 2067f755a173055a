"""The arguments of a command in its `--help`: each by its metavar, where Typer would add braces and a type."""

from typing import Any

from typer.core import TyperCommand


class Command(TyperCommand):
    """A command whose help shows arguments by their metavar alone: `INPUT...`, not `{INPUT...}... <list[str]>`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Returns the words of the usage line after the name of the command."""
        arguments = self._parameters("argument", ctx)
        return ["[OPTIONS]", *(each.metavar if each.required else f"[{each.metavar}]" for each in arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the lists of arguments and options."""
        arguments = [(each.metavar, each.get_help_record(ctx)[1]) for each in self._parameters("argument", ctx)]
        options = [each.get_help_record(ctx) for each in self._parameters("option", ctx)]
        for title, rows in (("Arguments", arguments), ("Options", options)):
            with formatter.section(title):
                formatter.write_dl(rows)

    def _parameters(self, kind: str, ctx: Any) -> list[Any]:
        return [parameter for parameter in self.get_params(ctx) if parameter.param_type_name == kind]
