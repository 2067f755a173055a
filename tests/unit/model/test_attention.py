"""The attention layer: QK-norm, rescaling, its projections, and its results against the float64 twins."""

import math
from itertools import pairwise

import pytest
import torch

from protlm.config import ModelConfig
from protlm.model import attention as attention_module
from protlm.model.attention import SelfAttention, rescale
from protlm.model.performer import Performer
from protlm.model.positions import rotary_angles
from protlm.ops import oprf_parameter, reference
from tests.conftest import TOLERANCE, relative_error
from tests.unit.model.small_models import EXACT, KINDS, SIZES, attended, bounds, build, proteins, segments_of

FLOAT32 = TOLERANCE[torch.float32]


@pytest.mark.parametrize("logits", [None, -20.0, 0.0, 20.0])
def test_qk_norm_gives_the_squared_norm_of_a_bounded_temperature(logits, monkeypatch):
    model = build(max_temperature=3.0)
    if logits is not None:
        for layer in model.layers:
            torch.nn.init.constant_(layer.attention.temperature_logit, logits)
    q, k, _, _ = attended(model, proteins(30)[0], bounds(30), monkeypatch)
    learned = model.layers[0].attention.temperature_logit
    temperature = 3.0 * torch.sigmoid(learned)
    assert (temperature > 0).all()
    assert (temperature <= 3.0).all()
    for x in (q, k):
        squares = x.square().sum(-1)
        assert relative_error(squares, (temperature * math.sqrt(16)).view(1, 2, 1).expand_as(squares)) < FLOAT32


def test_temperatures_start_at_three_quarters_of_their_bound():
    model = Performer(ModelConfig(attention="positive", max_temperature=2.0))
    model.reset(0)
    for layer in model.layers:
        assert (2 * torch.sigmoid(layer.attention.temperature_logit) - 1.5).abs().max() < 1e-6


@pytest.mark.parametrize("kind", EXACT)
def test_temperatures_of_exact_kinds_have_a_start_and_no_bound(kind, monkeypatch):
    model = Performer(ModelConfig(attention=kind, num_heads=2, model_dim=32, exact_temperature=6.0))
    model.reset(0)
    learned = model.layers[0].attention.log_temperature
    assert relative_error(learned.exp(), torch.full((2,), 6.0)) < FLOAT32
    torch.nn.init.constant_(learned, math.log(50))
    name = "local_attention" if kind == "local" else "softmax_attention"
    q, k, _, _ = attended(model, proteins(30)[0], bounds(30), monkeypatch, name)
    for x in (q, k):
        assert relative_error(x.square().sum(-1), torch.full((1, 2, 30), 50 * math.sqrt(16))) < FLOAT32


@pytest.mark.parametrize("kind", EXACT)
def test_exact_kinds_can_have_the_bound_of_favor(kind):
    model = build(attention=kind, exact_temperature=0.0, max_temperature=3.0)
    assert {name for name in model.state_dict() if "temperature" in name} == {
        f"layers.{layer}.attention.temperature_logit" for layer in range(2)
    }


@pytest.mark.parametrize("kind", ["positive", *EXACT])
def test_the_temperature_is_learned(kind):
    model = build(attention=kind)
    model(proteins(30)[0], bounds(30)).square().sum().backward()
    learned = [parameter for name, parameter in model.named_parameters() if "temperature" in name]
    assert len(learned) == 2
    assert all(parameter.grad.abs().min() > 0 for parameter in learned)


@pytest.mark.parametrize("logit", [-100.0, 100.0])
def test_a_temperature_at_the_end_of_its_range_has_gradients(logit):
    model = build()
    torch.nn.init.constant_(model.layers[0].attention.temperature_logit, logit)
    model(proteins(30)[0], bounds(30)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_without_qk_norm_q_keeps_its_norms(monkeypatch):
    model = build(qk_norm=False)
    q, _, _, _ = attended(model, proteins(30)[0], bounds(30), monkeypatch)
    norms = q.norm(dim=-1)
    assert norms.max() > 1.2 * norms.min()
    assert not any("temperature" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("sizes", [(30,), (3, 20, 7)])
def test_softmax_attention_equals_its_float64_twin(sizes, monkeypatch):
    model = build(attention="softmax")
    q, k, v, out = attended(model, torch.cat(proteins(*sizes)), bounds(*sizes), monkeypatch, "softmax_attention")
    assert relative_error(out, reference.softmax_attention(q, k, v, cu_seqlens=bounds(*sizes))) < FLOAT32


def of_kind(kind):
    """The options of the op for a kind with features, in blocks of 4."""
    return {"feature_map": "positive", "near_block": 4} if kind == "near-far" else {"feature_map": kind}


def test_near_far_layers_may_have_another_map(monkeypatch):
    model = build(attention="near-far", near_block=4, near_map="hyperbolic")
    q, k, v, out = attended(model, proteins(25)[0], bounds(25), monkeypatch)
    projection = model.state_dict()["layers.0.attention.projection"]
    expected = reference.favor_attention(q, k, v, projection, feature_map="hyperbolic", near_block=4)
    assert relative_error(out, expected) < FLOAT32


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in EXACT])
def test_favor_attention_is_given_the_saved_projection_of_its_head(kind, monkeypatch):
    model = build(attention=kind, near_block=4)
    q, k, v, out = attended(model, torch.cat(proteins(3, 25)), bounds(3, 25), monkeypatch)
    projection = model.state_dict()["layers.0.attention.projection"]
    expected = reference.favor_attention(q, k, v, projection, cu_seqlens=bounds(3, 25), **of_kind(kind))
    assert relative_error(out, expected) < FLOAT32


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*EXACT, "oprf")])
def test_causal_favor_equals_its_float64_twin(kind, monkeypatch):
    model = build(attention=kind, causal=True, near_block=4)
    q, k, v, out = attended(model, torch.cat(proteins(3, 25)), bounds(3, 25), monkeypatch)
    projection = model.layers[0].attention.projection
    options = {"cu_seqlens": bounds(3, 25), "causal": True, **of_kind(kind)}
    expected = reference.favor_attention(q, k, v, projection, **options)
    assert relative_error(out, expected) < FLOAT32


