import pytest
import torch
from torch import nn

from protlm.model.feed_forward import activate_and_project, activated
from tests.conftest import TOLERANCE, relative_error

LENGTH, FFN_DIM, MODEL_DIM = 17, 24, 8


def draw(has_gate, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    inner, gate = (torch.randn(LENGTH, FFN_DIM, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))
    out = nn.Linear(FFN_DIM, MODEL_DIM, dtype=dtype)
    return inner, gate if has_gate else None, out


@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients_are_those_of_the_plain_formula(has_gate, dtype):
    inner, gate, out = draw(has_gate, dtype)
    leaves = [leaf for leaf in (inner, gate, out.weight, out.bias) if leaf is not None]
    grad = torch.randn(LENGTH, MODEL_DIM, dtype=dtype)
    actual, expected = activate_and_project(inner, gate, out), out(activated(inner, gate))
    assert relative_error(actual, expected) < TOLERANCE[dtype]
    pairs = zip(torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
    for ours, theirs in pairs:
        assert relative_error(ours, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("has_gate", [False, True])
def test_only_what_entered_is_kept_for_the_gradients(has_gate):
    inner, gate, out = draw(has_gate)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda x: x):
        activate_and_project(inner, gate, out)
    assert set(kept) <= {tensor.data_ptr() for tensor in (inner, gate, out.weight) if tensor is not None}


@pytest.mark.parametrize("has_gate", [False, True])
def test_under_autocast_the_gradients_keep_the_dtype_of_what_entered(has_gate):
    inner, gate, out = draw(has_gate)
    with torch.autocast("cpu", torch.bfloat16):
        short = [x if x is None else x.bfloat16() for x in (inner, gate)]
        loss = activate_and_project(*short, out).float().square().sum()
    loss.backward()
    assert inner.grad.dtype == out.weight.grad.dtype == torch.float32
