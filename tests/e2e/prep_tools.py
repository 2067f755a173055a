"""What the tests of prep share: running it, and looking at what it made."""

import hashlib
import json
from pathlib import Path

from protlm import vocabulary
from protlm.cli.app import main
from protlm.data.storage.dataset import open_dataset

SAMPLE = Path(__file__).parents[2] / "data" / "trembl_sample.fasta.gz"


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
