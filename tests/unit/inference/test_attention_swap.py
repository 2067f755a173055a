"""The swap of exact attention: what stays equal to rounding, what A and the shift are, and what is refused."""

import itertools

import numpy as np
import pytest
import torch

from protlm.inference.attention_swap import (
    SwapSettings,
    balancing_matrices,
    exact_twin,
    measure_moments,
    swap_attention,
    swapped_config,
)
from protlm.inference.attention_weights import attention_matrix
from protlm.inference.replaced_attention import exact_attention, far_only, kept_projections, near_only, other_draw
from protlm.model.health import attention_health
from protlm.vocabulary import FIRST_RESIDUE
from tests.unit.model.small_models import bounds, build, proteins

SIZES = (60, 5, 41)
KINDS = {
    "learned positions": {"positions": "learned", "max_positions": 100, "qk_norm": False, "conv_width": 0},
    "post-LN, no positions": {"positions": "none", "layer_norm": "post", "qk_norm": False, "conv_width": 0},
    "rotary": {"qk_norm": False, "conv_width": 0},
    "rotary, norms over all heads": {"qk_norm": False, "qk_layer_norm": True, "conv_width": 0},
    "our own": {},
    "our own with local layers": {"attention": ("local", "softmax")},
    "our own, causal": {"causal": True},
}
FOLDED = {
    ("learned positions", "diagonal"), ("learned positions", "dense"), ("post-LN, no positions", "diagonal"),
    ("post-LN, no positions", "dense"), ("rotary", "diagonal"),
}  # fmt: skip


def exact(name="rotary", **options):
    return build(**{"attention": "softmax", **KINDS[name], **options})


def scaled(model, of_queries, of_keys, offset=0.0):
    """Scales the queries and keys of a model, and moves both away from the origin."""
    with torch.no_grad():
        for layer in model.layers:
            for linear, factor in ((layer.attention.query, of_queries), (layer.attention.key, of_keys)):
                linear.weight.mul_(factor)
                linear.bias.mul_(factor).add_(factor * offset)
    return model


def settings(**options):
    return SwapSettings(
        **{"attention": "positive", "num_features": 48, "near_block": 8, "balance": "dense", "seed": 0, **options}
    )


def some_proteins(number=6, length=50, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(FIRST_RESIDUE, FIRST_RESIDUE + 20, length).astype(np.uint8) for _ in range(number)]


def logits(model):
    with torch.no_grad():
        return model(torch.cat(proteins(*SIZES)), bounds(*SIZES))


