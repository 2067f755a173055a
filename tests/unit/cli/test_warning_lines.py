import warnings

import pytest

from protlm.cli.warning_lines import warnings_as_lines
from protlm.errors import ProtlmWarning


def test_a_warning_of_ours_is_one_line_on_stderr(capsys):
    with warnings_as_lines():
        warnings.warn("/scratch: no locks here", ProtlmWarning, stacklevel=1)
    assert capsys.readouterr() == ("", "warning: /scratch: no locks here\n")


def test_the_same_warning_is_told_once(capsys):
    with warnings_as_lines():
        for folder in ("one", "two", "one"):
            warnings.warn(f"{folder}: no locks here", ProtlmWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: one: no locks here\nwarning: two: no locks here\n"


def test_warnings_of_others_stay_as_they_are(capsys):
    with pytest.warns(UserWarning, match="theirs"), warnings_as_lines():
        warnings.warn("theirs", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == ""
    with pytest.warns(ProtlmWarning, match="ours"):
        warnings.warn("ours", ProtlmWarning, stacklevel=1)
