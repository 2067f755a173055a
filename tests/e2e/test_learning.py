"""What a user sees who trains for minutes on real proteins."""

import json
import subprocess
import sys

import pytest

from protlm import open_embeddings
from tests.conftest import TEST_DATA

pytestmark = pytest.mark.slow


def protlm(*words):
    # Processes of their own, with all threads, as users run them.
    subprocess.run([sys.executable, "-m", "protlm.cli.app", *map(str, words)], check=True)


@pytest.fixture(scope="module")
def families_run(tmp_path_factory):
    folder, families = tmp_path_factory.mktemp("families"), TEST_DATA / "families"
    protlm("prep", families / "train.fasta.gz", "--test-input", families / "iid.fasta.gz", "--ood-input",
           families / "held.fasta.gz", "--out", folder / "dataset")  # fmt: skip
    protlm("train", folder / "dataset", "--out", folder / "run", "--config", "tiny")
    return folder


def test_tiny_learns_protein_families(families_run):
    protlm("eval", families_run / "run", families_run / "dataset", "--out", families_run / "iid")
    report = json.loads((families_run / "iid" / "report.json").read_text())
    assert report["model"]["accuracy"] >= 0.40
    assert report["model"]["perplexity"] < report["empirical"]["perplexity"]


def test_titin_is_embedded_in_one_pass(families_run, shared_data, tmp_path):
    protlm("embed", families_run / "run", shared_data / "long" / "proteins_gt8000aa.fasta.gz", "--out",
           tmp_path / "long.h5", "--include", "per-residue", "--dtype", "float16")  # fmt: skip
    lengths = {len(array) for array in open_embeddings(tmp_path / "long.h5").values()}
    assert 34_350 in lengths
