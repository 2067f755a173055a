"""The shared tools of the tests: tolerances, one measure of error, poisoned memory and the path of the shared data."""

import contextlib
import multiprocessing
import os
from pathlib import Path

# Triton's kernels run as Python here; it asks when they are defined, which is before any test.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import torch.utils._device

# Not from a module of the ops: those have to be imported after pytest has added the checks of annotations.
from protlm.gpu_check.tolerances import TOLERANCE

__all__ = ["TOLERANCE", "relative_error"]

SLOW_TIMEOUT_SECONDS = 1800

# `with torch.device(…)` knows these functions from its first use on, which must not be while a test has replaced some.
torch.utils._device._device_constructors()

# The machine may be doing something else; and threads split sums, which would make results depend on the machine.
torch.set_num_threads(1)


def relative_error(actual, expected):
    """Returns max|actual − expected| / max|expected|; NaN on either side gives NaN, which no bound accepts."""
    if actual.shape != expected.shape:
        raise AssertionError(f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    if not expected.numel():
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return difference / scale if scale else difference


@pytest.fixture(autouse=True)
def _poisoned_memory(request, monkeypatch):
    """Fills what torch.empty and its kin return with NaN in op tests, so that a value nobody wrote is seen."""
    if "reference" not in request.path.parts:
        return

    def poison(allocate):
        def poisoned(*arguments, **options):
            tensor = allocate(*arguments, **options)
            # Fake tensors hold no memory, and integers know no NaN.
            if type(tensor) is torch.Tensor and tensor.is_floating_point():
                tensor.fill_(torch.nan)
            return tensor

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def pytest_collection_modifyitems(items):
    """Gives the tests of `make test-slow` another time-out than pyproject.toml has for all."""
    for item in items:
        if item.get_closest_marker("slow") or item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_SECONDS))


@pytest.fixture(autouse=True)
def _no_process_is_left():
    """Ends the processes of a test that failed before it did so: pytest would wait for them at its end."""
    before = multiprocessing.active_children()
    yield
    for process in multiprocessing.active_children():
        # The workers of a cluster that several tests share are started anew when one is lost.
        if process not in before and not process.name.startswith("Dask Worker"):
            process.kill()


@contextlib.contextmanager
def empty_figures():
    """Saves every figure of matplotlib without what was plotted on it, for tests that look at none.

    To lay a figure out and to draw it takes a third of a second, more than all else that most of these tests do.
    """
    from matplotlib.figure import Figure

    save = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, *arguments, **options: save(Figure(), *arguments, **options))
        yield


@pytest.fixture
def quick_pictures():
    with empty_figures():
        yield


TEST_DATA = Path(__file__).parent / "data"
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
"""Real data beside the checkout, which a clean clone does not have."""


@pytest.fixture(scope="session")
def shared_data():
    """The folder of the shared data."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not there: this test needs the project's shared data")
    return SHARED_DATA


@pytest.fixture
def protein_file(request):
    """A function from a name in tests/data, or else in the shared data, to the path of the file."""

    def path_of(name):
        path = TEST_DATA / name
        return path if path.exists() else request.getfixturevalue("shared_data") / name

    return path_of
