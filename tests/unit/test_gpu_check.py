"""The check for a user's GPU: its arithmetic, what it calls a fault, and its report, on the CPU at small sizes."""

import contextlib
import functools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import protlm.gpu_check.__main__ as gpu_check
from protlm import ops
from protlm.gpu_check import parity, ranks, roofline, timing, waiting
from protlm.gpu_check.__main__ import Work, main, report
from protlm.gpu_check.tolerances import NAMES
from protlm.ops import favor_attention, local_attention
from protlm.ops.cuda import launch
from protlm.ops.feature_maps import DEFINITIONS
from tests import forked

SMALL = parity.Case(length=30, head_dim=16, features=32, heads=1)
WORK = Work(cases=[SMALL], rank_cases=[], steps=[], lengths=(16,), repeats=2, tokens=16, compiles=True)


def test_the_floor_is_that_of_the_largest_share():
    shape = roofline.Shape(batch=8, heads=8, length=8192, head_dim=64, features=256)
    # The figures of a hand calculation: 8 and 26 times 64·8192·256·64 operations at 989 Tflop/s.
    forward = roofline.floor_seconds(shape, roofline.PEAKS["NVIDIA H100 80GB HBM3"], has_backward=False)
    assert forward["products"] == pytest.approx(69.5e-6, rel=1e-2)
    assert forward["memory"] == pytest.approx(81.4e-6, rel=1e-2)
    assert forward["exponentials"] == pytest.approx(69.5e-6, rel=1e-2)
    both = roofline.floor_seconds(shape, roofline.PEAKS["NVIDIA H100 80GB HBM3"], has_backward=True)
    assert both["products"] == pytest.approx(225.8e-6, rel=1e-2)


def test_every_feature_map_is_compared():
    assert {case.feature_map for case in parity.cases()} == {*DEFINITIONS, "bare relu"}


@pytest.mark.parametrize("feature_map", ["positive", "regularised", "bare relu", "trig"])
def test_what_is_right_is_told_as_right(feature_map):
    case = replace(SMALL, feature_map=feature_map, segments=(9, 0, 1, 20), is_masked=True)
    (outcome,) = parity.compare_cases([case], "cpu", "torch")
    assert outcome.fault is None
    assert set(outcome.errors) == set(NAMES)


@pytest.mark.parametrize(
    "changes",
    [{"near_block": 8, "has_bias": True}, {"near_block": 8, "causal": True, "feature_map": "oprf"}, {"window": 4}],
    ids=str,
)
def test_causal_near_and_local_cases_are_compared(changes):
    case = replace(SMALL, segments=(9, 0, 1, 20), is_masked=True, **changes)
    (outcome,) = parity.compare_cases([case], "cpu", "torch")
    assert outcome.fault is None


def test_a_local_case_has_a_twin_of_its_own(monkeypatch):
    monkeypatch.setattr(parity, "local_attention", lambda q, k, v, **options: local_attention(q, k, v * 1.1, **options))
    (outcome,) = parity.compare_cases([replace(SMALL, window=4)], "cpu", "torch")
    assert outcome.fault.startswith("out by more than")


def test_steps_are_tried_and_their_faults_told(monkeypatch):
    chosen = [step for step in waiting.steps() if step.dtype == torch.float32 or step.name == "exact"]
    assert [outcome.fault for outcome in waiting.try_steps(chosen, "cpu")] == [None, None]

    @contextlib.contextmanager
    def strict(device):
        def item(tensor):
            raise RuntimeError("called a synchronizing CUDA operation")

        monkeypatch.setattr(torch.Tensor, "tolist", item)
        yield

    monkeypatch.setattr(waiting, "_errors_where_the_host_waits", strict)
    (outcome,) = waiting.try_steps([step for step in waiting.steps() if step.name == "exact"], "cpu")
    assert outcome.fault == "RuntimeError: called a synchronizing CUDA operation"


@pytest.mark.cuda
def test_every_kernel_runs_in_a_case():
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")
    small = [replace(SMALL, heads=64, batch=1, head_dim=16, length=20), replace(SMALL, length=300, is_masked=True)]
    outcomes = list(parity.compare_cases([*small, replace(SMALL, feature_map="relu")], "cpu", "triton"))
    assert [(outcome.fault, outcome.computed_by) for outcome in outcomes] == [(None, "triton")] * 3


def test_a_case_says_which_backend_computed_it():
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")
    covered, other = parity.compare_cases([SMALL, replace(SMALL, head_dim=256)], "cpu", "triton")
    assert (covered.fault, covered.computed_by) == (None, "triton")
    assert (other.fault, other.computed_by) == (None, "torch")


