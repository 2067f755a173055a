"""Nothing from a file steers the terminal or forges a line: escapes in place of what cannot be shown."""

import io
import json
import sys
import unicodedata

import pytest

from protlm.cli import app, output, terminal
from protlm.cli.app import main
from protlm.errors import ProtlmError

HOSTILE = "no\nerror: all is lost\r\x1b[31m\x1b]0;title\x07\x7f\x9b2J\u202e\u2066\u200b\u2028\ufeff\udcff\U000e0041"
SHOWN = r"no\nerror: all is lost\r\x1b[31m\x1b]0;title\x07\x7f\u009b2J\u202e\u2066\u200b\u2028\ufeff\xff\U000e0041"
CONTROLS = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


def test_a_value_comes_on_one_line_in_letters_that_can_be_shown():
    assert terminal.on_one_line(HOSTILE) == SHOWN
    assert terminal.on_one_line("Ångström α → ß 蛋白") == "Ångström α → ß 蛋白"
    assert terminal.on_one_line(3) == "3"


def test_no_control_of_unicode_gets_through(capsys):
    hostile = "".join(CONTROLS)
    with terminal.filtered_output():
        output.warn(hostile)
        output.print_pairs([(hostile, hostile)])
        output.print_table((hostile,), [(hostile,)])
        output.print_json({hostile: hostile})
        print(hostile.replace("\n", "").replace("\r", "").replace("\t", ""))
    printed = capsys.readouterr()
    assert set(CONTROLS) & set(printed.out + printed.err) == {"\n"}
    assert printed.err.count("\n") == 1


def test_json_stays_json_and_keeps_its_values(capsys):
    with terminal.filtered_output():
        output.print_json({HOSTILE: [HOSTILE, "Å", 1.5]})
    printed = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in printed)
    assert "Å" in printed
    # A pair of surrogates and the letter that it stands for are one in JSON.
    assert json.loads(printed) == {HOSTILE: [HOSTILE, "Å", 1.5]}


@pytest.mark.parametrize(
    "error", [ProtlmError(f"{HOSTILE}: x"), OSError(2, HOSTILE), OSError(2, "gone", HOSTILE), KeyboardInterrupt()]
)
def test_an_error_is_one_line_whatever_its_text(capsys, monkeypatch, error):
    def fail(**_):
        raise error

    monkeypatch.setattr(app, "print_versions", fail)
    assert main(["--version", "--verbose"]) in (1, 130)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line[:-1].isprintable()


@pytest.mark.parametrize(
    "arguments",
    [["prep", f"--{HOSTILE}"], ["inspect", "a", HOSTILE], [HOSTILE], ["embed", "a", "b", "--layout", HOSTILE]],
)
def test_wrong_usage_is_told_in_lines_of_our_own(capsys, arguments):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert all(letter.isprintable() or letter == "\n" for letter in printed)
    assert not any(line.startswith("error: all") for line in printed.splitlines())


def test_the_help_keeps_its_lines(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") > 10


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_of_few_letters_gets_escapes_in_place_of_an_error(monkeypatch, encoding):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding, newline="\n"))
    with terminal.filtered_output():
        output.print_pairs([("name", "é → 蛋")])
        sys.stdout.flush()
    shown = "é" if encoding != "ascii" else r"\xe9"
    assert content.getvalue().decode(encoding) == f"name        {shown} \\u2192 \\u86cb\n"


def test_bars_pass_and_other_properties_of_the_streams_stay(capsys):
    with terminal.filtered_output():
        sys.stderr.write("\r 10%|█  |")
        sys.stderr.writelines(["a\n", "\x1b[A"])
        assert not sys.stderr.isatty()
        assert not hasattr(sys.stderr, "buffer")
    assert capsys.readouterr().err == "\r 10%|█  |a\n\\x1b[A"


def test_streams_that_are_missing_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with terminal.filtered_output():
        assert (sys.stdout, sys.stderr) == (None, None)
