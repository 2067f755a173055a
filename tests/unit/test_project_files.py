import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from protlm import __version__
from protlm.data import compiled as parser
from protlm.ops import compiled as kernels

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PREFIX = "Programming Language :: Python :: 3."
SUPPORTED = [
    line.removeprefix("Programming Language :: Python :: ")
    for line in PYPROJECT["project"]["classifiers"]
    if line.startswith(PREFIX)
]


def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


def test_supported_pythons_begin_with_the_required_one():
    assert SUPPORTED
    assert PYPROJECT["project"]["requires-python"] == f">={SUPPORTED[0]}"


def test_continuous_integration_runs_the_tests_on_every_supported_python():
    assert workflow("ci.yml")["jobs"]["tests"]["strategy"]["matrix"]["python-version"] == SUPPORTED


def test_wheels_are_built_for_every_supported_python():
    assert PYPROJECT["tool"]["cibuildwheel"]["build"] == [f"cp{version.replace('.', '')}-*" for version in SUPPORTED]


@pytest.mark.skipif(parser.why_not() is not None, reason=str(parser.why_not()))
@pytest.mark.skipif(kernels.why_not() is not None, reason=str(kernels.why_not()))
@pytest.mark.parametrize("system", ["linux", None])
def test_what_is_tried_in_a_new_wheel_can_be_run(system, tmp_path):
    settings = PYPROJECT["tool"]["cibuildwheel"]
    for command in (settings[system] if system else settings)["test-command"]:
        program, *words = shlex.split(command)
        executable = [sys.executable] if program == "python" else [sys.executable, "-m", "protlm.cli.app"]
        subprocess.run([*executable, *words], check=True, cwd=tmp_path, capture_output=True)


def test_the_image_has_a_supported_python():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG PYTHON=(.*)$", dockerfile, re.MULTILINE)[1] in SUPPORTED


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_call_only_make_targets_that_exist(path):
    called = re.findall(r"run: make (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert {target for line in called for target in line.split()} <= make_targets()


def test_continuous_integration_runs_every_target_of_make_check():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    checks = re.search(r"^check:(.*)$", makefile, re.MULTILINE)[1].split()
    steps = [step for job in workflow("ci.yml")["jobs"].values() for step in job["steps"]]
    assert {f"make {target}" for target in checks} <= {step.get("run") for step in steps}


def make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    assert set(re.search(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)[1].split()) == targets
    return targets


def test_the_table_of_make_targets_is_complete():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Make targets\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE)) == make_targets()


def test_every_make_target_named_in_the_documents_exists():
    for path in (ROOT / "CONTRIBUTING.md", ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        named = re.findall(r"`make ([a-z-]+)", path.read_text(encoding="utf-8"))
        assert set(named) <= make_targets(), path.name


def test_the_changelog_has_a_heading_for_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(__version__)}\] - ", changelog, re.MULTILINE)
