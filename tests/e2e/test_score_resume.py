"""A killed run of score goes on to the same bytes, several processes make what one does, and other runs are refused."""

import json
from pathlib import Path

import pytest

from protlm import files
from protlm.cli.app import main
from protlm.workflows.score import portions as score_portions
from protlm.workflows.score import score as workflow
from tests.e2e.conftest import write_fasta
from tests.e2e.test_embed_resume import Killed, content, kill_at
from tests.e2e.train_tools import LAUNCHERS, run_on_two

# Rows of one pass, and so several portions.
MANY_PORTIONS = ["--tokens-per-batch", "20"]
PROTEINS = [("a", "MKVLAAGHWQEDRSTYPFNIC" * 3), ("b", "MSTNPKPQRKTKRNTNRRPQDV"), ("c", "MKVLAAGHWQEDRSTYPFNIC" * 3)]
MOMENTS = {
    "computing": (score_portions, "score_row", 25),
    "writing a portion": (files, "written_whole", 5),
    "scoring": (workflow, "assay_report", 0),
    "putting in place": (files, "publish", 0),
    "removing": (files, "remove_at_once", 0),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_fasta(tmp_path_factory.mktemp("inputs") / "proteins.fasta", PROTEINS)


def score(run_dir, inputs, out, *arguments):
    return main(["score", *map(str, (run_dir, inputs, "--all-singles", "--out", out, *MANY_PORTIONS, *arguments))])


@pytest.fixture(scope="module")
def expected(run_dir, inputs, tmp_path_factory):
    """The content of the output of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("expected")
    assert score(run_dir, inputs, folder / "s.csv") == 0
    return content(folder)


def killed(run_dir, inputs, out, moment, monkeypatch, *arguments):
    with monkeypatch.context() as patch:
        kill_at(patch, *MOMENTS[moment])
        with pytest.raises(Killed):
            score(run_dir, inputs, out, *arguments)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    moment, run_dir, inputs, expected, tmp_path, monkeypatch, capsys
):
    killed(run_dir, inputs, tmp_path / "s.csv", moment, monkeypatch)
    assert (tmp_path / "s.csv.partial").is_dir()
    capsys.readouterr()
    # A dry run of it is none of the finished output that is in the way.
    assert score(run_dir, inputs, tmp_path / "s.csv", "--resume", "--dry-run") == 0
    capsys.readouterr()
    assert score(run_dir, inputs, tmp_path / "s.csv", "--resume", "--json") == 0
    assert content(tmp_path) == expected
    assert json.loads(capsys.readouterr().out)["num_variants"] == 19 * sum(len(s) for _, s in PROTEINS)


def test_what_is_finished_is_not_computed_again_and_equal_proteins_are_computed_once(
    run_dir, inputs, expected, tmp_path, monkeypatch
):
    killed(run_dir, inputs, tmp_path / "s.csv", "computing", monkeypatch)
    # A portion has as many passes of 65 tokens as are within the budget of 16 rows of 20.
    finished = 4 * len(list((tmp_path / "s.csv.partial" / "portions").glob("*.npy")))
    assert finished > 0
    computed = []
    original = score_portions.score_row
    monkeypatch.setattr(score_portions, "score_row", lambda model, row: computed.append(row) or original(model, row))
    assert score(run_dir, inputs, tmp_path / "s.csv", "--resume") == 0
    assert len(computed) == sum(len(sequence) for _, sequence in PROTEINS[:2]) - finished
    assert content(tmp_path) == expected


def test_a_damaged_portion_is_computed_again(run_dir, inputs, expected, tmp_path, monkeypatch):
    killed(run_dir, inputs, tmp_path / "s.csv", "scoring", monkeypatch)
    portions = sorted((tmp_path / "s.csv.partial" / "portions").glob("*.npy"))
    portions[0].write_bytes(portions[0].read_bytes()[:100])
    portions[1].write_bytes(b"")
    (portions[0].parent / "000999.npy").write_bytes(b"nothing")
    assert score(run_dir, inputs, tmp_path / "s.csv", "--resume") == 0
    assert content(tmp_path) == expected


def test_an_unfinished_run_is_resumed_by_its_own_command_only(
    run_dir, inputs, expected, tmp_path, monkeypatch, failure
):
    out = tmp_path / "s.csv"
    killed(run_dir, inputs, out, "computing", monkeypatch)
    words = ["score", run_dir, inputs, "--all-singles", "--out", out, *MANY_PORTIONS]
    assert "an unfinished run for this output; go on with --resume" in failure(*words)
    assert "--strategy masked-marginals, not wt-marginals" in failure(*words, "--resume", "--strategy", "wt-marginals")
    assert "--window (left out), not 9" in failure(*words, "--resume", "--window", 9)
    other = write_fasta(tmp_path / "other.fasta", PROTEINS[:1])
    words[2] = other
    assert "made from other inputs than these" in failure(*words, "--resume")
    assert score(run_dir, inputs, out, "--force") == 0
    other.unlink()
    assert content(tmp_path) == expected


def test_mutants_are_part_of_the_inputs(run_dir, inputs, tmp_path, monkeypatch, failure):
    mutations = tmp_path / "m.csv"
    out = tmp_path / "s.csv"
    words = ["score", run_dir, inputs, "--mutations", mutations, "--wild-type", "b", "--out", out, *MANY_PORTIONS]
    mutations.write_text("mutant\nM1A\nS2A\n")
    with monkeypatch.context() as patch:
        kill_at(patch, workflow, "assay_report", 0)
        with pytest.raises(Killed):
            main([str(word) for word in words])
    mutations.write_text("mutant\nM1A\nS2C\n")
    assert "made from other inputs than these" in failure(*words, "--resume")


@pytest.mark.parametrize("moment", ["putting in place", "removing"])
def test_a_finished_run_is_not_taken_for_one_with_other_inputs(moment, run_dir, inputs, tmp_path, monkeypatch, failure):
    mutations, out = tmp_path / "m.csv", tmp_path / "s.csv"
    alignment = tmp_path / "a.a3m"
    alignment.write_text(f">q\n{PROTEINS[1][1]}\n")
    words = ["score", run_dir, inputs, "--mutations", mutations, "--wild-type", "b", "--alignment", alignment]
    words = [*words, "--out", out, *MANY_PORTIONS]
    mutations.write_text("mutant\nM1A\nS2A\n")
    with monkeypatch.context() as patch:
        kill_at(patch, *MOMENTS[moment])
        with pytest.raises(Killed):
            main([str(word) for word in words])
    mutations.write_text("mutant\nM1A\nS2C\n")
    assert "made from other inputs than these" in failure(*words, "--resume")
    mutations.write_text("mutant\nM1A\nS2A\n")
    alignment.write_text(f">q\n{PROTEINS[1][1]}\n>w\n{PROTEINS[1][1]}\n")
    assert "made from other inputs than these" in failure(*words, "--resume")
    alignment.write_text(f">q\n{PROTEINS[1][1]}\n")
    assert "--heat-map (left out), not " in failure(*words, "--resume", "--heat-map", tmp_path / "h.png")
    assert main([*map(str, words), "--resume"]) == 0
    assert out.read_text().count("\n") == 3
    assert not out.with_name("s.csv.partial").exists()


@pytest.mark.parametrize("moment", ["scoring", "putting in place"])
def test_a_picture_that_another_made_meanwhile_is_not_replaced(moment, run_dir, inputs, tmp_path, monkeypatch, failure):
    out, picture = tmp_path / "s.csv", tmp_path / "h.png"
    arguments = ["--wild-type", "b", "--heat-map", picture]
    killed(run_dir, inputs, out, moment, monkeypatch, *arguments)
    made = picture.read_bytes() if picture.exists() else None
    # The picture is put in place right before the table.
    assert (made is None) == (moment == "scoring")
    words = ["score", run_dir, inputs, "--all-singles", "--out", out, *MANY_PORTIONS, *arguments, "--resume"]
    if made is None:
        picture.write_bytes(b"mine")
        assert "exists already; choose another --heat-map" in failure(*words)
        assert picture.read_bytes() == b"mine"
        picture.unlink()
    assert main([str(word) for word in words]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_one_line_and_what_is_finished_is_kept(run_dir, inputs, tmp_path, monkeypatch, failure):
    out = tmp_path / "s.csv"
    killed(run_dir, inputs, out, "scoring", monkeypatch)
    folder = tmp_path / "s.csv.partial"
    path = folder / "log_probabilities.npy"
    path.unlink()
    path.symlink_to("/dev/full")
    line = failure("score", run_dir, inputs, "--all-singles", "--out", out, *MANY_PORTIONS, "--resume")
    assert "No space left on device; what is finished is kept in " in line
    path.unlink()
    assert score(run_dir, inputs, out, "--resume") == 0


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_give_the_bytes_of_one(launcher, run_dir, inputs, expected, tmp_path):
    status, shown, errors = run_on_two(
        launcher, "score", run_dir, inputs, "--all-singles", "--out", tmp_path / "s.csv", *MANY_PORTIONS, "--json"
    )
    assert status == 0, errors
    # One report, of the first process.
    assert json.loads(shown)["num_proteins"] == 3
    assert content(tmp_path) == expected


def test_a_second_process_alone_makes_nothing(run_dir, inputs, tmp_path, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "tests", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    from protlm.workflows import portion_devices

    monkeypatch.setattr(portion_devices, "join", lambda *_: None)
    assert score(run_dir, inputs, tmp_path / "s.csv", "--devices", "2") == 0
    assert list(tmp_path.iterdir()) == []
