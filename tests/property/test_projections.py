"""Laws of the random projections, each with its standard error and a fixed seed."""

import math

import pytest
import torch

from protlm.ops import draw_projection, oprf_parameter, random_features
from scripts.report.closed_forms import pair_of_sum, row_variance

# Of the worst of a few dozen z values: a right draw stays below (p < 1e-4), a planted fault is far above.
MAX_Z = 5.0
HEAD_DIM = 16


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def z_value(samples, expected):
    """Returns how many standard errors the mean of independent samples lies from what is expected."""
    return ((samples.mean() - expected) / (samples.std() / math.sqrt(len(samples)))).item()


@pytest.mark.parametrize(("num_features", "head_dim"), [(8, 8), (20, 8), (5, 8), (1, 1), (130, 64)])
def test_rows_are_orthogonal_within_blocks_of_head_dim(num_features, head_dim):
    projection = draw_projection(num_features, head_dim, num_heads=3, generator=generator(), dtype=torch.float64)
    assert projection.shape == (3, num_features, head_dim)
    for head in projection:
        for block in head.split(head_dim):
            directions = torch.nn.functional.normalize(block, dim=-1)
            difference = directions @ directions.T - torch.eye(len(block), dtype=torch.float64)
            assert difference.abs().max() < 1e-12


@pytest.mark.parametrize(("num_features", "head_dim"), [(8, 8), (20, 8), (5, 8), (2, 2), (5, 2), (130, 64)])
def test_rows_of_a_simplex_are_all_at_the_same_angle_within_blocks_of_head_dim(num_features, head_dim):
    projection = draw_projection(
        num_features, head_dim, kind="simplex", num_heads=3, generator=generator(), dtype=torch.float64
    )
    assert projection.shape == (3, num_features, head_dim)
    expected = torch.full((head_dim, head_dim), -1 / (head_dim - 1), dtype=torch.float64).fill_diagonal_(1)
    for head in projection:
        for block in head.split(head_dim):
            directions = torch.nn.functional.normalize(block, dim=-1)
            difference = directions @ directions.T - expected[: len(block), : len(block)]
            assert difference.abs().max() < 1e-12


def test_the_directions_of_a_whole_simplex_add_up_to_nothing():
    projection = draw_projection(24, 8, kind="simplex", generator=generator(), dtype=torch.float64)
    for block in projection.split(8):
        assert torch.nn.functional.normalize(block, dim=-1).sum(0).abs().max() < 1e-12


def test_a_simplex_needs_two_dimensions():
    with pytest.raises(ValueError, match="head_dim: expected at least 2 for kind 'simplex', got 1"):
        draw_projection(4, 1, kind="simplex")


def test_iid_rows_are_not_orthogonal():
    projection = draw_projection(8, 8, kind="iid", generator=generator(), dtype=torch.float64)
    assert (projection @ projection.T).fill_diagonal_(0).abs().max() > 0.1


@pytest.mark.parametrize("kind", random_features.PROJECTION_KINDS)
def test_every_row_is_a_standard_normal_vector(kind):
    rows = draw_projection(
        2 * HEAD_DIM, HEAD_DIM, kind=kind, num_heads=2_000, generator=generator(1), dtype=torch.float64
    )
    squares = rows.square().sum(-1)
    # One row a draw, so that the samples are independent: ‖ω‖² is χ² with mean d and variance 2d.
    for feature in (0, HEAD_DIM - 1, HEAD_DIM):
        assert abs(z_value(squares[:, feature], HEAD_DIM)) < MAX_Z
        assert abs(z_value((squares[:, feature] - HEAD_DIM).square(), 2 * HEAD_DIM)) < MAX_Z
        assert abs(z_value(rows[:, feature, 0], 0.0)) < MAX_Z
        assert abs(z_value(rows[:, feature, -1].square(), 1.0)) < MAX_Z
    norms = squares.sqrt()
    centred = norms - norms.mean(0)
    assert abs(z_value(centred[:, 0] * centred[:, 1], 0.0)) < MAX_Z, "norms of one block are independent"


@pytest.mark.parametrize("kind", random_features.PROJECTION_KINDS)
def test_heads_and_blocks_are_drawn_independently(kind):
    projection = draw_projection(
        2 * HEAD_DIM, HEAD_DIM, kind=kind, num_heads=8_000, generator=generator(2), dtype=torch.float64
    )
    first_head, second_head = projection[0::2, 0], projection[1::2, 0]
    first_block, second_block = projection[0::2, 1], projection[0::2, HEAD_DIM]
    for a, b in ((first_head, second_head), (first_block, second_block)):
        products = (a * b).sum(-1)
        assert abs(z_value(products, 0.0)) < MAX_Z
        assert abs(z_value(products.square(), HEAD_DIM)) < MAX_Z


@pytest.mark.parametrize("kind", random_features.PROJECTION_KINDS)
def test_a_seed_gives_one_projection_whatever_the_dtype_and_the_global_state(kind):
    draws = []
    for global_seed, dtype in ((0, torch.float64), (1, torch.float64), (2, torch.float32)):
        torch.manual_seed(global_seed)
        draws.append(draw_projection(9, 4, kind=kind, num_heads=2, generator=generator(7), dtype=dtype))
    assert torch.equal(draws[0], draws[1])
    assert draws[2].dtype == torch.float32
    assert torch.equal(draws[0].float(), draws[2])
    assert not torch.equal(draws[0], draw_projection(9, 4, kind=kind, num_heads=2, generator=generator(8)).double())


def test_without_a_generator_torch_seeds_the_draw():
    torch.manual_seed(3)
    first = draw_projection(4, 4)
    torch.manual_seed(3)
    assert torch.equal(first, draw_projection(4, 4))
    assert not torch.equal(first, draw_projection(4, 4))


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("sum_square", [0.0, 0.5, 2.0, 8.0, 40.0])
def test_oprf_parameter_makes_the_variance_least(head_dim, sum_square):
    a = oprf_parameter(torch.tensor(sum_square, dtype=torch.float64), head_dim).item()
    pair = pair_of_sum(sum_square, 0.0)
    least = row_variance("oprf", pair, head_dim, a)
    for step in (1e-3, 1e-2, 0.1):
        for neighbour in (a - step, a + step):
            assert row_variance("oprf", pair, head_dim, neighbour) > least
    assert least <= row_variance("positive", pair, head_dim)


def test_oprf_parameter_is_that_of_positive_features_at_zero_and_negative_beyond():
    squares = torch.linspace(0, 50, 101, dtype=torch.float64)
    a = oprf_parameter(squares, 16)
    assert a[0] == 0
    assert (a.diff() < 0).all()
    # The formula of arXiv 2205.15317 solves 16A² − 2(1 − 2f)A − f = 0, the condition for a least variance.
    f = squares / 16
    assert (16 * a.square() - 2 * (1 - 2 * f) * a - f).abs().max() < 1e-12
