"""Files of others: links to themselves, pipes and devices in the place of every path, and shards that lie.

Whatever it is ends a command with one line, and nobody waits for it.
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests.e2e.prep_tools import SAMPLE
from tests.hdf5_edits import edit


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


def commands_on(dataset, run_dir, tmp_path):
    """All commands that read the proteins of a dataset's training split."""
    yield "inspect", dataset, "--verify"
    yield "train", dataset, "--out", tmp_path / "run", "--max-steps", 3
    yield "eval", run_dir, dataset, "--out", tmp_path / "report"
    yield "embed", run_dir, dataset, "--split", "train", "--out", tmp_path / "embeddings"


@pytest.mark.parametrize("token", [0, 29, 33, 255])
def test_tokens_that_are_no_residues_are_refused_by_all_commands(token, dataset, run_dir, tmp_path, failure):
    shutil.copytree(dataset, tmp_path / "dataset")
    edit(tmp_path / "dataset" / "train-00000.h5", lambda file: file["tokens"].__setitem__(5, token))
    for command in commands_on(tmp_path / "dataset", run_dir, tmp_path):
        assert "damaged" in failure(*command)


def test_a_record_without_residues_is_refused_by_all_commands(dataset, run_dir, tmp_path, failure):
    shutil.copytree(dataset, tmp_path / "dataset")

    def empty_the_second(file):
        file["offsets"][2] = file["offsets"][1]

    edit(tmp_path / "dataset" / "train-00000.h5", empty_the_second)
    for command in commands_on(tmp_path / "dataset", run_dir, tmp_path):
        assert "offsets: expected records of at least one residue, got an empty one" in failure(*command)
