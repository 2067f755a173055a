"""A small real dataset and a run of three steps, made once by the real commands."""

import gzip
import itertools
from pathlib import Path

import pytest

from protlm import read_records
from protlm.cli.app import main
from protlm.data.parsing.sources import SourceBlocks
from protlm.workflows.prep import reading as prep_reading
from tests.conftest import empty_figures
from tests.e2e.prep_tools import SAMPLE, digests, prepare_sample

SMALL = ["--set", "data.tokens_per_batch=1024", "--set", "model.model_dim=32", "--set", "model.ffn_dim=64",
         "--set", "model.num_heads=2", "--set", "model.num_features=16", "--set", "train.checkpoint_every_steps=2",
         "--set", "train.valid_every_steps=4", "--set", "data.max_length=500"]  # fmt: skip
"""Settings of a model that trains in a blink."""


@pytest.fixture(autouse=True)
def _quick_pictures(request) -> None:
    """Only the fixtures of a session save whole figures, and the tests of pages in a browser."""
    if "browser" not in request.path.name:
        request.getfixturevalue("quick_pictures")


def write_fasta(path: Path, proteins: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in proteins))
    return path


@pytest.fixture(scope="session")
def proteins() -> list[tuple[str, str]]:
    """120 real proteins of moderate length."""
    short = (record for record in read_records(SAMPLE) if 30 <= len(record.sequence) <= 300)
    return [(record.id, record.sequence) for record in itertools.islice(short, 120)]


@pytest.fixture(scope="session")
def fasta(tmp_path_factory, proteins) -> Path:
    return write_fasta(tmp_path_factory.mktemp("fasta") / "proteins.fasta", proteins)


def write_sample(folder: Path) -> list[Path]:
    """Writes the sample into three files, one of them compressed, with bad, repeated and short records among them."""
    records = gzip.decompress(SAMPLE.read_bytes()).removeprefix(b">").rstrip(b"\n").split(b"\n>")[:900]
    texts = [b"".join(b">" + record + b"\n" for record in records[start::3]) for start in range(3)]
    texts[1] += b">bad\nMK1\n>" + records[0] + b"\n>short\nM\n"
    texts[2] = gzip.compress(texts[2], mtime=0)
    paths = [folder / f"{number}.fasta" for number in range(3)]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text)
    return paths


@pytest.fixture
def sample_files(tmp_path) -> list[Path]:
    """The files of `write_sample`, in the folder of the test."""
    return write_sample(tmp_path)


@pytest.fixture(scope="session")
def sample_digests(tmp_path_factory) -> dict[str, str]:
    """The digest of each file of the dataset of `sample_files`, prepared in one go."""
    folder = tmp_path_factory.mktemp("sample")
    with empty_figures():  # as in the tests, whose files are compared with these
        prepare_sample(write_sample(folder), folder / "dataset")
    return digests(folder / "dataset")


@pytest.fixture
def small_pieces(monkeypatch) -> None:
    """Some ten pieces for each of the plain files."""
    monkeypatch.setattr(prep_reading, "PIECE_BYTES", 15_000)
    monkeypatch.setattr(SourceBlocks, "block_bytes", 5_000)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, fasta) -> Path:
    out = tmp_path_factory.mktemp("prep") / "dataset"
    assert main(["prep", str(fasta), "--out", str(out), "--valid-fraction", "0.1", "--test-fraction", "0.1"]) == 0
    return out


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, dataset) -> Path:
    out = tmp_path_factory.mktemp("train") / "run"
    assert main(["train", str(dataset), "--out", str(out), "--config", "tiny", *SMALL, "--max-steps", "9"]) == 0
    return out


@pytest.fixture
def failure(capsys):
    """Runs a command that must end with status 1 and exactly one line `error: …`; returns that line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert status == 1, captured.err
        errors = captured.err.splitlines()
        assert len(errors) == 1, captured.err
        assert errors[0].startswith("error: ")
        return errors[0]

    return run