def relative_error(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("balance", ["none", "diagonal", "dense"])
@pytest.mark.parametrize("name", KINDS)
def test_products_of_q_and_k_stay(name, balance):
    model = exact(name)
    expected, before = logits(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    moments = measure_moments(model, some_proteins())
    swapped = swap_attention(model, settings(balance=balance), moments)
    with exact_attention(swapped):
        assert relative_error(logits(swapped), expected) < 1e-5
    # A near field over everything leaves nothing to be estimated.
    whole = swap_attention(model, settings(balance=balance, near_block=64), moments)
    assert relative_error(logits(whole), expected) < 1e-5
    assert relative_error(logits(swapped), expected) > 1e-4
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    has_matrices = balance != "none" and (name, balance) not in FOLDED
    assert swapped.config.qk_balance == has_matrices
    if balance != "none" and not has_matrices:
        assert not torch.equal(swapped.layers[0].attention.query.weight, model.layers[0].attention.query.weight)


@pytest.mark.parametrize("are_rotated", [True, False])
def test_balanced_covariances_are_equal(are_rotated):
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    covariances = roots @ roots.mT + 0.1 * torch.eye(8, dtype=torch.float64)
    dense = balancing_matrices(covariances, "dense", are_rotated=False)
    inverse = torch.linalg.inv(dense)
    torch.testing.assert_close(dense, dense.mT)
    torch.testing.assert_close(dense @ covariances[0] @ dense, inverse @ covariances[1] @ inverse)
    diagonal = balancing_matrices(covariances, "diagonal", are_rotated=are_rotated)
    numbers = diagonal.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(torch.diag_embed(numbers), diagonal)
    variances = covariances.diagonal(dim1=-2, dim2=-1)
    pairs = torch.stack([numbers**2 * variances[0], variances[1] / numbers**2])
    if are_rotated:
        torch.testing.assert_close(numbers[:, :4], numbers[:, 4:])
        pairs = pairs[..., :4] + pairs[..., 4:]
    torch.testing.assert_close(pairs[0], pairs[1])

    def size(matrices):
        inverses = torch.linalg.inv(matrices)
        both = (matrices @ covariances[0] @ matrices.mT, inverses.mT @ covariances[1] @ inverses)
        return float(sum(each.diagonal(dim1=-2, dim2=-1).sum() for each in both))

    # No matrix near it makes the vectors shorter.
    for matrices in (dense, diagonal):
        for _ in range(5):
            change = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
            if matrices is diagonal:
                change = torch.diag_embed(change.diagonal(dim1=-2, dim2=-1))
                if are_rotated:
                    change[:, range(4, 8), range(4, 8)] = change[:, range(4), range(4)]
            assert size(matrices + 0.01 * change) > size(matrices)
    assert size(dense) < size(diagonal) < size(balancing_matrices(covariances, "none", are_rotated=False))


def measure_moments_of(swapped):
    """Returns the moments of q and k where layers see what they see with exact attention."""
    with exact_attention(swapped):
        return measure_moments(swapped, some_proteins())


@pytest.mark.parametrize("attention", ["positive", "hyperbolic", "oprf"])
def test_rows_are_shifted_for_the_positive_map_and_estimates_come_near_with_many(attention):
    model = scaled(exact("learned positions"), 0.5, 0.5, 0.3)
    moments = measure_moments(model, some_proteins())
    expected = logits(model)
    errors = []
    for num_features in (16, 4096):
        swapped = swap_attention(model, settings(attention=attention, num_features=num_features, near_block=0), moments)
        assert swapped.config.attention == (attention,)
        errors.append(relative_error(logits(swapped), expected))
        of_layer = swapped.layers[1].attention
        shift, rows = of_layer.feature_shift.double().unsqueeze(1), of_layer.projection.double()
        assert bool(shift.any()) == (attention == "positive")
        drawn = rows - shift
        bias = -(drawn * shift).sum(-1) - 0.5 * (shift**2).sum(-1)
        torch.testing.assert_close(of_layer.feature_bias.double(), bias, atol=1e-4, rtol=1e-4)
        if attention == "positive":
            # The mean sum of the balanced vectors.
            balanced = measure_moments_of(swapped)
            torch.testing.assert_close(shift.squeeze(1), balanced[1].means.sum(0), atol=1e-4, rtol=1e-3)
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 4


def test_balancing_and_the_shift_make_estimates_better():
    # Queries and keys far from the origin.
    model = scaled(exact("post-LN, no positions"), 0.6, 0.6, 1.0)
    moments = measure_moments(model, some_proteins())
    expected = logits(model)

    def error(balance):
        swaps = (swap_attention(model, settings(balance=balance, near_block=0, seed=s), moments) for s in range(4))
        return np.mean([float((logits(each) - expected).norm() / expected.norm()) for each in swaps])

    errors = {balance: error(balance) for balance in ("none", "diagonal", "dense")}
    assert errors["dense"] < 0.6 * errors["none"]
    assert errors["diagonal"] < 0.8 * errors["none"]


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("balance", ["diagonal", "dense"])
def test_a_head_that_is_constant_is_not_blown_up(balance, value):
    model = scaled(exact("learned positions"), 0.5, 0.5)
    with torch.no_grad():
        # The queries of the first head.
        model.layers[0].attention.query.weight[:16] = 0
        model.layers[0].attention.query.bias[:16] = value
    moments = measure_moments(model, some_proteins())
    expected = logits(model)
    errors = {
        each: float(
            (logits(swap_attention(model, settings(balance=each, num_features=256), moments)) - expected).norm()
        )
        for each in ("none", balance)
    }
    swapped = swap_attention(model, settings(balance=balance), moments)
    assert swapped.layers[0].attention.feature_shift.abs().max() < 100
    assert errors[balance] < 1.2 * errors["none"]
    with exact_attention(swapped):
        assert relative_error(logits(swapped), expected) < 1e-4


def test_the_exact_twin_of_a_swap_is_the_model_of_before():
    for name, balance in (("learned positions", "dense"), ("rotary", "dense"), ("our own with local layers", "none")):
        model = exact(name)
        swapped = swap_attention(model, settings(balance=balance), measure_moments(model, some_proteins()))
        twin = exact_twin(swapped)
        assert twin.config.kinds == model.config.kinds
        assert relative_error(logits(twin), logits(model)) < 1e-5
    with pytest.raises(ValueError, match="expected estimates of exact attention"):
        exact_twin(build())


def test_the_rows_are_a_function_of_the_seed():
    model = exact()
    moments = measure_moments(model, some_proteins())
    rows = [swap_attention(model, settings(seed=seed), moments).layers[1].attention.projection for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def attention_matrix_of(model, context):
    with context(model):
        return attention_matrix(model, some_proteins(1)[0], 1, 1)


def test_parts_of_the_attention_alone():
    model = exact("our own")
    moments = measure_moments(model, some_proteins())
    swapped = swap_attention(model, settings(near_block=8), moments)
    kept = logits(swapped)
    with near_only(swapped):
        near = logits(swapped)
    with far_only(swapped):
        far = logits(swapped)
    assert torch.equal(logits(swapped), kept)
    weights = attention_matrix_of(swapped, near_only)
    blocks = np.arange(len(weights)) // 8
    is_near = np.abs(blocks - blocks[:, None]) <= 1
    assert (weights[~is_near] == 0).all()
    of_exact = attention_matrix_of(swapped, exact_attention)
    np.testing.assert_allclose(weights[0, :16] / weights[0, 3], of_exact[0, :16] / of_exact[0, 3], rtol=1e-5)
    estimates = swap_attention(model, settings(near_block=0), moments)
    assert relative_error(far, logits(estimates)) < 1e-5
    assert relative_error(near, far) > 1e-3


def test_maps_of_the_attention_are_those_with_which_it_is_computed():
    model = exact("learned positions")
    moments = measure_moments(model, some_proteins())
    protein = some_proteins(1)[0]
    tokens = torch.tensor([0, *protein.tolist(), 2])
    for near_block, attention in itertools.product((0, 8), ("positive", "hyperbolic", "oprf")):
        swapped = swap_attention(model, settings(attention=attention, near_block=near_block), moments)
        weights = attention_matrix(swapped, protein, 1, 1)
        seen = {}
        of_layer = swapped.layers[0].attention
        hooks = [
            of_layer.value.register_forward_hook(lambda _, inputs, out, seen=seen: seen.update(v=out)),
            of_layer.output.register_forward_hook(lambda _, inputs, out, seen=seen: seen.update(out=inputs[0])),
        ]
        with torch.no_grad():
            swapped(tokens, bounds(len(tokens)))
        for hook in hooks:
            hook.remove()
        size = swapped.config.head_dim
        expected = torch.tensor(weights) @ seen["v"][:, :size].double()
        torch.testing.assert_close(seen["out"][:, :size].double(), expected, rtol=1e-4, atol=1e-5)


def test_other_draws_keep_the_shift_and_are_taken_back():
    model = scaled(exact("learned positions"), 0.5, 0.5)
    swapped = swap_attention(model, settings(near_block=0), measure_moments(model, some_proteins()))
    expected = logits(swapped)
    attention = swapped.layers[0].attention
    shift, rows = attention.feature_shift.clone(), attention.projection.clone()
    with other_draw(swapped, torch.Generator().manual_seed(9)):
        assert not torch.equal(attention.projection, rows)
        assert torch.equal(attention.feature_shift, shift)
        assert relative_error(logits(swapped), logits(model)) < 0.7
    assert torch.equal(logits(swapped), expected)
    with kept_projections(swapped):
        attention.redraw(torch.Generator().manual_seed(3))
    assert torch.equal(logits(swapped), expected)


def test_health_sees_the_biases():
    model = exact("learned positions")
    moments = measure_moments(model, some_proteins())
    swapped = swap_attention(model, settings(near_block=0), moments)
    tokens, ends = torch.cat(proteins(*SIZES)), bounds(*SIZES)
    with_biases = [layer.effective_features for layer in attention_health(swapped, tokens, ends)]
    swapped.layers[0].attention.feature_bias[:, 0] += 50
    with_one = [layer.effective_features for layer in attention_health(swapped, tokens, ends)]
    assert with_one[0] == pytest.approx(1, abs=1e-3)
    assert with_biases[0] > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "local"}, "has no exact attention over whole proteins to swap, but local"),
        ({"attention": ("softmax", "positive")}, "has layers with random features already"),
        ({"attention": "softmax", "local_bias": 3}, "has a learned prior on near tokens"),
    ],
)
def test_models_without_anything_to_swap_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        swap_attention(build(**options), settings(balance="none"), None)


