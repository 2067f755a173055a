import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer

import protlm
import protlm.ops
from protlm import __version__
from protlm.cli.app import app, main
from protlm.config_files import load_config, shipped_configs
from protlm.model.performer import Performer
from protlm.ops import backends

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "pytorch_lightning", "h5py", "matplotlib", "Bio")


def test_the_package_list_names_every_folder_with_code():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "protlm").rglob("*.py")}
    initialised = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "protlm").rglob("__init__.py")
    }
    assert folders == initialised
    assert sorted(listed) == sorted({*initialised, "protlm.configs"})


def test_every_configuration_in_the_checkout_is_shipped():
    assert shipped_configs() == sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_and_builds(path):
    config = load_config(path.stem)
    assert load_config(path) == config
    with torch.device("meta"):
        model = Performer(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def assert_loads_nothing_heavy(code):
    names = ", ".join(repr(name) for name in HEAVY)
    done = run(
        f"import sys\n{code}\nloaded = [name for name in ({names}) if name in sys.modules]\nassert not loaded, loaded"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", ["import protlm", "import protlm.cli.app"])
def test_importing_loads_nothing_heavy(code):
    assert_loads_nothing_heavy(code)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["config"], *([command, "--help"] for command in typer.main.get_command(app).commands)],
    ids=" ".join,
)
def test_help_version_and_config_load_nothing_heavy_and_answer_fast(arguments):
    assert_loads_nothing_heavy(f"from protlm.cli.app import app, main; assert main({arguments!r}) == 0")
    answer, typer_alone = [], []
    for _ in range(3):
        # By turns: on a busy machine both take longer, their ratio hardly changes.
        typer_alone.append(cpu_seconds("-c", "import typer"))
        answer.append(cpu_seconds("-m", "protlm.cli.app", *arguments))
    assert min(answer) < (11 if arguments == ["config"] else 5.5) * min(typer_alone)


def cpu_seconds(*words):
    """Returns the time of the processor that a Python takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_public_names_resolve():
    for name in protlm.__all__:
        assert getattr(protlm, name) is not None
        assert name in dir(protlm)
    with pytest.raises(AttributeError, match="no attribute 'surprise'"):
        _ = protlm.surprise
    for name in ("backends", "draw_projection", "favor_attention", "kernel_features"):
        assert callable(getattr(protlm.ops, name))
        assert name in protlm.ops.__all__


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "protlm" / "py.typed").is_file()


def test_version_tells_on_request_what_protlm_builds_on_and_what_runs_here(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"protlm {__version__}\n"
    assert main(["--version", "--verbose"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"protlm {__version__}"
    assert any(line.startswith("torch ") for line in lines)
    assert {f"attention, {name}: {what}" for name, what in backends().items()} < set(lines)
