"""Exact attention to near tokens against its float64 twin, and the laws that it obeys."""

import math
import re

import pytest
import torch

from protlm.ops import compiled, local_attention, local_cpp, local_torch, reference
from tests.conftest import TOLERANCE, relative_error

LENGTHS = (1, 31, 63, 64, 65, 100, 257, 700)
WINDOWS = (1, 7, 32, 64, 100)
PACKED = (0, 1, 0, 3, 20, 64, 65, 1, 300, 0)


def draw(batch, length, dtype=torch.float64, heads=2, head_dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads, head_dim)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    return [tensor.transpose(1, 2) for tensor in tensors]


def bounds(*sizes):
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)


def differentiated(attention, q, k, v, grad, **options):
    """The output and the gradients of q, k and v."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
    out = attention(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def assert_equals_twin(q, k, v, grad, backend="auto", **options):
    actual = differentiated(local_attention, q, k, v, grad, backend=backend, **options)
    expected = differentiated(reference.softmax_attention, q, k, v, grad, **options)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        # Of a single key dq and dk are zero, in float32 up to rounding.
        scale = max(theirs.abs().max().item(), 0.1)
        assert (ours.double() - theirs).abs().max().item() <= TOLERANCE[q.dtype] * scale, (name, q.shape, options)


BEST = "portable" if compiled.why_not() else compiled.best_kernel()
KERNELS = ("portable", "avx2", "avx512")[: 1 + ("portable", "avx2", "avx512").index(BEST)]
needs_kernel = pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))


@pytest.fixture(params=["torch", *(pytest.param(kernel, marks=needs_kernel) for kernel in KERNELS)])
def backend(request, monkeypatch):
    """Each backend; of the compiled one each kernel that runs here."""
    if request.param == "torch":
        return "torch"
    monkeypatch.setattr(compiled, "best_kernel", lambda: request.param)
    return "cpp"


@pytest.fixture
def small_stretches(monkeypatch):
    """Cuts rows into stretches of one block each, so that the seams between stretches are tried."""
    monkeypatch.setitem(local_torch._MOST_SCORES, "cpu", 1)
    monkeypatch.setattr(local_cpp, "_UNIT_TOKENS", 32)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("window", WINDOWS)
def test_output_and_gradients_equal_the_float64_twin(window, causal, backend):
    for dtype in (torch.float32, torch.float64)[: 2 if backend == "torch" else 1]:
        for length in LENGTHS:
            assert_equals_twin(*draw(2, length, dtype), window=window, causal=causal, backend=backend)
        options = {"window": window, "causal": causal, "cu_seqlens": bounds(*PACKED), "backend": backend}
        assert_equals_twin(*draw(1, sum(PACKED), dtype), **options)


@needs_kernel
def test_the_compiled_kernel_takes_every_head_dim_and_any_strides():
    for head_dim in (1, 2, 17, 32, 60, 64, 128, 200):
        q, k, v, grad = draw(1, 100, torch.float32, head_dim=head_dim)
        assert_equals_twin(q, k, v, grad, window=20, backend="cpp")
        strided = [torch.stack((x, x), -1).select(-1, 0) for x in (q, k, v, grad)]
        assert_equals_twin(*strided, window=20, backend="cpp")


@pytest.mark.usefixtures("small_stretches")
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_stretches_of_a_single_block_change_nothing(causal, backend):
    for window in WINDOWS:
        q, k, v, grad = draw(1, sum(PACKED), torch.float32)
        options = {"window": window, "causal": causal, "cu_seqlens": bounds(*PACKED), "backend": backend}
        assert_equals_twin(q, k, v, grad, **options)


@needs_kernel
def test_company_and_threads_change_no_bit_of_the_compiled_kernel():
    q, k, v, grad = draw(1, 700, torch.float32)
    alone = differentiated(local_attention, q, k, v, grad, window=40)
    others = draw(1, 133, torch.float32, seed=1)
    joined = [torch.cat((x, y), 2) for x, y in zip(others, (q, k, v, grad), strict=True)]
    beside = differentiated(local_attention, *joined, window=40, cu_seqlens=bounds(133, 700))
    torch.set_num_threads(2)
    try:
        threaded = differentiated(local_attention, q, k, v, grad, window=40)
    finally:
        torch.set_num_threads(1)
    for ours, theirs, many in zip(alone, beside, threaded, strict=True):
        assert torch.equal(ours, theirs[:, :, 133:])
        assert torch.equal(ours, many)


@pytest.mark.parametrize("content", [0.0, 1e3, -1e30, 1e38])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_padding_of_any_finite_content_changes_no_output_and_gets_no_gradient(causal, content):
    q, k, v, grad = draw(2, 150)
    token_mask = torch.rand((2, 150), generator=torch.Generator().manual_seed(1)) > 0.3
    token_mask[1, :70] = False
    padding = ~token_mask[:, None, :, None]
    options = {"window": 9, "causal": causal, "token_mask": token_mask}
    expected = differentiated(reference.softmax_attention, q, k, v, grad, **options)
    filled = [x.masked_fill(padding, content) for x in (q, k, v)]
    actual = differentiated(local_attention, *filled, grad, **options)
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours, theirs) < TOLERANCE[torch.float64]
        assert not ours.masked_select(padding).any()


def test_a_window_of_the_whole_protein_is_exact_attention():
    q, k, v, grad = draw(1, 90)
    ours = differentiated(local_attention, q, k, v, grad, window=90)
    theirs = differentiated(reference.softmax_attention, q, k, v, grad)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_tokens_out_of_reach_and_other_segments_change_no_output(causal, backend):
    q, k, v, _ = draw(1, 300, torch.float32)
    cu_seqlens = bounds(120, 180)
    options = {"window": 16, "cu_seqlens": cu_seqlens, "causal": causal, "backend": backend}
    out = local_attention(q, k, v, **options)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 150:] = 7.0
    other = local_attention(*changed, **options)
    # Token 150 is the first that differs: 133 and those before it do not reach it.
    assert torch.equal(out[:, :, :134], other[:, :, :134])
    assert torch.equal(out[:, :, :150], other[:, :, :150]) == causal


def test_values_of_one_give_one_at_any_norm(backend):
    q, k, v, _ = draw(1, 200, torch.float32)
    for scale in (1e-6, 1.0, 1e3, 1e15):
        out = local_attention(q * scale, k * scale, torch.ones_like(v), window=32, backend=backend)
        assert (out - 1).abs().max() < 1e-6


@pytest.mark.parametrize("which", range(3), ids="qkv".__getitem__)
def test_nan_reaches_every_token_that_sees_it_and_no_other_head(which, backend):
    tensors = draw(1, 200, torch.float32)[:3]
    tensors[which][0, 0, 100] = math.nan
    out = local_attention(*tensors, window=5, backend=backend)
    hit = out[0, 0].isnan().any(-1).nonzero().squeeze(1).tolist()
    assert set(range(95, 106) if which else [100]) <= set(hit)
    assert not out[0, 1].isnan().any()


@pytest.mark.parametrize("content", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_segment(content, backend):
    q, k, v, _ = draw(1, 130, torch.float32)
    clean = local_attention(q, k, v, window=9, cu_seqlens=bounds(60, 70), backend=backend)
    v[0, :, 61] = content
    out = local_attention(q, k, v, window=9, cu_seqlens=bounds(60, 70), backend=backend)
    assert torch.equal(out[:, :, :60], clean[:, :, :60])
    assert not out[0, :, 61:71].isfinite().any()
    # The torch backend is exact to the token: the compiled one knows a segment, and a block of keys.
    assert out[0, :, (71 if backend == "torch" else 124) :].isfinite().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torch_func_differentiates_it_once(backend):
    q, k, v, grad = draw(1, 50, torch.float32)
    expected = differentiated(local_attention, q, k, v, grad, window=6, backend=backend)[1:]

    def loss(q, k, v):
        return (local_attention(q, k, v, window=6, backend=backend) * grad).sum()

    for ours, theirs in zip(torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v), expected, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(RuntimeError, match="local_attention has first derivatives in reverse mode only"):
        torch.func.jvp(loss, (q, k, v), (q, k, v))


@pytest.mark.parametrize("name", ["cu_seqlens", "q"])
def test_a_tensor_that_changes_before_the_backward_is_told(name, backend):
    q, k, v, _ = draw(1, 40, torch.float32)
    tensors = {"q": q.clone(), "cu_seqlens": bounds(20, 20)}
    k.requires_grad_()
    out = local_attention(tensors["q"], k, v, window=3, cu_seqlens=tensors["cu_seqlens"], backend=backend)
    tensors[name].add_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("factor", [1e2, 3e3, 1e5])
def test_equal_keys_share_a_weight_at_scores_of_any_size(factor, backend):
    q = draw(1, 20, torch.float32, head_dim=64)[0][:, :, :1].expand(-1, -1, 20, -1) * factor**0.5
    v, grad = draw(1, 20, torch.float32, head_dim=64, seed=1)[:2]
    _, _, _, actual = differentiated(local_attention, q, q, v, grad, window=4, backend=backend)
    _, _, _, expected = differentiated(reference.softmax_attention, q, q, v, grad, window=4)
    assert relative_error(actual, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_far_below_all_others_have_the_weights_that_they_have_among_themselves(dtype, backend):
    # Scores of about -4e30, in a panel that is not full.
    q, k, v, _ = (x.to(dtype) for x in draw(1, 200, torch.float32, head_dim=16))
    q, k = torch.full_like(q, 1e14), -1e16 * (1 + 0.5 * (torch.arange(200) % 2)).to(dtype).view(-1, 1).expand_as(k)
    out = local_attention(q, k, v, window=200, backend=backend)
    expected = reference.softmax_attention(q.double(), k.double(), v.double(), window=200)
    assert relative_error(out, expected) < TOLERANCE[dtype]


def test_the_backward_of_vectors_of_no_numbers_has_its_own_memory():
    q = torch.zeros(1, 1, 5000, 0, requires_grad=True)
    (grad,) = torch.autograd.grad(local_attention(q, q, q, window=3000).sum(), q)
    assert grad.shape == q.shape


def test_a_window_of_any_size_costs_no_more_than_the_row():
    q, k, v, _ = draw(1, 5)
    whole = local_attention(q, k, v, window=5)
    assert torch.equal(local_attention(q, k, v, window=2**62), whole)


@needs_kernel
def test_every_nan_is_one_to_the_compiled_kernel():
    q, k, v, _ = draw(1, 40, torch.float32)
    q[0, 0, 7, 0] = torch.tensor([0x7FC00155], dtype=torch.int32).view(torch.float32)[0]
    assert local_attention(q, k, v, window=4, backend="cpp")[0, 0, 7].isnan().all()


def test_short_dtypes_and_autocast_compute_in_float32():
    q, k, v, _ = draw(1, 130, torch.bfloat16)
    expected = reference.softmax_attention(q, k, v, window=20)
    out = local_attention(q, k, v, window=20)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) < 5e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = local_attention(q.float(), k.float(), v, window=20)
    assert mixed.dtype == torch.bfloat16
    assert relative_error(mixed, expected) < 5e-3


def test_an_empty_row_gives_an_empty_row():
    q, k, v, grad = draw(1, 0)
    assert [x.shape[2] for x in differentiated(local_attention, q, k, v, grad, window=4)] == [0] * 4


def test_a_second_derivative_is_refused():
    q, k, v, _ = draw(1, 20)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(local_attention(q, k, v, window=4).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="got a second derivative"):
        torch.autograd.grad(grad.sum(), q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: expected an integer of at least 1, got 0"),
        ({"window": 2.5}, "window: expected an integer of at least 1, got 2.5"),
        ({"window": True}, "window: expected an integer of at least 1, got True"),
        ({"window": 4, "backend": "cuda"}, "backend: expected one of ('auto', 'torch', 'cpp', 'triton'), got 'cuda'"),
        ({"window": 4, "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "cu_seqlens: expected bounds"),
        ({"window": 4, "token_mask": torch.ones(1, 3, dtype=torch.bool)}, "token_mask: expected shape"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, message):
    q, k, v, _ = draw(1, 20)
    with pytest.raises(ValueError, match=re.escape(message)):
        local_attention(q, k, v, **options)
