"""The results of minutes of training on real proteins."""

import json
import subprocess
import sys

import pytest

from protlm import open_embeddings
from scripts.demo import FAMILIES

pytestmark = pytest.mark.slow


def protlm(*words):
    # Processes of their own, with all threads, as users run them.
    subprocess.run([sys.executable, "-m", "protlm.cli.app", *map(str, words)], check=True)


@pytest.fixture(scope="module")
def families_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    others = [word for name in ("valid", "test", "ood") for word in (f"--{name}-input", FAMILIES / f"{name}.fasta.gz")]
    protlm("prep", FAMILIES / "train.fasta.gz", *others, "--out", folder / "dataset")
    protlm("train", folder / "dataset", "--out", folder / "run", "--config", "tiny")
    return folder


def test_tiny_learns_protein_families(families_run):
    out = families_run / "report"
    protlm("eval", families_run / "run", families_run / "dataset", "--split", "test", "--split", "ood", "--out", out)
    splits = json.loads((out / "report.json").read_text())["splits"]
    # Of hidden residues, with the intervals of model and baseline apart.
    assert splits["test"]["scores"]["model"]["accuracy"] >= 0.42
    assert splits["ood"]["scores"]["model"]["accuracy"] >= 0.23
    for split in splits.values():
        for baseline in ("empirical", "markov"):
            assert split["scores"]["model"]["perplexity_high"] < split["scores"][baseline]["perplexity_low"]


def test_titin_is_embedded_in_one_pass(families_run, shared_data, tmp_path):
    protlm("embed", families_run / "run", shared_data / "long" / "proteins_gt8000aa.fasta.gz", "--out",
           tmp_path / "long.h5", "--include", "per-residue", "--dtype", "float16")  # fmt: skip
    lengths = {len(array) for array in open_embeddings(tmp_path / "long.h5").values()}
    assert 34_350 in lengths
