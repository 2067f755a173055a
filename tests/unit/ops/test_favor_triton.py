"""When the Triton backend is there and which calls it takes, for GPUs that are not there."""

import importlib.util
import shutil
import sysconfig
from unittest.mock import Mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from protlm.ops import backends, favor_torch, favor_triton
from protlm.ops.inputs import AttentionInputs
from protlm.ops.operators import backend_of

find_spec = importlib.util.find_spec


def finding(triton):
    """Returns what finds modules as they are, but this one."""
    return lambda name: triton if name == "triton" else find_spec(name)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Makes this a machine with two GPUs, an A100 and a T4; returns what changes it."""
    monkeypatch.setattr(favor_triton, "IS_INTERPRETED", False)
    monkeypatch.setattr(favor_triton, "is_wide", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(importlib.util, "find_spec", finding(triton=object()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(favor_triton, "capability_of", lambda index: (80, 75)[index])
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CC", raising=False)
    favor_triton._why_no_gpu.cache_clear()
    yield monkeypatch
    favor_triton._why_no_gpu.cache_clear()


def call(device="cuda:0", dtype=torch.bfloat16, head_dim=64, **options):
    with FakeTensorMode():
        q = torch.empty(1, 2, 8, head_dim, dtype=dtype, device=device)
        return AttentionInputs(q, q, q, torch.empty(20, head_dim, device=device), **options)


def test_an_nvidia_gpu_with_a_compiler_is_enough():
    assert favor_triton.why_not() is None
    assert not backends()["triton"].startswith("not available")


@pytest.mark.parametrize(
    ("owner", "name", "value", "told"),
    [
        (importlib.util, "find_spec", finding(triton=None), "Triton is not installed"),
        (torch.cuda, "is_available", lambda: False, "PyTorch sees no CUDA device"),
        (torch.version, "hip", "6.4", "the kernels are made for NVIDIA's GPUs"),
        (favor_triton, "capability_of", lambda _: 75, "the kernels need compute capability 8.0"),
        (favor_triton, "capability_of", Mock(side_effect=RuntimeError("lost")), "the CUDA device does not"),
        (shutil, "which", lambda _: None, "Triton finds no C compiler"),
        (sysconfig, "get_path", lambda *_: "/nowhere", "Triton needs /nowhere/Python.h"),
    ],
)
def test_whatever_is_missing_is_told_and_the_automatic_choice_is_torch(machine, owner, name, value, told):
    machine.setattr(owner, name, value)
    assert favor_triton.why_not().startswith(told)
    assert backends()["triton"].startswith(f"not available: {told}")
    assert backend_of("auto", call()) is favor_torch


def test_a_compiler_may_have_any_name(machine):
    machine.setattr(shutil, "which", lambda _: None)
    machine.setenv("CC", "icx")
    assert favor_triton.why_not() is None


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"near_block": 4}, {"causal": True, "near_block": 4}], ids=str
)
def test_floats_on_a_gpu_of_today_are_taken(options):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype == torch.float32 and options == {"causal": True}:
            continue
        for head_dim in (8, 64, 128):
            assert backend_of("auto", call(dtype=dtype, head_dim=head_dim, **options)) is favor_triton


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cuda:1"},
        {"device": "cpu", "dtype": torch.float64},
        {"dtype": torch.float64},
        {"head_dim": 129},
        {"causal": True, "dtype": torch.float32},
        {"causal": True, "group_name": "ranks"},
        {"feature_map": "trig"},
        {"feature_map": "relu", "dtype": torch.float16},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_what_is_not_covered_goes_to_torch(backend, options):
    assert backend_of(backend, call(**options)) is favor_torch


@pytest.mark.parametrize(("device", "features", "width"), [("cuda:0", 32, 64), ("cuda:1", 20, 65)])
def test_torch_is_told_of_the_states_of_the_backend_that_makes_them(device, features, width):
    inputs = call(device)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, projection = torch.empty_like(inputs.q), torch.empty_like(inputs.projection)
        out, states, references, sums = torch.ops.protlm.favor(
            q, q, q, projection, None, None, None, "positive", False, "auto"
        )
    assert (out.shape, states.shape) == (q.shape, (1, 2, features, width))
    assert (references.shape, sums.shape) == ((1, 2, features), (1, 2, 8))
