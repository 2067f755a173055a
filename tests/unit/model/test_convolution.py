"""The convolution inside segments: its formula, its start, and the two ways of computing it."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from protlm.config import ModelConfig
from protlm.model.convolution import SegmentConvolution, shifted_sum
from protlm.model.performer import Performer
from tests.conftest import TOLERANCE, relative_error
from tests.unit.model.plain_formulas import assert_all_near, differentiated
from tests.unit.model.small_models import bounds, proteins, segments_of

FLOAT32 = TOLERANCE[torch.float32]
# Shorter and longer than a convolution.
ROWS = [(1,), (2, 0, 1), (9, 4, 3), (300,), (200, 90, 3)]


@pytest.mark.parametrize("width", [1, 3, 5])
def test_the_convolution_is_a_padded_depthwise_one_on_every_segment(width):
    convolution = SegmentConvolution(6, width).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        convolution.weight.copy_(torch.randn(width, 6, generator=generator))
    sizes = (3, 0, 1, 2, 9)
    x = torch.randn(15, 6, generator=generator, dtype=torch.float64)
    actual = convolution([x], segments_of(*sizes))[0]
    kernel = convolution.weight.T.unsqueeze(1)
    for start, stop in pairwise(bounds(*sizes).tolist()):
        if stop > start:
            part = x[start:stop].T.unsqueeze(0)
            expected = torch.nn.functional.conv1d(part, kernel, padding=width // 2, groups=6)[0].T
            assert relative_error(actual[start:stop], expected) < 1e-12


@pytest.mark.parametrize("width", [1, 3, 5])
def test_a_causal_convolution_is_padded_at_the_left_of_every_segment(width):
    convolution = SegmentConvolution(6, width, causal=True).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        convolution.weight.copy_(torch.randn(width, 6, generator=generator))
    sizes = (3, 0, 1, 2, 9)
    x = torch.randn(15, 6, generator=generator, dtype=torch.float64)
    actual = convolution([x], segments_of(*sizes))[0].split(sizes)
    for part, result in zip(x.split(sizes), actual, strict=True):
        padded = F.pad(part.T, (width - 1, 0)).unsqueeze(0)
        if len(part):
            expected = F.conv1d(padded, convolution.weight.T.unsqueeze(1), groups=6)[0].T
            assert relative_error(result, expected) < 1e-12


@torch.no_grad()
def test_the_convolution_starts_as_the_identity():
    with_conv, without = (Performer(ModelConfig(conv_width=width)) for width in (3, 0))
    for model in (with_conv, without):
        model.reset(0)
    tokens = torch.cat(proteins(3, 20))
    actual, expected = (model.eval()(tokens, bounds(3, 20)) for model in (with_conv, without))
    assert relative_error(actual, expected) < FLOAT32
    convolution = SegmentConvolution(4, 5)
    convolution.reset()
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(convolution([x], segments_of(7))[0], x)


def test_a_causal_convolution_starts_as_the_identity():
    convolution = SegmentConvolution(4, 5, causal=True)
    convolution.reset()
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(convolution([x], segments_of(7))[0], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("sizes", ROWS)
def test_the_convolution_in_place_equals_the_one_of_whole_tensors(sizes, width, causal, dtype):
    convolution = SegmentConvolution(7, width, causal=causal)
    segments = segments_of(*sizes)
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(sum(sizes), 7, generator=generator, dtype=dtype) for _ in range(2))
    kernel = torch.randn(width, 7, generator=generator, dtype=dtype)

    def in_place(x, kernel):
        parts = [x[:, :3], x[:, 3:]]
        return torch.cat(torch.func.functional_call(convolution, {"weight": kernel}, (parts, segments)), 1)

    actual = differentiated(in_place, (x, kernel), weights)
    expected = differentiated(
        lambda x, kernel: shifted_sum(x, kernel, convolution.offsets, segments), (x, kernel), weights
    )
    assert_all_near(actual, expected, dtype)


def test_a_protein_that_went_to_nan_spoils_no_other():
    convolution = SegmentConvolution(4, 3)
    torch.nn.init.ones_(convolution.weight)
    x = torch.ones(7, 4)
    x[:3] = torch.nan
    out = convolution([x], segments_of(3, 4))[0]
    assert out[:3].isnan().all()
    assert out[3:].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_a_gradient_that_went_to_nan_spoils_no_other_protein(causal):
    convolution = SegmentConvolution(4, 3, causal=causal)
    torch.nn.init.ones_(convolution.weight)
    x = torch.ones(7, 4, requires_grad=True)
    weights = torch.ones(7, 4)
    weights[:3] = torch.nan
    (convolution([x], segments_of(3, 4))[0] * weights).sum().backward()
    assert x.grad[:3].isnan().all()
    assert x.grad[3:].isfinite().all()
