"""The laws of attention are tested on every backend, and no figure is drawn."""

import pytest

from protlm.ops import compiled
from tests.conftest import empty_figures

ATTENTION = ("test_causality.py", "test_favor_laws.py")


def pytest_generate_tests(metafunc):
    if metafunc.definition.path.name in ATTENTION:
        metafunc.parametrize("_backend", ["torch", "cpp"], indirect=True, scope="session")


@pytest.fixture(scope="session", autouse=True)
def _backend(request):
    """Leaves one backend to `auto`."""
    backend = getattr(request, "param", None)
    with pytest.MonkeyPatch.context() as patch:
        if backend == "torch":
            patch.setattr(compiled, "why_not", lambda: "a test takes torch")
        elif backend == "cpp" and compiled.why_not():
            pytest.skip(compiled.why_not())
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_figures():
    """Datasets are prepared by the hundred, each with a report."""
    with empty_figures():
        yield
