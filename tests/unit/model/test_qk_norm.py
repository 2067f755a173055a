"""What is computed in place on a CPU equals the plain formulas, and so do its gradients."""

import pytest
import torch

from protlm.model.convolution import SegmentConvolution, shifted_sum
from protlm.model.positions import rotate
from protlm.model.qk_norm import normalise, normalise_and_rotate
from protlm.model.segments import Segments
from tests.conftest import TOLERANCE, relative_error
from tests.unit.model.test_performer import bounds

# Shorter and longer than a convolution and than a stretch.
ROWS = [(1,), (2, 0, 1), (9, 4, 3), (300,), (200, 90, 3)]


def differentiated(function, inputs, weights):
    """Returns what a function gives, and the gradients of the weighted sum of it."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def angles_of(length, head_dim, dtype):
    """Returns cosines and sines whose squares add up to 1 in the dtype, where `rotary_angles` has float32 at heart."""
    angles = torch.outer(torch.arange(length), torch.logspace(0, -3, head_dim // 2)).double().repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def assert_all_near(found, expected, dtype):
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("sizes", ROWS)
def test_the_convolution_in_place_equals_the_one_of_whole_tensors(sizes, width, causal, dtype):
    convolution = SegmentConvolution(7, width, causal=causal)
    segments = Segments.from_bounds(bounds(*sizes))
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(sum(sizes), 7, generator=generator, dtype=dtype) for _ in range(2))
    kernel = torch.randn(width, 7, generator=generator, dtype=dtype)

    def in_place(x, kernel):
        parts = [x[:, :3], x[:, 3:]]
        return torch.cat(torch.func.functional_call(convolution, {"weight": kernel}, (parts, segments)), 1)

    found = differentiated(in_place, (x, kernel), weights)
    expected = differentiated(
        lambda x, kernel: shifted_sum(x, kernel, convolution.offsets, segments), (x, kernel), weights
    )
    assert_all_near(found, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 255, 256, 600])
def test_normalising_and_rotating_in_place_equals_the_two_steps(length, dtype):
    generator = torch.Generator().manual_seed(0)
    # As the attention gets and gives it: neither q nor its gradient is contiguous.
    x, weights = (torch.randn(3, length, 16, generator=generator, dtype=dtype).transpose(0, 1) for _ in range(2))
    lengths = torch.tensor([0.3, 1.0, 2.5], dtype=dtype)
    angles = angles_of(length, 16, dtype)
    found = differentiated(lambda x, lengths: normalise_and_rotate(x, lengths, angles), (x, lengths), weights)
    expected = differentiated(lambda x, lengths: rotate(normalise(x, lengths), *angles), (x, lengths), weights)
    assert_all_near(found, expected, dtype)


@pytest.mark.parametrize("scale", [0.0, 1e-14])
def test_vectors_of_almost_no_length_have_the_gradient_of_a_multiplication(scale):
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(4, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    x[1:3] *= scale
    lengths = torch.tensor([0.5, 2.0], dtype=torch.float64)
    angles = angles_of(4, 8, torch.float64)
    found = differentiated(lambda x, lengths: normalise_and_rotate(x, lengths, angles), (x, lengths), weights)
    expected = differentiated(lambda x, lengths: rotate(normalise(x, lengths), *angles), (x, lengths), weights)
    assert_all_near(found, expected, torch.float64)
    assert relative_error(found[1][0], expected[1][0]) < 1e-10


def test_a_second_derivative_is_refused_rather_than_wrong():
    x = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    angles = angles_of(4, 8, torch.float32)
    out = normalise_and_rotate(x, torch.ones(2), angles)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("causal", [False, True])
def test_a_gradient_that_went_to_nan_spoils_no_other_protein(causal):
    convolution = SegmentConvolution(4, 3, causal=causal)
    torch.nn.init.ones_(convolution.weight)
    x = torch.ones(7, 4, requires_grad=True)
    weights = torch.ones(7, 4)
    weights[:3] = torch.nan
    (convolution([x], Segments.from_bounds(bounds(3, 4)))[0] * weights).sum().backward()
    assert x.grad[:3].isnan().all()
    assert x.grad[3:].isfinite().all()
