import inspect
import re
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
import typer
from typer.models import ArgumentInfo, OptionInfo
from typer.testing import CliRunner

from protlm.cli.app import app, main
from protlm.cli.help import Command
from protlm.cli.options import one_of, some_of
from scripts.make_golden import help_texts

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_has_its_option_in_its_annotation_and_a_plain_default(name):
    callback = inspect.unwrap(COMMANDS[name].callback)
    hints = get_type_hints(callback, include_extras=True)
    for parameter in inspect.signature(callback).parameters.values():
        if hints[parameter.name] is typer.Context:
            continue
        assert get_origin(hints[parameter.name]) is Annotated, parameter.name
        info = get_args(hints[parameter.name])[1]
        assert isinstance(info, (ArgumentInfo, OptionInfo))
        assert info.help, parameter.name
        assert not isinstance(parameter.default, (ArgumentInfo, OptionInfo)), parameter.name


@pytest.mark.parametrize("name", help_texts())
def test_help_names_values_as_a_person_would(name):
    assert not re.search(r"[{}<>]", re.sub(r"[0-9.]*<=|>=", "", help_texts()[name]))


app_of_choices = typer.Typer(rich_markup_mode=None)
Colour = Literal["red", "green"]


@app_of_choices.command("paint", cls=Command)
def paint(
    things: Annotated[list[str] | None, typer.Argument(metavar="THING...", help="What to paint.")] = None,
    colours: Annotated[list[str] | None, some_of("--colour", Colour, help="Colours.")] = None,
) -> None:
    typer.echo(f"{things} {colours}")


def run(*arguments):
    return CliRunner().invoke(app_of_choices, arguments, env={"COLUMNS": "80"})


def test_values_of_a_repeatable_choice_are_checked():
    assert run("wall", "--colour", "green", "--colour", "red").output == "['wall'] ['green', 'red']\n"
    assert run("wall", "--colour", "green, red", "--colour", "red").output == "['wall'] ['green', 'red', 'red']\n"
    assert run().output == "None None\n"
    refused = run("--colour", "blue")
    assert refused.exit_code == 2
    assert "'blue' is not one of 'red', 'green'." in refused.output
    assert run("--colour", "green,").exit_code == 2


def test_arguments_that_may_be_left_out_stand_in_brackets():
    text = run("--help").output
    assert text.startswith("Usage: paint [OPTIONS] [THING...]\n")
    assert "  THING...  What to paint.\n" in text
    assert "--colour red|green" in text
    assert one_of(Colour) == "red|green"


def test_without_a_command_help_is_shown_and_an_unknown_one_is_wrong_usage(capsys):
    assert main(["paint"]) == 2
    assert "No such command 'paint'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tokens-per-batch", "--window", "--truncate", "--devices", "--num-nodes"])
def test_a_number_past_what_anything_holds_is_wrong_usage(option, capsys):
    assert main(["embed", "model", "proteins.fasta", "--out", "out", option, str(10**30)]) == 2
    assert option in capsys.readouterr().err
