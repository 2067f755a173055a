import json
import subprocess
import sys
from pathlib import Path

import pytest

from protlm import open_embeddings
from tests.e2e.conftest import write_fasta

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"


def run_demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DEMO), "--fasta", "small.fasta", "--out", "demo", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, proteins) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_fasta(folder / "small.fasta", proteins)
    return folder


def test_the_demo_runs_the_four_commands_and_says_where_their_results_are(folder, proteins):
    demo = run_demo(folder, "--max-steps", "2")
    shown = [line.split()[2] for line in demo.stdout.splitlines() if line.startswith("$ protlm ")]
    assert shown == ["prep", "train", "eval", "embed"], demo.stderr
    report = json.loads((folder / "demo/report/report.json").read_text())
    for name, key in (("model", "model"), ("empirical baseline", "empirical")):
        row = [name, f"{report[key]['accuracy']:.4f}", f"{report[key]['perplexity']:.3f}"]
        assert " ".join(row) in [" ".join(line.split()) for line in demo.stdout.splitlines()]
    for place in ("demo/run/curves.png", "demo/embeddings.h5", "demo/run/model", "demo/report/report.json"):
        assert place in demo.stdout.split("empirical baseline")[1]
        assert (folder / place).exists()
    assert len(open_embeddings(folder / "demo/embeddings.h5")) == len(proteins)
    # Two updates teach nothing: by this the demo shows that it can fail.
    assert demo.returncode == 1
    assert demo.stderr.splitlines()[-1].startswith("error: the model does not beat the empirical baseline in ")


def test_a_failing_command_ends_the_demo_with_its_status(tmp_path):
    write_fasta(tmp_path / "small.fasta", [("bad", "MKT1")])
    demo = run_demo(tmp_path)
    assert demo.returncode == 1
    assert demo.stderr.startswith("error: small.fasta:2: ")
    assert demo.stderr.count("\n") == 1
    assert demo.stdout.count("$ protlm") == 1
    assert not (tmp_path / "demo" / "dataset").exists()
