"""The tools of the tests of prep: running it, and reading the dataset that it made."""

import hashlib
import json
from pathlib import Path

from protlm import vocabulary
from protlm.cli.app import main
from protlm.data.storage.dataset import open_dataset
from protlm.workflows.prep.options import PrepRequest
from protlm.workflows.prep.prepare import prepare

SAMPLE = Path(__file__).parents[2] / "data" / "trembl_sample.fasta.gz"
SAMPLE_OPTIONS = {
    "shard_residues": 200_000, "valid_fraction": 0.1, "test_fraction": 0.1, "on_bad_record": "skip", "min_length": 2,
}  # fmt: skip
"""Of the dataset that the fixtures `sample_files` and `sample_digests` are about."""
SAMPLE_WORDS = ("--shard-residues", "200000", "--valid-fraction", "0.1", "--test-fraction", "0.1")


def prepare_sample(inputs, out, **options):
    """Prepares the files of the fixture `sample_files`, and returns the report."""
    return prepare(PrepRequest(inputs=inputs, out=out, **SAMPLE_OPTIONS, **options))


def sequences(out, name):
    split = open_dataset(out).split(name)
    return [vocabulary.decode(split.tokens(index)) for index in range(len(split))]


def ids(out, name):
    split = open_dataset(out).split(name)
    return [split.id(index) for index in range(len(split))]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def run_json(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_line(capsys, *arguments):
    """Returns the one line of an error after exit 1."""
    assert main([*map(str, arguments)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    return told.err
