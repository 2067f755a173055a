import json
import math
import os
import platform
import socket
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

import protlm
from protlm.config import ModelConfig, TrainConfig
from protlm.errors import RunError
from protlm.pretrained.model_description import ModelDescription, Origin, ValidScore
from protlm.runtime.devices import device_name
from protlm.vocabulary import RESIDUES
from protlm.workflows.train import run_description
from protlm.workflows.train.run_description import (
    Beginning,
    TrainingSet,
    checkout_commit,
    describe_session,
    read_run_description,
    write_run_description,
    write_session_end,
)

VALID = ValidScore(
    targets="hidden", num_targets=9, accuracy=0.3, perplexity=9.5, empirical_accuracy=0.1, empirical_perplexity=17.9
)
MODEL = ModelDescription(
    model=ModelConfig(), mask_rate=0.15, seed=0, step=345, residue_counts=dict.fromkeys(RESIDUES, 1), dataset_hash="ab"
)
SETTINGS = TrainConfig()
DATASETS = [TrainingSet(name="uniref", hash="ab" * 16, num_records=10, num_residues=3000)]


def session(command=("protlm", "train"), first_step=0, settings=SETTINGS):
    return describe_session(command, devices=2, num_nodes=3, strategy="fsdp", first_step=first_step, settings=settings)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.json"


def test_a_session_has_its_time_versions_and_devices():
    start = session(first_step=7)
    assert datetime.now(UTC) - datetime.fromisoformat(start.started) < timedelta(minutes=1)
    assert start.versions["protlm"] == protlm.__version__
    assert start.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(start.versions) == {"protlm", "torch", "pytorch-lightning", "numpy"}
    assert start.python == platform.python_version()
    assert (start.devices, start.num_nodes, start.strategy, start.first_step) == (2, 3, "fsdp", 7)
    assert (start.device, start.threads) == (device_name(), torch.get_num_threads())
    assert start.end is None
    assert (start.lr, start.muon_lr) == (SETTINGS.lr, SETTINGS.muon_lr)
    assert session(settings=TrainConfig(optimizer="adamw", lr=0.5)).muon_lr is None


def test_sessions_are_added_and_the_datasets_are_those_of_now(path):
    write_run_description(path, DATASETS, session())
    write_run_description(path, DATASETS, session(first_step=200))
    description = read_run_description(path)
    assert [start.first_step for start in description.sessions] == [0, 200]
    assert description.datasets == DATASETS
    content = json.loads(path.read_text())
    assert (content["format"], content["format_version"]) == ("protlm-run", 5)
    assert [entry.name for entry in path.parent.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        (None, None),
        ({}, "without valid split"),
        ({"unmeasured": True}, "unmeasured"),
        ({"valid": VALID}, "measured"),
        ({"valid": VALID.model_copy(update={"perplexity": math.inf})}, "measured"),
    ],
)
def test_the_end_is_that_of_the_last_session(path, changes, state):
    model = None if changes is None else MODEL.model_copy(update=changes)
    write_run_description(path, DATASETS, session())
    write_run_description(path, DATASETS, session(first_step=200))
    before = read_run_description(path)
    write_session_end(path, seconds=12.34567, outcome="out of time", last_step=345, model=model)
    killed, ended = read_run_description(path).sessions
    assert killed == before.sessions[0]
    assert ended.model_copy(update={"end": None}) == before.sessions[1]
    assert datetime.now(UTC) - datetime.fromisoformat(ended.end.time) < timedelta(minutes=1)
    end = ended.end
    assert (end.seconds, end.outcome, end.last_step) == (12.346, "out of time", 345)
    assert (end.valid, end.model) == (None if model is None else model.valid, state)
    assert json.loads(path.read_text())["sessions"][0]["end"] is None
    assert [entry.name for entry in path.parent.iterdir()] == ["run.json"]
    # The next start keeps it.
    write_run_description(path, DATASETS, session(first_step=345))
    assert read_run_description(path).sessions[1] == ended


