"""The `protlm` program: collects the commands and turns every outcome into an exit status and at most one line."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from protlm import __version__
from protlm.cli.config import config_command
from protlm.cli.convert import convert_command
from protlm.cli.embed import embed_command
from protlm.cli.evaluate import eval_command
from protlm.cli.help import Command
from protlm.cli.inspect import inspect_command
from protlm.cli.prep import prep_command
from protlm.cli.probe import probe_command
from protlm.cli.score import score_command
from protlm.cli.terminal import filtered_output, on_one_line
from protlm.cli.train import train_command
from protlm.cli.versions import print_versions
from protlm.cli.warning_lines import warnings_as_lines
from protlm.errors import ProtlmError, UsageError

EXIT_SUCCESS, EXIT_FAILURE, EXIT_INTERRUPTED = 0, 1, 130


class _Command(Command):
    """A command that shows a `UsageError` as Typer shows its own, with status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise typer.BadParameter(str(error), ctx=ctx) from error


app = typer.Typer(
    name="protlm",
    help="Protein language models with linear-cost Performer attention: prepare, train, evaluate, embed, probe, score.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
app.command("prep", cls=_Command)(prep_command)
app.command("inspect", cls=_Command)(inspect_command)
app.command("config", cls=_Command)(config_command)
app.command("train", cls=_Command)(train_command)
app.command("eval", cls=_Command)(eval_command)
app.command("embed", cls=_Command)(embed_command)
app.command("score", cls=_Command)(score_command)
app.command("probe", cls=_Command)(probe_command)
app.command("convert", cls=_Command)(convert_command)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With --version: also those of the libraries, and what runs here.")
    ] = False,
) -> None:
    if version:
        typer.echo(f"protlm {__version__}")
        if verbose:
            print_versions()
        raise typer.Exit
    if context.invoked_subcommand is None:
        context.fail("Missing command.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Args:
        arguments: The words after `protlm`; by default those of the process.

    Returns:
        0 success, 1 the data or the run is at fault, 2 wrong usage, 130 interrupted.
    """
    with filtered_output():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    # Read by OpenMP when torch is loaded. Threads that spin while they wait make a step ten times slower as soon as
    # anything else runs on the machine; threads that sleep cost a few percent on an idle one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = typer.main.get_command(app)
    words = None if arguments is None else list(arguments)
    try:
        with warnings_as_lines():
            status = command.main(args=words, prog_name="protlm", standalone_mode=False)
    except TyperException as error:
        _put_on_one_line(error)
        error.show()  # type: ignore[attr-defined]  # every error of this class has it; its type does not say so
        return error.exit_code
    except ProtlmError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Whoever read our output has gone; closing stderr keeps the interpreter from complaining at exit.
        sys.stderr.close()
        return EXIT_FAILURE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    if status == EXIT_INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return status if isinstance(status, int) else EXIT_SUCCESS


def _put_on_one_line(error: Any) -> None:
    """Keeps words of the command line from forging lines in the message of wrong usage; a help text has its lines."""
    message = error.format_message()
    if error.ctx is None or message != error.ctx.get_help():
        error.format_message = lambda: on_one_line(message)


def _fail(message: str) -> int:
    print(f"error: {on_one_line(message)}", file=sys.stderr)
    return EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
