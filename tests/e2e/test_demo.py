import json
import os
import subprocess
import sys
from pathlib import Path

from protlm import open_embeddings
from tests.e2e.conftest import write_fasta

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"
NUM_PROTEINS = 60


def run_demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # One thread, as for all tests (conftest): on a busy machine two would mostly wait for each other.
    return subprocess.run(
        [sys.executable, str(DEMO), "--fasta", "small.fasta", "--out", "demo", *arguments],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_demo_runs_the_four_commands_and_says_where_their_results_are(tmp_path, proteins):
    write_fasta(tmp_path / "small.fasta", proteins[:NUM_PROTEINS])
    demo = run_demo(tmp_path, "--max-steps", "2")
    shown = [line.split()[2] for line in demo.stdout.splitlines() if line.startswith("$ protlm ")]
    assert shown == ["prep", "train", "eval", "embed"], demo.stderr
    report = json.loads((tmp_path / "demo/report/report.json").read_text())
    for name, key in (("model", "model"), ("empirical baseline", "empirical")):
        row = [name, f"{report[key]['accuracy']:.4f}", f"{report[key]['perplexity']:.3f}"]
        assert " ".join(row) in [" ".join(line.split()) for line in demo.stdout.splitlines()]
    for place in ("demo/run/curves.png", "demo/embeddings.h5", "demo/run/model", "demo/report/report.json"):
        assert place in demo.stdout.split("empirical baseline")[1]
        assert (tmp_path / place).exists()
    assert len(open_embeddings(tmp_path / "demo/embeddings.h5")) == NUM_PROTEINS
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