def test_a_file_of_version_1_is_read_and_goes_on_as_one_of_this_version(path):
    write_run_description(path, DATASETS, session())
    content = json.loads(path.read_text())
    for key in ("device", "threads", "end"):
        del content["sessions"][0][key]
    del content["init_origin"]
    path.write_text(json.dumps({**content, "format_version": 1}))
    (earlier,) = read_run_description(path).sessions
    assert (earlier.device, earlier.threads, earlier.end) == (None, None, None)
    write_run_description(path, DATASETS, session(first_step=5))
    assert json.loads(path.read_text())["format_version"] == 5
    assert [start.first_step for start in read_run_description(path).sessions] == [0, 5]


def test_the_weights_that_a_run_began_with_are_kept_with_their_origin(path):
    origin = Origin(source="lab/model", family="esm", files={"model.bin": "00ff"})
    beginning = Beginning("1234", origin)
    write_run_description(path, DATASETS, session(), beginning)
    assert read_run_description(path).beginning == beginning
    assert Beginning.of(None) == Beginning(None, None)


def test_an_end_of_version_3_does_not_say_how_far_its_model_is_measured(path):
    write_run_description(path, DATASETS, session())
    write_session_end(path, seconds=1, outcome="finished", last_step=3, model=MODEL)
    content = json.loads(path.read_text())
    del content["sessions"][0]["end"]["model"]
    path.write_text(json.dumps({**content, "format_version": 3}))
    assert read_run_description(path).sessions[0].end.model is None


def test_no_folder_host_or_environment_is_written(path, monkeypatch):
    monkeypatch.setenv("PROTLM_SECRET", "hunter2hunter2")
    command = ["/opt/env/bin/protlm", "train", "/home/ada/uniref", "--out=/home/ada/run", "--set", "train.lr=1e-3"]
    write_run_description(path, DATASETS, session([*command, "data.x=~/ada", "../near"]))
    text = path.read_text()
    for secret in ("hunter2hunter2", "/home", "/opt", str(path.parent)):
        assert secret not in text
    assert socket.gethostname() not in json.loads(text)["sessions"][0]["platform"]
    expected = ["protlm", "train", "uniref", "--out=run", "--set", "train.lr=1e-3", "data.x=ada", "../near"]
    assert read_run_description(path).sessions[0].command == expected


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b'{"format": "protlm-model", "datasets": [], "sessions": []}',
                b'{"format": "protlm-run", "format_version": 6, "datasets": [], "sessions": []}']
)  # fmt: skip
def test_another_file_is_refused_in_one_line_and_stays(path, content):
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"run\.json: .*move the file away") as caught:
        write_run_description(path, DATASETS, session())
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def git(folder, *words):
    identity = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    try:
        git(tmp_path, "init", "--quiet")
    except FileNotFoundError:
        pytest.skip("there is no git here")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "One")
    return package


def test_a_session_has_the_commit_of_the_whole_package(monkeypatch):
    folders = []
    monkeypatch.setattr(run_description, "checkout_commit", lambda folder: folders.append(folder) or "c0ffee")
    assert session().commit == "c0ffee"
    assert [(folder / "__init__.py").resolve() for folder in folders] == [Path(protlm.__file__).resolve()]


def test_the_commit_of_a_checkout_shows_whether_files_differ(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert checkout_commit(checkout) == commit
    (checkout / "new.py").write_text("")
    assert checkout_commit(checkout) == f"{commit}+changes"


def test_code_installed_inside_another_checkout_has_no_commit(checkout):
    installed = checkout / "environment"
    installed.mkdir()
    (installed / "__init__.py").write_text("")
    assert checkout_commit(installed) is None


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert checkout_commit(checkout) is None


def test_a_pipe_in_the_place_of_the_description_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(RunError, match=r"run\.json: expected a regular file"):
        read_run_description(tmp_path / "run.json")
