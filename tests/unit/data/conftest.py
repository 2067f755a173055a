import pytest

from protlm.data import compiled


@pytest.fixture(params=["compiled", "NumPy"])
def with_and_without_the_library(request, monkeypatch):
    """Runs a test once with the compiled library and once without it, in NumPy."""
    if request.param == "NumPy":
        monkeypatch.setattr(compiled, "load", lambda: "hidden by this test")
    elif not compiled.is_available():
        pytest.skip(f"the compiled FASTA parser: {compiled.why_not()}")
