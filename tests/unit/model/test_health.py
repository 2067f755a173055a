"""The health that `attention_health` measures on models whose state is known."""

import math

import pytest
import torch

from protlm.model.health import _sampled_pairs, attention_health, log_features
from protlm.ops import draw_projection, kernel_features
from protlm.ops.feature_maps import DEFINITIONS
from tests.conftest import relative_error
from tests.unit.model.small_models import bounds, build, proteins, segments_of

SIZES = (40, 3, 90, 3)


def measured(model, sizes=SIZES):
    return attention_health(model, torch.cat(proteins(*sizes)), bounds(*sizes))


def with_norms(temperature_logit, **options):
    """Returns a model under qk_norm all of whose heads have one temperature."""
    model = build(num_features=64, **options)
    for layer in model.layers:
        torch.nn.init.constant_(layer.attention.temperature_logit, temperature_logit)
    return model


@pytest.mark.parametrize("feature_map", DEFINITIONS)
def test_log_features_give_the_shares_of_kernel_features(feature_map):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(20, 16, generator=generator) for _ in range(2))
    projection = draw_projection(40, 16, generator=generator)
    a = torch.tensor([-0.07]) if feature_map == "oprf" else None
    parts = [kernel_features(x.double(), projection.double(), feature_map=feature_map, oprf_a=a) for x in (q, k)]
    expected = (parts[0] * parts[1]).abs()
    actual = torch.softmax(sum(log_features(x, projection, feature_map, a) for x in (q, k)), -1)
    assert relative_error(actual, expected / expected.sum(-1, keepdim=True)) < 1e-4


def test_log_features_without_a_projection_are_of_the_vector_itself():
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    assert relative_error(log_features(x, None, "relu"), kernel_features(x, None, feature_map="relu").log()) < 1e-6


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"attention": "oprf"}, {"attention": ("softmax", "local")}], ids=str
)
def test_norms_are_the_temperature_under_qk_norm(options):
    model = build(max_temperature=3.0, **options)
    for layer, health in zip(model.layers, measured(model), strict=True):
        attention = layer.attention
        bounded, free = attention.temperature_logit, attention.log_temperature
        temperatures = free.exp() if bounded is None else 3.0 * torch.sigmoid(bounded)
        assert health.q_norm == pytest.approx(temperatures.mean().item(), rel=1e-4)
        assert health.k_norm == pytest.approx(temperatures.mean().item(), rel=1e-4)
        assert health.max_q_norm == pytest.approx(temperatures.max().item(), rel=1e-4)
        assert health.max_k_norm == pytest.approx(temperatures.max().item(), rel=1e-4)
    assert [health.layer for health in measured(model)] == [1, 2]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", ["positive", "hyperbolic", "regularised", "oprf"])
def test_nearly_all_features_share_the_estimate_where_norms_are_tiny(feature_map, causal):
    num_features = 128 if feature_map == "hyperbolic" else 64
    for health in measured(with_norms(-14.0, attention=feature_map, causal=causal)):
        assert health.effective_features == pytest.approx(num_features, rel=0.01)
        assert health.dead_features == 0


def test_fewer_features_share_the_estimate_the_larger_the_norms():
    actual = [measured(with_norms(logit, max_temperature=8.0))[0].effective_features for logit in (-9, -3, 0, 9)]
    assert actual == sorted(actual, reverse=True)
    assert actual[-1] < 0.5 * actual[0]


@pytest.mark.parametrize("scale", [1e2, 1e6, 1e12])
def test_one_feature_is_left_where_norms_are_huge_and_all_numbers_stay_finite(scale):
    model = build(qk_norm=False, conv_width=0, num_features=64)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.query.weight.mul_(scale)
            layer.attention.key.weight.mul_(scale)
    for health in measured(model):
        assert 1 <= health.effective_features < 1.2
        assert 0 < health.dead_features < 1
        assert math.isfinite(health.q_norm)
        assert health.max_q_norm >= health.q_norm > 100


def test_effective_features_are_the_mean_over_all_pairs_of_a_short_row():
    # 8 queries and 8 keys: the sample takes each pair equally often.
    model = build()
    tokens, cu_seqlens = proteins(8)[0], bounds(8)
    seen = []
    model.layers[0].attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    actual = attention_health(model, tokens, cu_seqlens)[0]
    attention = model.layers[0].attention
    with torch.no_grad():
        q, k, _ = attention.queries_keys_values(*seen[0][:3])
        parts = [
            kernel_features(x.transpose(0, 1).double(), attention.projection.double(), feature_map="positive")
            for x in (q, k)
        ]
    pairs = parts[0].unsqueeze(2) * parts[1].unsqueeze(1)
    expected = (pairs.sum(-1).square() / pairs.square().sum(-1)).mean().item()
    assert actual.effective_features == pytest.approx(expected, rel=1e-4)


def test_a_pair_is_of_one_segment_and_looks_back_only_where_the_model_is_causal():
    segments = segments_of(100, 0, 1, 3, 200)
    for causal in (False, True):
        queries, keys = _sampled_pairs(segments, causal)
        assert len(queries) == 64
        assert queries.tolist() == sorted(set(queries.tolist()))
        assert torch.equal(segments.numbers[keys], segments.numbers[queries].unsqueeze(1).expand_as(keys))
        assert bool((keys > queries.unsqueeze(1)).any()) != causal
        assert len(keys[-1].unique()) == 64


def test_a_feature_that_never_fires_is_dead():
    model = with_norms(9.0, attention="relu")
    before = measured(model)[0]
    with torch.no_grad():
        # A row of zeros gives each key the offset alone, far below its share.
        model.layers[0].attention.projection[:, :8] = 0
    after = measured(model)[0]
    assert before.dead_features == 0
    assert after.dead_features == 8 / 64


def test_exact_attention_has_no_features():
    for health in measured(build(attention="softmax")):
        assert health.effective_features is None
        assert health.dead_features is None


def test_relu_without_a_projection_counts_head_dim():
    for health in measured(build(attention="relu", projection="none")):
        assert 1 <= health.effective_features <= 16


def test_measuring_leaves_no_trace():
    model = build(dropout=0.5)
    model.train()
    model.layers[1].eval()
    tokens, cu_seqlens = torch.cat(proteins(*SIZES)), bounds(*SIZES)
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert attention_health(model, tokens, cu_seqlens) == attention_health(model, tokens, cu_seqlens)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_wrapped_model_is_measured_too():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *arguments):
            return self.module(*arguments)

    assert measured(Wrapper(build())) == measured(build())


def test_hooks_are_gone_after_a_failure():
    model = build(positions="learned", max_positions=16)
    with pytest.raises(ValueError, match="max_positions"):
        measured(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
