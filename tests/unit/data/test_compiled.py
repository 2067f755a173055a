import functools
import importlib.machinery

import pytest

from protlm.data import compiled
from protlm.data.parsing.compiled_fasta import parse_fasta


def test_without_the_library_there_is_a_reason_and_no_crash(monkeypatch):
    monkeypatch.setattr(compiled, "load", functools.partial(compiled.load, "protlm.data.parsing._no_such_parser"))
    assert not compiled.is_available()
    assert "compiler" in compiled.why_not()
    with pytest.raises(RuntimeError, match="not available: it was not built"):
        parse_fasta(b">a\nM")


def test_a_damaged_library_is_not_used(monkeypatch, tmp_path):
    (tmp_path / f"damaged_parser{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    monkeypatch.syspath_prepend(tmp_path)
    assert "cannot be loaded" in compiled.load("damaged_parser")


@pytest.mark.skipif(not compiled.is_available(), reason=f"the compiled FASTA parser: {compiled.why_not()}")
def test_a_library_of_another_version_is_not_used():
    assert "install protlm again" in compiled.load(version=999)
