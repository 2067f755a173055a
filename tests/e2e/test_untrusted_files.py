"""Links to themselves, pipes and devices in the place of every path that a command takes: one line, and no waiting."""

import os
import subprocess
import sys

import pytest

from tests.e2e.prep_tools import SAMPLE


@pytest.fixture
def special(tmp_path):
    """The path of a special file by its name."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path.joinpath


@pytest.mark.parametrize("name", ["loop", "zeros", "pipe"])
def test_as_an_output_it_is_refused(special, name, dataset, run_dir, fasta, tmp_path, failure):
    before = sorted(path.name for path in tmp_path.iterdir())
    for option in ([], ["--force"]):
        failure("prep", fasta, "--out", special(name), *option)
        failure("train", dataset, "--out", special(name), "--max-steps", 1, *option)
        failure("eval", run_dir, dataset, "--out", special(name), *option)
        failure("eval", "--compare", run_dir, run_dir, dataset, "--out", special(name), *option)
        for layout in ("protlm", "npy"):
            failure("embed", run_dir, fasta, "--out", special(name), "--layout", layout, *option)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["loop", "zeros", "pipe"])
def test_as_a_dataset_a_model_a_report_or_settings_it_is_refused(special, name, dataset, run_dir, fasta, failure):
    failure("inspect", special(name))
    failure("train", special(name), "--out", special("run"))
    failure("train", dataset, "--out", special("run"), "--config", special(name))
    failure("train", dataset, "--out", special("run"), "--init", special(name))
    failure("eval", special(name), dataset, "--out", special("report"))
    failure("eval", run_dir, special(name), "--out", special("report"))
    failure("eval", "--compare", special(name), run_dir, dataset, "--out", special("report"))
    failure("embed", special(name), fasta, "--out", special("embeddings"))
    failure("config", special(name))


@pytest.mark.parametrize("name", ["loop", "zeros"])
def test_as_proteins_or_labels_it_is_refused(special, name, run_dir, fasta, failure):
    failure("prep", special(name), "--out", special("dataset"))
    failure("embed", run_dir, special(name), "--out", special("embeddings"))
    failure("prep", fasta, "--out", special("dataset"), "--clusters", special(name))


def test_proteins_and_labels_may_come_through_pipes(tmp_path):
    lines = f"zcat '{SAMPLE}' | head -n 400"
    clusters = f"{lines} | awk '/^>/ {{print NR \"\\t\" substr($1, 2)}}'"
    command = (
        f"'{sys.executable}' -m protlm.cli.app prep <({lines}) --out '{tmp_path / 'dataset'}' "
        f"--split cluster --clusters <({clusters})"
    )
    subprocess.run(["bash", "-c", command], check=True, timeout=120)
    assert (tmp_path / "dataset" / "manifest.json").is_file()
