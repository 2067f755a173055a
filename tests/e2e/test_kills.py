"""prep, embed and train, new and with --force, killed before any of their file operations: nothing is lost.

At the moment of the kill the old output is there or the new one is; the next run makes the same bytes as one that was
not interrupted, or says in one line why not; and after it nothing lies beside the output.
"""

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import SMALL, write_fasta
from tests.forked import Forked
from tests.kill_points import KillPoint

LAYOUTS = {
    "protlm": ["--include", "per-residue", "--include", "mean"],
    "uniprot": ["--include", "per-residue"],
    "bio-embeddings": [],
    "biotrainer": ["--include", "per-residue"],
    "esm": [],
    "npz": ["--include", "per-residue"],
    "parquet": [],
    "npy": [],
}
COMMANDS = ["prep", "train", *(f"embed-{layout}" for layout in LAYOUTS)]
COMPANIONS = {"embed-bio-embeddings": ["mapping_file.csv"], "embed-npy": ["out.ids.txt"]}
SAMPLE_POINTS = 2


@dataclass
class Case:
    """A command whose output `out` lies in the working folder, and what of it has to be the same each time."""

    name: str
    words: Callable[[Path], list[Any]]
    content: Callable[[Path], dict[str, bytes]]

    def names(self) -> list[str]:
        """Returns what the command leaves in its folder."""
        return sorted(["out", *COMPANIONS.get(self.name, [])])


def whole(folder: Path) -> dict[str, bytes]:
    """Returns everything in a folder: names and bytes."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def of_run(folder: Path) -> dict[str, bytes]:
    """Returns what two equal runs share, and the names of the rest."""
    varying = ("run.json", "speed.csv", "tensorboard/", "curves.png", ".ckpt")
    return {
        name: b"" if any(part in name for part in varying) else content
        for name, content in whole(folder).items()
        if "tensorboard/" not in name
    }


@pytest.fixture(scope="module")
def few(tmp_path_factory, proteins) -> Path:
    return write_fasta(tmp_path_factory.mktemp("few") / "few.fasta", proteins[:8])


@pytest.fixture(scope="module")
def some(tmp_path_factory, proteins) -> Path:
    return write_fasta(tmp_path_factory.mktemp("some") / "some.fasta", proteins[:40])


@pytest.fixture(scope="module")
def tiny_dataset(tmp_path_factory, some) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "dataset"
    finished(Forked("prep", some, "--out", out, *PREP))
    return out


PREP = ["--valid-fraction", "0.2", "--test-fraction", "0.2", "--workers", "1"]


@pytest.fixture
def case(request, some, few, tiny_dataset, run_dir) -> Case:
    name = request.param
    if name == "prep":
        return Case(name, lambda folder: ["prep", some, "--out", folder / "out", *PREP], whole)
    if name == "train":
        words = ["--config", "tiny", *SMALL, "--max-steps", "4"]
        return Case(name, lambda folder: ["train", tiny_dataset, "--out", folder / "out", *words], of_run)
    layout = name.removeprefix("embed-")
    words = ["--layout", layout, "--tokens-per-batch", "300", *LAYOUTS[layout]]
    return Case(name, lambda folder: ["embed", run_dir, few, "--out", folder / "out", *words], whole)


def finished(process: Forked) -> str:
    """Waits for a command that has to succeed, and returns what it said on stderr."""
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


@pytest.fixture
def start(case, tmp_path) -> Callable[..., tuple[Path, KillPoint, Forked]]:
    """Starts the command in a folder of its own that holds what `old` holds, to be killed at an operation."""

    def start(number, *options, old=None):
        folder = tmp_path / f"at-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        if old is None:
            folder.mkdir()
        else:
            shutil.copytree(old, folder)
        point = KillPoint(number, tmp_path / "count")
        return folder, point, Forked(*case.words(folder), *options, prepare=point)

    return start


def check_all_points(case, start, tmp_path, *, force, points):
    """Kills the command at each of the points, a share of all or every one, and lets the next run go on."""
    old = tmp_path / "old"
    options = ["--force"] if force else []
    if force:
        # Another output than the new one, so that a mixture is seen.
        old.mkdir()
        changed = ["--seed", "7"] if case.name in ("prep", "train") else ["--dtype", "float16"]
        finished(Forked(*case.words(old), *changed))
    folder, point, process = start(None, *options, old=old if force else None)
    finished(process)
    expected, total = case.content(folder), point.count()
    assert sorted(path.name for path in folder.iterdir()) == case.names()
    before = case.content(old) if force else {}
    numbers = range(total) if points is None else sorted({total * (2 * n + 1) // (2 * points) for n in range(points)})
    for number in numbers:
        folder, _, process = start(number, *options, old=old if force else None)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, number
        if case.name != "train":
            assert of_out(case.content(folder)) in (of_out(before), of_out(expected)), number
        elif force:
            assert (folder / "out" / "config.toml").is_file(), number
        _, errors = go_on(case, folder, ["--force"] if force else ["--resume"], number)
        if errors:
            go_on(case, folder, ["--force"], number, may_fail=False)
        assert case.content(folder) == expected, number
        assert sorted(path.name for path in folder.iterdir()) == case.names(), number
        shutil.rmtree(folder)
    return total


def of_out(content: dict[str, bytes]) -> dict[str, bytes]:
    """Returns the output without what lies beside it."""
    return {name: data for name, data in content.items() if name == "out" or name.startswith("out/")}


def go_on(case, folder, options, number, *, may_fail=True):
    """Runs the command again; returns its status and, if it failed, the one line that it said."""
    process = Forked(*case.words(folder), *options)
    _, errors = process.communicate()
    if process.returncode == 0:
        return 0, ""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert may_fail, (number, errors)
    assert process.returncode == 1, (number, errors)
    assert len(lines) == 1, (number, errors)
    assert "Traceback" not in errors
    return 1, errors


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("case", COMMANDS, indirect=True)
def test_a_command_killed_before_some_of_its_file_operations_loses_nothing(case, start, tmp_path, force):
    assert check_all_points(case, start, tmp_path, force=force, points=SAMPLE_POINTS) > 10


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("case", COMMANDS, indirect=True)
def test_a_command_killed_before_any_of_its_file_operations_loses_nothing(case, start, tmp_path, force):
    check_all_points(case, start, tmp_path, force=force, points=None)
