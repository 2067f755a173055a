"""Exact attention over the segments of a row: the calls that a GPU gets, tried with stand-ins on the CPU."""

import inspect
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from protlm.model import exact_attention
from protlm.model.exact_attention import softmax_attention
from protlm.ops import compiled, local_cpp, reference
from tests.unit.model.small_models import segments_of

SIZES = (5, 0, 1, 14)


def draw(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(20, 2, 8, generator=generator).to(dtype).transpose(0, 1).unsqueeze(0) for _ in range(3)]


def flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal):
    """Stands for PyTorch's: (length, heads, head_dim), bounds on the device, and bounds of the lengths."""
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == len(query)
    parts = [
        F.scaled_dot_product_attention(*(x[start:stop].transpose(0, 1) for x in (query, key, value)), is_causal=causal)
        for start, stop in torch.stack((cu_seq_q[:-1], cu_seq_q[1:]), 1).tolist()
        if start < stop
    ]
    return torch.cat(parts, 1).transpose(0, 1)


def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    return flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal)


def newer(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
    assert window_size in ((-1, -1), (-1, 0))
    return flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("flash_of_a_version", [older, newer])
def test_the_one_call_equals_a_call_for_each_segment(flash_of_a_version, causal, monkeypatch):
    attention = exact_attention._with_causal(flash_of_a_version)
    monkeypatch.setattr(exact_attention, "_flash_of_any_lengths", lambda: attention)
    q, k, v = draw()
    actual = exact_attention._in_one_call(q, k, v, segments_of(*SIZES), causal)
    expected = softmax_attention(q, k, v, segments_of(*SIZES), causal, None, 4)
    torch.testing.assert_close(actual, expected)


def test_this_version_of_torch_has_the_call_that_is_made():
    from torch.nn.attention.varlen import varlen_attn

    assert exact_attention._flash_of_any_lengths() is not None
    # What it computes shows on a GPU alone; its arguments show here.
    parameters = list(inspect.signature(varlen_attn).parameters)
    assert parameters[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"window_size", "is_causal"} & set(parameters)


class _OnGpu:
    """A tensor that says that it is on a GPU, for the choice alone."""

    def __init__(self, dtype, head_dim=64):
        self.device, self.dtype, self.shape = torch.device("cuda", 0), dtype, (1, 2, 20, head_dim)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "has_flash", "has_kernels", "bias", "chosen"),
    [
        (torch.bfloat16, 64, True, True, None, "_in_one_call"),
        (torch.bfloat16, 60, True, True, None, "local_attention"),
        (torch.bfloat16, 264, True, False, None, "_one_by_one"),
        (torch.bfloat16, 64, False, True, None, "local_attention"),
        (torch.float32, 64, True, True, None, "local_attention"),
        (torch.float32, 64, True, False, None, "_one_by_one"),
        (torch.bfloat16, 64, True, True, "a bias", "_one_by_one"),
    ],
)
def test_which_call_a_gpu_gets(dtype, head_dim, has_flash, has_kernels, bias, chosen, monkeypatch):
    for name in ("_in_one_call", "local_attention", "_one_by_one"):
        monkeypatch.setattr(exact_attention, name, lambda *args, name=name, **options: name)
    monkeypatch.setattr(exact_attention, "_flash_of_any_lengths", lambda: newer if has_flash else None)
    monkeypatch.setattr(exact_attention.local_triton, "covers", lambda inputs: has_kernels)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    # Without the checks of annotations, which know no stand-ins for tensors.
    monkeypatch.setattr(exact_attention, "_takes_flash", inspect.unwrap(exact_attention._takes_flash))
    choose = inspect.unwrap(softmax_attention)
    x = _OnGpu(dtype, head_dim)
    for capability in (80, 75):
        monkeypatch.setattr(exact_attention, "capability_of", lambda index, capability=capability: capability)
        # The flash attention of any lengths is for newer GPUs.
        expected = chosen if capability == 80 or chosen != "_in_one_call" else "local_attention"
        assert choose(x, x, x, segments_of(20), False, bias, 4) == expected


@pytest.mark.skipif(
    local_cpp.longest_exact(torch.float32, has_gradients=True) == 0, reason="here exact attention is PyTorch's"
)
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("sizes", [(5, 30, 0, 3, 40, 41, 7), (0, 30, 0), (40,), (3, 0), (0,)])
def test_long_segments_are_trained_by_the_attention_of_pytorch_and_the_others_by_the_kernel(sizes, causal, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(sum(sizes), 2, 8, generator=generator).transpose(0, 1).unsqueeze(0).requires_grad_()
        for _ in range(4)
    )
    calls = []

    def noting(name):
        computes = getattr(exact_attention, name)

        def call(q, *arguments, **options):
            calls.append((name, q.shape[2]))
            return computes(q, *arguments, **options)

        return call

    monkeypatch.setattr(local_cpp, "_LONGEST_TRAINED", 10)
    for name in ("local_attention", "_one_by_one"):
        monkeypatch.setattr(exact_attention, name, noting(name))
    out = softmax_attention(q, k, v, segments_of(*sizes), causal, None, 4)
    runs = [(long, sum(run)) for long, run in itertools.groupby(sizes, lambda size: size > 10)]
    expected = [("_one_by_one" if long else "local_attention", tokens) for long, tokens in runs if tokens]
    assert calls == (expected or [("local_attention", 0)])
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    twin = reference.softmax_attention(*doubles, cu_seqlens=segments_of(*sizes).cu_seqlens, causal=causal)
    torch.testing.assert_close(out, twin.float())
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(twin, doubles, grad.double()), strict=True
    ):
        torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-4)
    calls.clear()
    with torch.no_grad():
        softmax_attention(q, k, v, segments_of(*sizes), causal, None, 4)
    assert [name for name, _ in calls] == ["local_attention"]
    if compiled.best_half_kernel():
        assert local_cpp.longest_exact(torch.bfloat16, has_gradients=True) == sys.maxsize
