"""Normalising and rotating in place on a CPU against the two plain steps, gradients included."""

import pytest
import torch

from protlm.model.positions import rotate
from protlm.model.qk_norm import normalise, prepare
from tests.conftest import relative_error
from tests.unit.model.plain_formulas import assert_all_near, differentiated


def angles_of(length, head_dim, dtype):
    """Returns cosines and sines whose squares add up to 1 in the dtype, where `rotary_angles` has float32 at heart."""
    angles = torch.outer(torch.arange(length), torch.logspace(0, -3, head_dim // 2)).double().repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 255, 256, 600])
def test_normalising_and_rotating_in_place_equals_the_two_steps(length, dtype):
    generator = torch.Generator().manual_seed(0)
    # As the attention gets and gives it: neither q nor its gradient is contiguous.
    x, weights = (torch.randn(3, length, 16, generator=generator, dtype=dtype).transpose(0, 1) for _ in range(2))
    lengths = torch.tensor([0.3, 1.0, 2.5], dtype=dtype)
    angles = angles_of(length, 16, dtype)
    actual = differentiated(lambda x, lengths: prepare(x, lengths, angles), (x, lengths), weights)
    expected = differentiated(lambda x, lengths: rotate(normalise(x, lengths), *angles), (x, lengths), weights)
    assert_all_near(actual, expected, dtype)


@pytest.mark.parametrize("scale", [0.0, 1e-14])
def test_vectors_of_almost_no_length_have_the_gradient_of_a_multiplication(scale):
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(4, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    x[1:3] *= scale
    lengths = torch.tensor([0.5, 2.0], dtype=torch.float64)
    angles = angles_of(4, 8, torch.float64)
    actual = differentiated(lambda x, lengths: prepare(x, lengths, angles), (x, lengths), weights)
    expected = differentiated(lambda x, lengths: rotate(normalise(x, lengths), *angles), (x, lengths), weights)
    assert_all_near(actual, expected, torch.float64)
    assert relative_error(actual[1][0], expected[1][0]) < 1e-10


def test_a_second_derivative_is_refused_rather_than_wrong():
    x = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    angles = angles_of(4, 8, torch.float32)
    out = prepare(x, torch.ones(2), angles)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="got a second derivative"):
        gradient.sum().backward()
