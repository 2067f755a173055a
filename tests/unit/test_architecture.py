"""The pages on structure and file formats against the code: no file, column or key is missing on either side."""

import re
import tomllib
from pathlib import Path

import pytest

from protlm.data.embeddings.kinds import KINDS
from protlm.data.storage.manifest import Manifest
from protlm.data.storage.shards import OPTIONAL_COLUMNS, REQUIRED_COLUMNS, TOKENS
from protlm.pretrained.model_description import ModelDescription
from protlm.workflows.evaluate.report import EvalReport, SplitReport
from protlm.workflows.train.run_folder import RUN_FILES
from protlm.workflows.train.run_tables import HEALTH, METRICS, SPEED

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FORMATS = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
SUFFIXES = (".py", ".cpp", ".h")


def described_files() -> list[str]:
    """Returns the paths that the tree names: a line holds names, two spaces or more, and their description."""
    paths: list[str] = []
    folders: list[str] = []
    tree = re.search(r"^## The tree$.*?^```text\n(.*?)^```$", ARCHITECTURE, re.MULTILINE | re.DOTALL)[1]
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        names = re.split(r" {2,}", line.strip())[0].split()
        if not all(name.endswith(("/", *SUFFIXES)) for name in names):
            continue  # a description that goes on
        del folders[indent // 2 :]
        if names[0].endswith("/"):
            folders.append(names[0])
            names = names[1:]
        paths += ["".join(folders) + name for name in names]
    return [path for path in paths if path.startswith("protlm/")]


def table(title: str) -> dict[str, str]:
    """Returns a table of the page on formats by what stands in code in its first column: the rest of the row."""
    lines = FORMATS[FORMATS.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
    cells = [re.match(r"\| (.*?) \| (.*) \|", line).groups() for line in lines]
    return {name: rest for first, rest in cells for name in re.findall(r"`([^`]+)`", first)}


def test_the_tree_names_every_file_once():
    described = described_files()
    files = {
        path.relative_to(ROOT).as_posix()
        for suffix in SUFFIXES
        for path in (ROOT / "protlm").rglob(f"*{suffix}")
        if path.name != "__init__.py" or path.parent.name in ("protlm", "layouts")
    }
    # A twin of a kernel stands beside it and is described with it.
    files = {path for path in files if not path.endswith("_twin.py")}
    assert sorted(described) == sorted(set(described))
    assert sorted(set(described) - files) == []
    assert sorted(files - set(described)) == []


def test_the_floors_are_those_of_the_contract():
    rules = re.search(r"^## Imports go one way$.*?^```text\n(.*?)^```$", ARCHITECTURE, re.MULTILINE | re.DOTALL)[1]
    # Beyond its name, a floor's line says how it is divided.
    floors = [re.split(r" {2,}", line.strip().removeprefix("> "))[0] for line in rules.splitlines()]
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    assert floors == contract["layers"]


def test_the_import_rules_name_every_room():
    rules = re.search(r"^## Imports go one way$.*?^```text\n(.*?)^```$", ARCHITECTURE, re.MULTILINE | re.DOTALL)[1]
    rooms = {path.parent.name if path.name == "__init__.py" else path.stem for path in (ROOT / "protlm").glob("*.py")}
    rooms |= {path.parent.name for path in (ROOT / "protlm").glob("*/__init__.py")}
    named = set(re.findall(r"\w+", rules))
    assert sorted(rooms - named - {"protlm"}) == []


@pytest.mark.parametrize(
    ("file", "columns"), [("metrics.csv", METRICS), ("speed.csv", SPEED), ("health.csv", HEALTH)], ids=lambda x: str(x)
)
def test_the_columns_of_a_runs_tables_are_those_of_the_code(file, columns):
    listed = table("path in RUN")[file].partition(":")[2].partition(";")[0]
    assert tuple(re.findall(r"`([^`]+)`", listed)) == columns


def test_every_path_of_a_run_is_documented():
    names = {re.split("[/…]", name)[0] for name in table("path in RUN")}
    assert names == RUN_FILES - {"wandb"}


def test_the_columns_of_a_shard_are_those_of_the_code():
    assert sorted(table("column of a shard")) == sorted((TOKENS, *REQUIRED_COLUMNS, *OPTIONAL_COLUMNS))


def test_the_kinds_of_embedding_are_those_of_the_code():
    groups = {name.partition("/")[0] for name in table("column of embeddings")}
    assert groups == {*KINDS, "ids", "sequence_hash"}


@pytest.mark.parametrize(
    ("title", "keys"),
    [
        ("key of `manifest.json`", set(Manifest.model_fields)),
        ("key of `config.json`", set(ModelDescription.model_fields)),
        ("key of `report.json`", set(EvalReport.__dataclass_fields__)),
        ("key of a split", set(SplitReport.__dataclass_fields__)),
    ],
    ids=["manifest", "model", "report", "split"],
)
def test_the_keys_of_a_json_file_are_those_of_the_code(title, keys):
    assert set(table(title)) == keys