def test_missing_moments_and_proteins_are_refused():
    with pytest.raises(ValueError, match="moments: expected those of every layer for balance = 'dense', got none"):
        swap_attention(exact(), settings(), None)
    with pytest.raises(ValueError, match="proteins: expected at least one, got none"):
        measure_moments(exact(), [])
    model = exact()
    with torch.no_grad():
        model.layers[0].attention.query.bias[0] = float("inf")
    with pytest.raises(ValueError, match="its queries and keys are not finite"):
        measure_moments(model, some_proteins(1))
    for context in (near_only, far_only):
        with pytest.raises(ValueError, match="expected a layer with a near field, got none"), context(build()):
            pass


def test_settings_of_the_model_say_what_it_is():
    config = swapped_config(exact("our own with local layers").config, settings(near_block=16))
    assert (config.kinds, config.near_block, config.estimator) == (("local", "near-far"), 16, True)
    with pytest.raises(ValueError, match="qk_balance: expected false without estimator"):
        type(config).model_validate({**config.model_dump(), "estimator": False})
    with pytest.raises(ValueError, match="estimator: expected maps that estimate softmax attention, got 'relu'"):
        build(attention="relu", estimator=True)
    with pytest.raises(ValueError, match="estimator: expected false where all layers are exact"):
        build(attention="softmax", estimator=True)
