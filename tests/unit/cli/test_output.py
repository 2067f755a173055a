import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from protlm.cli import output
from protlm.errors import ProtlmError


@dataclass
class Report:
    path: Path
    peak_bytes: int = 10
    free_bytes: int = 20


def test_pairs_are_aligned_by_the_longest_name_but_alike_in_all_commands(capsys):
    output.print_pairs([("steps", 3), ("model", Path("run"))])
    assert capsys.readouterr().out == "steps       3\nmodel       run\n"
    output.print_pairs(iter([("a", 1), ("longer than that", 2)]))
    assert capsys.readouterr().out == "a                 1\nlonger than that  2\n"
    output.print_pairs([])
    assert capsys.readouterr().out == ""


def test_a_table_has_its_first_column_to_the_left_and_the_others_to_the_right(capsys):
    output.print_table(("split", "n"), [("train", 1), ("a", 1000)])
    assert capsys.readouterr().out == "split     n\ntrain     1\na      1000\n"


def test_scores_stand_beside_the_empirical_baseline(capsys):
    output.print_scores("valid", model=(0.25, 12.3456), baseline=(0.1, 18.0))
    assert capsys.readouterr().out == (
        "valid split         accuracy  perplexity\n"
        "model                 0.2500      12.346\n"
        "empirical baseline    0.1000      18.000\n"
    )


def test_json_is_one_object_of_a_dataclass_or_a_dictionary(capsys):
    output.print_json(Report(Path("a") / "é"))
    assert json.loads(capsys.readouterr().out) == {"path": "a/é", "peak_bytes": 10, "free_bytes": 20}
    output.print_json({"sizes": (1, 2)})
    assert json.loads(capsys.readouterr().out) == {"sizes": [1, 2]}
    with pytest.raises(TypeError, match="a report holds set"):
        output.print_json({"names": set()})


def test_an_estimate_is_printed_before_a_lack_of_disk_is_an_error(capsys):
    output.print_estimate(Report(Path("a")), [("bytes", 10)], as_json=False)
    assert capsys.readouterr().out == "dry run\nbytes       10\n"
    short = SimpleNamespace(peak_bytes=1000, free_bytes=20)
    with pytest.raises(ProtlmError, match="not enough disk: about 1,000 bytes wanted, 20 free"):
        output.print_estimate(short, [("bytes", 1000)], as_json=False)
    assert capsys.readouterr().out == "dry run\nbytes       1000\n"


def test_a_warning_is_one_line_on_stderr(capsys):
    output.warn("look")
    assert capsys.readouterr() == ("", "warning: look\n")


def test_work_that_is_kept_is_told_only_where_there_is_any(tmp_path, capsys):
    output.warn_if_kept(tmp_path / "absent")
    assert capsys.readouterr().err == ""
    output.warn_if_kept(tmp_path)
    assert capsys.readouterr().err == (
        f"warning: what is finished is kept in {tmp_path}; go on with the same command and --resume\n"
    )
