"""Feature maps against their formulas, written out for one vector."""

import math

import pytest
import torch

from protlm.ops import draw_projection, kernel_features, reference
from tests.conftest import TOLERANCE, relative_error

X = (0.6, -0.8, 1.0, 2.0)
ROW = (1.0, 2.0, -1.0, 0.5)
Y = [value / 4**0.25 for value in X]
U = sum(a * b for a, b in zip(Y, ROW, strict=True))
HALF_SQUARE = sum(value * value for value in Y) / 2
ROW_SQUARE = sum(value * value for value in ROW)
A = -0.3

FORMULAS = {
    "positive": [math.exp(U - HALF_SQUARE)],
    "hyperbolic": [math.exp(sign * U - HALF_SQUARE) / math.sqrt(2) for sign in (1, -1)],
    "trig": [math.exp(HALF_SQUARE) * math.sin(U), math.exp(HALF_SQUARE) * math.cos(U)],
    "regularised": [math.exp(U * 2 / math.sqrt(ROW_SQUARE) - HALF_SQUARE)],
    "oprf": [(1 - 4 * A) * math.exp(A * ROW_SQUARE + math.sqrt(1 - 4 * A) * U - HALF_SQUARE)],
    "relu": [max(U, 0.0) + 1e-3],
}


@pytest.mark.parametrize("feature_map", FORMULAS)
def test_features_are_the_formula_written_out(feature_map):
    a = A if feature_map == "oprf" else None
    for module in (kernel_features, reference.kernel_features):
        actual = module(torch.tensor([X]).double(), torch.tensor([ROW]).double(), feature_map=feature_map, oprf_a=a)
        assert actual.shape == (1, len(FORMULAS[feature_map]))
        # The inputs are float32 numbers, nearly those of the formula.
        assert actual[0].tolist() == pytest.approx(FORMULAS[feature_map], rel=1e-6)


@pytest.mark.parametrize("feature_map", FORMULAS)
def test_two_rows_share_one_scale(feature_map):
    a = A if feature_map == "oprf" else None
    x, row = torch.tensor([X]).double(), torch.tensor([ROW]).double()
    one, two = (kernel_features(x, rows, feature_map=feature_map, oprf_a=a) for rows in (row, torch.cat((row, row))))
    assert two.shape[-1] == 2 * one.shape[-1]
    assert relative_error(two @ two.T, one @ one.T) < 1e-14


def test_relu_is_shut_below_zero_and_works_without_a_projection():
    x = torch.tensor([X]).double()
    shut, wide = (kernel_features(x, sign * torch.tensor([ROW]).double(), feature_map="relu") for sign in (1, -1))
    assert U < 0
    assert shut.item() == pytest.approx(1e-3, rel=1e-6)
    assert wide.item() == pytest.approx(-U + 1e-3, rel=1e-6)
    bare = kernel_features(x, None, feature_map="relu")
    assert bare[0].tolist() == pytest.approx([max(value, 0.0) + 1e-3 for value in X], rel=1e-6)


@pytest.mark.parametrize("feature_map", FORMULAS)
def test_the_float64_twin_of_float32_features_equals_them(feature_map):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 20, 24, generator=generator)
    projection = draw_projection(32, 24, num_heads=3, generator=generator)
    a = torch.full((3, 1, 1), -0.1) if feature_map == "oprf" else None
    twin = reference.kernel_features(x, projection, feature_map=feature_map, oprf_a=a)
    assert twin.dtype == torch.float64
    actual = kernel_features(x, projection, feature_map=feature_map, oprf_a=a)
    assert actual.dtype == torch.float32
    assert relative_error(actual, twin) < TOLERANCE[torch.float32]