def test_causal_exact_attention_equals_its_float64_twin(monkeypatch):
    model = build(attention="softmax", causal=True)
    q, k, v, out = attended(model, torch.cat(proteins(3, 25)), bounds(3, 25), monkeypatch, "softmax_attention")
    expected = reference.softmax_attention(q, k, v, cu_seqlens=bounds(3, 25), causal=True)
    assert relative_error(out, expected) < FLOAT32


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_local_attention_sees_the_tokens_of_its_window(causal, monkeypatch):
    model = build(attention="local", local_window=5, causal=causal)
    q, k, v, out = attended(model, torch.cat(proteins(3, 25)), bounds(3, 25), monkeypatch, "local_attention")
    expected = reference.softmax_attention(q, k, v, cu_seqlens=bounds(3, 25), causal=causal, window=5)
    assert relative_error(out, expected) < FLOAT32


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_a_local_bias_favours_near_tokens(causal, monkeypatch):
    model = build(attention="softmax", local_window=4, local_bias=3.0, causal=causal)
    biases = model.layers[0].attention.local_bias
    assert (biases - 3).abs().max() < 1.5
    sizes = (3, 25)
    q, k, v, out = attended(model, torch.cat(proteins(*sizes)), bounds(*sizes), monkeypatch, "softmax_attention")
    scores = (q @ k.mT).double() / 4
    places = torch.arange(28)
    scores += biases.double().view(2, 1, 1) * ((places - places.unsqueeze(1)).abs() <= 4)
    segment = (places >= 3).long()
    hidden = segment != segment.unsqueeze(1)
    hidden = hidden | (places > places.unsqueeze(1)) if causal else hidden
    expected = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v.double()
    assert relative_error(out, expected) < FLOAT32
    model(torch.cat(proteins(*sizes)), bounds(*sizes)).square().sum().backward()
    assert all(layer.attention.local_bias.grad.abs().min() > 0 for layer in model.layers)


def test_layers_take_the_kinds_in_turn():
    model = build(num_layers=5, attention=("local", "relu", "softmax"))
    assert [layer.attention.kind for layer in model.layers] == ["local", "relu", "softmax", "local", "relu"]
    assert [name for name in model.state_dict() if "projection" in name] == [
        "layers.1.attention.projection", "layers.4.attention.projection"
    ]  # fmt: skip


def test_causal_oprf_takes_its_constant_from_the_temperature(monkeypatch):
    model = build(attention="oprf", causal=True)
    given = []
    original = attention_module.favor_attention
    monkeypatch.setattr(
        attention_module,
        "favor_attention",
        lambda *arguments, **options: given.append(options["oprf_a"]) or original(*arguments, **options),
    )
    q, k, _, _ = attended(model, proteins(200)[0], bounds(200), monkeypatch)
    # ‖x‖² of what the attention is really given, x = q/d^¼.
    mean_square = sum(x.square().sum(-1).mean((0, 2)) for x in (q, k)) / 4
    assert relative_error(given[0], oprf_parameter(mean_square, 16)) < FLOAT32
    assert not given[0].requires_grad
    assert given[0].max() < 0


def test_attention_without_rotary_positions_leaves_q_unturned():
    attention = SelfAttention(ModelConfig(num_heads=2, model_dim=16, qk_norm=False, conv_width=0), "positive")
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    x = torch.ones(5, 16)
    q, _, _ = attention.queries_keys_values(x, segments_of(5), None)
    assert relative_error(q.flatten(1), attention.query(x)) < FLOAT32


@pytest.mark.parametrize("conv_width", [0, 3])
def test_autocast_makes_what_enters_attention_short(conv_width):
    model = build(conv_width=conv_width)
    tokens, segments = proteins(30)[0], segments_of(30)
    attention = model.layers[0].attention
    rotary = rotary_angles(segments.positions, attention.head_dim, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = attention.queries_keys_values(model.embedding(tokens), segments, rotary)
    assert {x.dtype for x in actual} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["positive", "local", "softmax"])
