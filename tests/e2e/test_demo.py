"""The demo: its four commands work together, and a failure ends it."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from protlm import open_embeddings, read_records
from protlm.cli.app import main
from scripts import demo
from tests.e2e.conftest import write_fasta

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"
FAMILIES = Path(__file__).parents[2] / "data" / "families"
NUM_PROTEINS = 60


class InThisProcess:
    """A protlm command where the demo starts a process: four of them would import for longer than they work."""

    def __init__(self, command: list[str]) -> None:
        assert command[:3] == [sys.executable, "-m", "protlm.cli.app"]
        self.status = main(command[3:])

    def wait(self) -> int:
        return self.status


def test_the_demo_runs_the_four_commands_and_says_where_their_results_are(tmp_path, proteins, monkeypatch, capsys):
    write_fasta(tmp_path / "small.fasta", proteins[:NUM_PROTEINS])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--fasta", "small.fasta", "--out", "demo", "--max-steps", "2"])
    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(Popen=InThisProcess))
    with pytest.raises(SystemExit) as ended:
        demo.main()
    told = capsys.readouterr()
    shown = [line.split()[2] for line in told.out.splitlines() if line.startswith("$ protlm ")]
    assert shown == ["prep", "train", "eval", "embed"], told.err
    scores = json.loads((tmp_path / "demo/report/report.json").read_text())["splits"]["test"]["scores"]
    for name, key in (("model", "model"), ("empirical baseline", "empirical"), ("Markov, both sides", "two_sided")):
        row = [name, f"{scores[key]['accuracy']:.4f}", f"{scores[key]['perplexity']:.3f}"]
        assert " ".join(row) in [" ".join(line.split()) for line in told.out.splitlines()]
    for place in ("demo/run/curves.png", "demo/embeddings.h5", "demo/run/model", "demo/report/report.html"):
        assert place in told.out.split("Markov, both sides")[-1]
        assert (tmp_path / place).exists()
    assert len(open_embeddings(tmp_path / "demo/embeddings.h5")) == NUM_PROTEINS
    # Two updates teach nothing: by this the demo shows that it can fail.
    # A message as the code is printed, and the status is 1.
    assert str(ended.value.code).startswith("error: the model does not beat the empirical")


def test_without_a_file_the_demo_learns_the_families_and_scores_both_held_out_splits(tmp_path, monkeypatch):
    commands = []
    report = {"split": "test", "splits": {}}

    def note(*words):
        commands.append([str(word) for word in words])
        if words[0] == "eval":
            folder = tmp_path / "report"
            folder.mkdir()
            (folder / "report.json").write_text(json.dumps(report))

    monkeypatch.setattr(demo, "run_command", note)
    assert demo.run_road(None, tmp_path, 7) == report
    prep, train, evaluated, embed = commands
    for path in [word for word in prep if word.startswith("/")]:
        assert str(tmp_path) in path or Path(path).exists(), path
    assert train[-3:] == ["--max-steps", "7", "--force"]
    assert [evaluated[place + 1] for place, word in enumerate(evaluated) if word == "--split"] == ["test", "ood"]
    shown = evaluated[evaluated.index("--attention") + 1]
    assert any(record.id == shown for name in ("test", "ood") for record in read_records(FAMILIES / f"{name}.fasta.gz"))
    assert embed[2] == prep[1]


@pytest.mark.parametrize(
    ("model", "markov", "unbeaten"),
    [
        (7.0, 12.0, []),
        (13.0, 12.0, ["markov"]),
        (19.0, 12.0, ["empirical", "markov"]),
        (math.nan, 12.0, ["empirical", "markov"]),
    ],
)
def test_the_demo_knows_which_baselines_are_unbeaten(model, markov, unbeaten):
    rows = {"model": model, "empirical": 17.0, "markov": markov}
    scores = {name: {"perplexity": perplexity} for name, perplexity in rows.items()}
    report = {"split": "test", "splits": {"test": {"scores": scores}}}
    assert demo.unbeaten_baselines(report) == unbeaten


def test_a_failing_command_ends_the_demo_with_its_status(tmp_path):
    """As a user runs it: the script, and the command in a process of its own."""
    write_fasta(tmp_path / "small.fasta", [("bad", "MKT1")])
    ended = subprocess.run(
        [sys.executable, str(DEMO), "--fasta", "small.fasta", "--out", "demo"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: small.fasta:2: ")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout.count("$ protlm") == 1
    assert not (tmp_path / "demo" / "dataset").exists()
