"""`scripts/learning.py`, made small: runs are made once, go on after a stop, and become a page by their files alone."""

import gzip
import json
import subprocess
import sys

import pytest

from scripts import learning
from scripts.experiments import runs

PAGE = "# Page\n\n<!-- table: families-long -->\n\n<!-- end -->\n\n<!-- table: conditions -->\n\n<!-- end -->\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory, proteins):
    """Proteins of the sample in the place of a family of long ones."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "families_long").mkdir()
    for name, members in (("train", proteins[:50]), ("iid", proteins[50:62]), ("held", proteins[62:74])):
        text = "".join(f">{record_id} family=F01\n{sequence}\n" for record_id, sequence in members)
        (folder / "families_long" / f"{name}.fasta.gz").write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.fixture
def words(data, tmp_path):
    return ["run", "--task", "families-long", "--kind", "cycle", "--seed", "0", "--proteins", "12", "--data", str(data),
            "--out", str(tmp_path / "runs"), "--work", str(tmp_path / "work")]  # fmt: skip


def test_a_run_is_made_once_and_its_file_is_all_that_the_page_needs(words, tmp_path, monkeypatch, capsys):
    learning.main([*words, "--steps", "2"])
    assert capsys.readouterr().out.startswith("families-long.cycle.0 ")
    path = tmp_path / "runs" / "families-long.cycle.0.json"
    content = json.loads(path.read_text())
    assert content["steps"] == 2
    assert [point["step"] for point in content["curve"]] == [1, 2]
    assert 0 < content["curve"][0]["seconds"] < content["curve"][1]["seconds"] == content["training_seconds"]
    for split in content["splits"].values():
        assert split["accuracy_low"] < split["accuracy"] < split["accuracy_high"]
        assert len(split["replicates"]) == runs.NUM_REPLICATES
    assert content["environment"]["threads"] == 1
    assert not list((tmp_path / "work").glob("families-long.*"))

    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "perform", fail)
    learning.main([*words, "--steps", "2"])
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit, match=r"error: 1 runs failed: families-long.cycle.0"):
        learning.main([*words, "--steps", "3"])
    assert "a run with other settings (train.max_steps=2, train.max_steps=3)" in capsys.readouterr().err

    page = tmp_path / "page.md"
    page.write_text(PAGE)
    learning.main(["page", "--runs", str(tmp_path / "runs"), "--page", str(page)])
    text = page.read_text()
    assert f"| local, FAVOR, local | 1 | {content['splits']['iid']['accuracy']:.3f} (" in text
    assert "1 runs, " in text
    assert (tmp_path / "page" / "families-long.png").is_file()


def test_a_run_that_was_stopped_begins_anew(words, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", stop)
        with pytest.raises(SystemExit) as ended:
            learning.main([*words, "--steps", "1"])
    assert ended.value.code == 130
    assert not list((tmp_path / "runs").glob("*"))
    # What it left does not stand in the way.
    assert (tmp_path / "work" / "families-long.cycle.0" / "run").is_dir()
    learning.main([*words, "--steps", "1"])
    assert (tmp_path / "runs" / "families-long.cycle.0.json").is_file()


def test_no_run_begins_after_the_minutes_are_over(words, tmp_path, capsys):
    learning.main([*words, "--minutes", "0"])
    assert "the same command goes on with families-long.cycle.0" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_errors_are_one_line(words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        learning.main([*words[:-6], "--data", str(tmp_path / "nowhere"), *words[-4:]])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: families-long.cycle.0: ")
    assert "nowhere" in line
    for given, said in (("page.md", "no such page"), (None, "holds no runs")):
        page = tmp_path / "page.md"
        if given is None:
            page.write_text(PAGE)
        with pytest.raises(SystemExit, match=f"error: .*{said}"):
            learning.main(["page", "--runs", str(tmp_path), "--page", str(page)])


@pytest.mark.parametrize(
    "words", [[], ["run", "--task", "nothing"], ["run", "--kind", "nothing"], ["run", "--seed", "7"]]
)
def test_wrong_usage_ends_with_its_status(words, capsys):
    with pytest.raises(SystemExit) as ended:
        learning.main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().out == ""


def test_wrong_usage_is_told_before_torch_is_loaded():
    code = "import sys; from scripts import learning; learning.parse(['run']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=learning.ROOT)
    assert "'scripts.learning'" in done.stdout
    assert "'torch'" not in done.stdout