def test_attention_copes_with_one_token_and_with_a_segment_of_length_zero(kind):
    attention = SelfAttention(ModelConfig(num_heads=2, model_dim=16), kind)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    attention.redraw(torch.Generator().manual_seed(0))
    for sizes in ((1,), (0, 1), (2, 0, 3)):
        segments = segments_of(*sizes)
        x = torch.ones(sum(sizes), 16)
        assert attention(x, segments, rotary_angles(segments.positions, 8, x.dtype)).isfinite().all()


def q_and_k(length, seed=0):
    """Returns q and k whose dimensions differ in size by orders of magnitude, in different ways."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 2, 8)
    q, k = (torch.randn(length, 3, 8, generator=generator) for _ in range(2))
    return q * sizes, k * sizes.roll(3)


def test_rescaling_keeps_products_and_makes_the_norms_least():
    q, k = q_and_k(40)
    new_q, new_k = rescale(q, k, segments_of(40))
    products = torch.einsum("lhd,mhd->hlm", q.double(), k.double())
    assert relative_error(torch.einsum("lhd,mhd->hlm", new_q.double(), new_k.double()), products) < FLOAT32
    least = (new_q.square() + new_k.square()).sum()
    assert least < 0.2 * (q.square() + k.square()).sum()
    for dimension, factor in ((0, 1.1), (0, 0.9), (7, 1.1), (7, 0.9)):
        other_q, other_k = new_q.clone(), new_k.clone()
        other_q[..., dimension] *= factor
        other_k[..., dimension] /= factor
        assert (other_q.square() + other_k.square()).sum() > least


def test_rescaling_is_of_every_segment_and_head_on_its_own():
    sizes = (5, 0, 1, 30)
    q, k = q_and_k(36)
    whole = torch.stack(rescale(q, k, segments_of(*sizes))).split(sizes, 1)
    for size, actual, *parts in zip(sizes, whole, q.split(sizes), k.split(sizes), strict=True):
        alone = torch.stack(rescale(*parts, segments_of(size)))
        assert torch.equal(actual, alone)
        for head in range(3):
            single = (part[:, head : head + 1].contiguous() for part in parts)
            only = torch.stack(rescale(*single, segments_of(size)))
            assert relative_error(only, alone[:, :, head : head + 1]) < FLOAT32


def test_a_dimension_of_zeros_is_left_alone():
    q, k = q_and_k(9)
    q[..., 0] = 0.0
    k[..., 1] = 0.0
    new_q, new_k = rescale(q, k, segments_of(9))
    assert torch.equal(new_k[..., 0], k[..., 0])
    assert torch.equal(new_q[..., 1], q[..., 1])
    assert torch.stack((new_q, new_k)).isfinite().all()


def test_no_gradient_flows_through_the_scale():
    q, k = (x.requires_grad_() for x in q_and_k(6))
    new_q, new_k = rescale(q, k, segments_of(6))
    scale = (new_q / q).detach()
    (q_grad,) = torch.autograd.grad(new_q.sum() + new_k.sum(), q)
    assert relative_error(q_grad, scale) < FLOAT32


@torch.no_grad()
def test_rescaling_changes_nothing_for_exact_attention_and_something_for_favor(monkeypatch):
    tokens, cu_seqlens = torch.cat(proteins(*SIZES)), bounds(*SIZES)
    for kind, is_same in (("softmax", True), ("positive", False)):
        plain, rescaled = (build(attention=kind, rescale_qk=choice) for choice in (False, True))
        error = relative_error(rescaled(tokens, cu_seqlens), plain(tokens, cu_seqlens))
        assert (error < FLOAT32) == is_same
    q, k, _, _ = attended(build(rescale_qk=True), tokens, cu_seqlens, monkeypatch)
    for start, stop in pairwise(cu_seqlens.tolist()):
        q_squares, k_squares = (x[0, :, start:stop].square().sum(1) for x in (q, k))
        assert relative_error(q_squares, k_squares) < FLOAT32


def test_simplex_rows_are_what_the_configuration_asks_for():
    projection = build(projection="simplex").layers[0].attention.projection
    directions = torch.nn.functional.normalize(projection[:, :16], dim=-1)
    cosines = directions @ directions.transpose(1, 2)
    off_diagonal = cosines[:, ~torch.eye(16, dtype=torch.bool)]
    assert (off_diagonal + 1 / 15).abs().max() < 1e-5


def test_relu_without_a_projection_has_none_in_its_weights(monkeypatch):
    model = build(attention="relu", projection="none")
    assert not ModelConfig(attention="relu", projection="none").has_projection
    assert not any("projection" in name for name in model.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.redraw(torch.Generator().manual_seed(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    q, k, v, out = attended(model, proteins(30)[0], bounds(30), monkeypatch)
    weights = (q.relu() + 1e-3) @ (k.relu() + 1e-3).transpose(-1, -2)
    assert relative_error(out, weights @ v / weights.sum(-1, keepdim=True)) < FLOAT32
