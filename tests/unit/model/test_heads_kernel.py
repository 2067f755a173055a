"""Convolution, length and rotation of heads by the compiled kernel against the plain steps of torch."""

import pytest
import torch

from protlm.model.convolution import SegmentConvolution, shifted_sum
from protlm.model.positions import rotary_angles, rotate
from protlm.model.qk_norm import normalise, prepare
from protlm.model.segments import Segments
from protlm.ops import compiled, heads_cpp
from tests.conftest import relative_error
from tests.unit.model.small_models import bounds

KERNELS = ("portable", "avx2", "avx512")
SIZES = (1, 40, 0, 3, 150)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.fixture(params=KERNELS, autouse=True)
def kernel(request, monkeypatch):
    """The instructions with which all calls are computed."""
    if compiled.why_not() is not None or KERNELS.index(request.param) > KERNELS.index(compiled.best_kernel()):
        pytest.skip(f"this machine cannot run the {request.param} kernel")
    monkeypatch.setattr(compiled, "best_kernel", lambda: request.param)
    return request.param


def row(head_dim, dtype=torch.float32, heads=3):
    """Returns vectors of the tokens of a row, lengths of the heads, and the segments and angles of the row."""
    generator = torch.Generator().manual_seed(head_dim)
    segments = Segments.from_bounds(bounds(*SIZES), sum(SIZES))
    x = torch.randn(sum(SIZES), heads, head_dim, generator=generator).to(dtype)
    lengths = torch.rand(heads, generator=generator) + 0.5
    return x, lengths, segments, rotary_angles(segments.positions, head_dim, torch.float32)


def plain(x, lengths, rotary):
    x = x.double()
    x = x if lengths is None else normalise(x, lengths.double())
    return x if rotary is None else rotate(x, *(y.double() for y in rotary))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [2, 16, 20, 24, 32, 64, 80, 512])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("with_angles", [False, True])
def test_one_pass_equals_the_steps_of_torch(head_dim, dtype, with_lengths, with_angles):
    x, lengths, _, rotary = row(head_dim, dtype)
    arguments = lengths if with_lengths else None, rotary if with_angles else None
    out = heads_cpp.forward(x, *arguments)
    assert out.dtype == dtype
    assert relative_error(out, plain(x, *arguments)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_lengths", [False, True])
def test_gradients_equal_those_of_the_steps(dtype, with_lengths):
    x, lengths, _, rotary = row(20, dtype)
    # As attention gives it: the tokens of one head lie together.
    grad = torch.randn(3, len(x), 20, generator=torch.Generator().manual_seed(1)).transpose(0, 1).to(dtype)
    leaves = [x.requires_grad_(), *([lengths.requires_grad_()] if with_lengths else [])]
    actual = torch.autograd.grad(prepare(x, lengths if with_lengths else None, rotary), leaves, grad)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = plain(doubles[0], doubles[1] if with_lengths else None, rotary)
    for a, b in zip(actual, torch.autograd.grad(out, doubles, grad.double()), strict=True):
        assert relative_error(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("width", "causal"), [(1, False), (3, False), (5, False), (4, True)])
def test_the_convolution_inside_the_pass_equals_that_before_it(width, causal, dtype):
    x, lengths, segments, rotary = row(16, dtype)
    convolution = SegmentConvolution(3 * 48, width, causal=causal)
    with torch.no_grad():
        convolution.weight.normal_(generator=torch.Generator().manual_seed(0))
    _, neighbours, _ = convolution.neighbours(segments, 3)
    weight = convolution.weight.detach()[:, 48:96].double()
    before = shifted_sum(x.flatten(1).double(), weight, convolution.offsets, segments).view(-1, 3, 16)
    out = heads_cpp.forward(x, lengths, rotary, neighbours=neighbours)
    assert relative_error(out, plain(before, lengths, rotary)) < TOLERANCE[dtype]


def test_a_nan_reaches_its_neighbours_in_the_same_segment_alone():
    x, lengths, segments, rotary = row(16)
    convolution = SegmentConvolution(3 * 48, 3)
    torch.nn.init.ones_(convolution.weight)
    # The first token of the second segment.
    x[1] = torch.nan
    out = heads_cpp.forward(x, lengths, rotary, neighbours=convolution.neighbours(segments, 3)[0])
    hit = out.isnan().flatten(1).any(1).nonzero().squeeze(1).tolist()
    assert hit == [1, 2]


def test_rounding_is_to_the_nearest_even_bfloat16_and_keeps_what_is_no_number():
    values = torch.tensor([1.0, 1.00390625, 1.01171875, 3.3895e38, float("inf"), float("-inf"), float("nan"), -0.0])
    given = values.to(torch.bfloat16).view(1, 4, 2)
    torch.testing.assert_close(heads_cpp.forward(given), given, rtol=0, atol=0, equal_nan=True)
    x = torch.randn(50, 2, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    lengths = torch.tensor([0.3, 1.7])
    assert torch.equal(heads_cpp.forward(x, lengths), heads_cpp.forward(x.float(), lengths).to(torch.bfloat16))


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    results = []
    for num_threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
        x, lengths, _, rotary = row(16)
        leaves = x.requires_grad_(), lengths.requires_grad_()
        out = prepare(*leaves, rotary)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_vectors_of_other_layouts_and_none_at_all_are_taken():
    x, lengths, _, rotary = row(16)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(heads_cpp.forward(strided, lengths, rotary), heads_cpp.forward(x, lengths, rotary))
    of_part = x.repeat(1, 2, 1)[:, :3]
    assert torch.equal(heads_cpp.forward(of_part, lengths, rotary), heads_cpp.forward(x, lengths, rotary))
    empty = heads_cpp.forward(x[:0], lengths, tuple(y[:0] for y in rotary))
    assert empty.shape == (0, 3, 16)


def test_functions_of_torch_differentiate_it():
    x, lengths, _, rotary = row(16)
    given = torch.func.grad(lambda x: prepare(x, lengths, rotary).square().sum() + prepare(x, None, rotary).sum())(x)
    leaf = x.clone().requires_grad_()
    (prepare(leaf, lengths, rotary).square().sum() + prepare(leaf, None, rotary).sum()).backward()
    assert torch.equal(given, leaf.grad)


def test_tensors_of_the_cpu_stay_there_whatever_the_default_device():
    x, lengths, _, rotary = row(16)
    expected = prepare(x, lengths, rotary)
    with torch.device("meta"):
        assert torch.equal(prepare(x, lengths, rotary), expected)


def test_what_the_kernel_does_not_take_is_left_to_torch():
    x, lengths, _, rotary = row(16)
    assert heads_cpp.covers(x, lengths, *rotary)
    assert not heads_cpp.covers(x.double())
    assert not heads_cpp.covers(x.half())
    assert not heads_cpp.covers(x, lengths.double())
    assert not heads_cpp.covers(torch.empty(1, 1, 514))
    assert prepare(x.double(), lengths.double(), None).dtype == torch.float64
    assert prepare(x, None, None) is x
