"""Rotary and sinusoidal positions against their formulas."""

import math

import pytest
import torch

from protlm.model.positions import rotary_angles, rotate, sinusoids
from tests.conftest import relative_error
from tests.unit.model.small_models import segments_of


def test_rotary_positions_make_products_depend_on_distance_alone():
    cosines, sines = rotary_angles(torch.arange(50), 16, torch.float64)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 16, generator=generator, dtype=torch.float64).expand(50, 2, 16) for _ in range(2))
    turned_q, turned_k = (rotate(x, cosines, sines) for x in (q, k))
    products = torch.einsum("ihd,jhd->hij", turned_q, turned_k)
    for offset in (-30, -1, 0, 1, 7):
        diagonal = products.diagonal(offset, 1, 2)
        assert (diagonal - diagonal[:, :1]).abs().max() < 1e-4
    assert (products[:, 0, 1] - products[:, 0, 2]).abs().max() > 1e-2
    assert relative_error(turned_q.norm(dim=-1), q.norm(dim=-1)) < 1e-6


def test_rotary_positions_start_anew_in_every_segment_and_turn_as_in_esm():
    cosines, sines = rotary_angles(segments_of(3, 0, 4).positions, 8, torch.float32)
    assert torch.equal(cosines[:3], cosines[3:6])
    assert torch.equal(sines[:3], sines[3:6])
    angle = 3 * 10000 ** (-2 * 1 / 8)
    for column in (1, 5):
        assert cosines[6, column].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sines[6, column].item() == pytest.approx(math.sin(angle), abs=1e-6)
    x = torch.arange(8.0).view(1, 1, 8).expand(7, 1, 8)
    turned = rotate(x, cosines, sines)[6, 0]
    assert turned[1].item() == pytest.approx(math.cos(angle) - 5 * math.sin(angle), abs=1e-5)
    assert turned[5].item() == pytest.approx(5 * math.cos(angle) + math.sin(angle), abs=1e-5)


def test_sinusoids_are_those_of_vaswani():
    actual = sinusoids(torch.tensor([0, 7]), 8)
    assert actual[0].tolist() == [0, 1] * 4
    for pair in range(4):
        angle = 7 / 10000 ** (2 * pair / 8)
        assert actual[1, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert actual[1, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
