import importlib.machinery

import pytest

from protlm.data import compiled
from protlm.data.parsing.compiled_fasta import parse_fasta


@pytest.fixture
def unloaded():
    """Makes the library be loaded anew, and once more after the test."""
    compiled._load.cache_clear()
    yield
    compiled._load.cache_clear()


@pytest.mark.usefixtures("unloaded")
def test_without_the_library_there_is_a_reason_and_no_crash(monkeypatch):
    monkeypatch.setattr(compiled, "_EXTENSION", "protlm.data.parsing._no_such_parser")
    assert not compiled.is_available()
    assert "compiler" in compiled.why_not()
    with pytest.raises(RuntimeError, match="not available: it was not built"):
        parse_fasta(b">a\nM")


@pytest.mark.usefixtures("unloaded")
def test_a_damaged_library_is_not_used(monkeypatch, tmp_path):
    (tmp_path / f"damaged_parser{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(compiled, "_EXTENSION", "damaged_parser")
    assert "cannot be loaded" in compiled.why_not()


@pytest.mark.skipif(not compiled.is_available(), reason=f"the compiled FASTA parser: {compiled.why_not()}")
@pytest.mark.usefixtures("unloaded")
def test_a_library_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(compiled, "_VERSION", compiled._VERSION + 1)
    assert "install protlm again" in compiled.why_not()