class _Off(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


@pytest.mark.parametrize(("factor", "told"), [(1.05, "q_grad"), (float("nan"), "q_grad")])
def test_a_gradient_that_is_off_is_a_fault(factor, told):
    def attention(q, k, v, projection, **options):
        return favor_attention(_Off.apply(q, factor), k, v, projection, **options)

    (outcome,) = parity.compare_cases([SMALL], "cpu", "torch", attention)
    assert outcome.fault.startswith(told)


def test_a_kernel_that_raises_and_one_that_changes_its_mind_are_faults():
    calls = []

    def attention(q, k, v, projection, **options):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no kernel image is available\nmore")
        return favor_attention(q, k, v + 1e-3 * len(calls), projection, **options)

    first, second = parity.compare_cases([SMALL, SMALL], "cpu", "torch", attention)
    assert first.fault == "RuntimeError: no kernel image is available"
    assert second.fault == "a second call gave other bits"


def _on_torch(attention, *tensors, **options):
    return attention(*tensors, **{**options, "backend": "torch"})


def test_the_report_has_a_row_for_everything(tmp_path, capsys, monkeypatch):
    # Neither a compiler nor the interpreter, which would take long, is what is tested here.
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    for name, attention in (("favor_attention", favor_attention), ("local_attention", local_attention)):
        monkeypatch.setattr(timing, name, functools.partial(_on_torch, attention))
    out = tmp_path / "check.json"
    assert report(out, "cpu", "torch", WORK) == 0
    content = json.loads(out.read_text())
    assert [row["fault"] for row in content["parity"]] == [None]
    rows = {(row["name"], row["backward"]): row for row in content["times"]}
    assert len(rows) == 24
    assert all("fault" in row or row["min_ms"] <= row["median_ms"] <= row["max_ms"] for row in rows.values())
    told = capsys.readouterr().out
    assert "1 of 1 cases are right" in told
    assert "no shares: the peaks of " in told
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"]


def test_a_wrong_case_is_exit_status_1(tmp_path):
    wrong = replace(SMALL, feature_map="unknown")
    assert report(tmp_path / "check.json", "cpu", "torch", replace(WORK, cases=[wrong], lengths=())) == 1


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_run(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpu_check, "_write", full)
    assert report(tmp_path / "check.json", "cpu", "torch", WORK) == 1
    told = capsys.readouterr()
    assert told.err.endswith("check.json cannot be written: No space left on device; give another --out\n")
    assert not told.out


def test_a_chosen_gpu_that_is_too_old_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ops, "backends", lambda: {"triton": "fused kernels"})
    monkeypatch.setattr(launch, "capability_of", lambda index: (75, 80)[index])
    assert main(["--out", str(tmp_path / "x.json")]) == 1
    assert capsys.readouterr().err == "error: --device: the kernels need compute capability 8.0, cuda:0 is older\n"


def test_a_gpu_on_which_nothing_runs_any_more_leaves_the_cases_in_the_report(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("an illegal memory access was encountered\nmore")

    monkeypatch.setattr(timing, "_measure_one", fail)
    assert report(tmp_path / "check.json", "cpu", "torch", WORK) == 1
    told = "error: no times can be taken (RuntimeError: an illegal memory access was encountered)"
    assert capsys.readouterr().err.startswith(told)
    content = json.loads((tmp_path / "check.json").read_text())
    assert ([row["fault"] for row in content["parity"]], content["times"]) == ([None], [])


def test_two_processes_are_checked_against_the_twin_of_one(monkeypatch):
    monkeypatch.setattr(ranks, "spawn", forked.spawn)
    chosen = [replace(SMALL, segments=(9, 0, 1, 20), is_masked=True), replace(SMALL, feature_map="unknown")]
    (right,) = ranks.compare_cases(chosen[:1], "cpu", "torch")
    assert (right.fault, right.computed_by) == (None, "torch")
    assert set(right.errors) == set(NAMES)
    (died,) = ranks.compare_cases(chosen, "cpu", "torch")
    assert (died.case, died.errors) == ("2 processes", {})
    assert died.fault.startswith("ValueError: feature_map: expected one of ")


def test_without_a_gpu_there_is_one_line(tmp_path):
    command = [sys.executable, "-m", "protlm.gpu_check", "--out", str(tmp_path / "x.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: PyTorch sees no CUDA device")
    assert ended.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_bad_usage_is_status_2(tmp_path, capsys, monkeypatch):
    out = tmp_path / "x.json"
    out.write_text("mine")
    assert main(["--out", str(out)]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "no" / "x.json")]) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["--out", str(tmp_path), "--force"]) == 1
    assert "is a folder" in capsys.readouterr().err
    for device in ("cuda:2", "cpu", "nonsense"):
        assert main(["--out", str(tmp_path / "y.json"), "--device", device]) == 1
        assert capsys.readouterr().err.endswith(f"--device: expected one of cuda:0, cuda:1, got {device}\n")
    with pytest.raises(SystemExit) as ended:
        main(["--repeats", "0"])
    assert ended.value.code == 2
    assert out.read_text() == "mine"
