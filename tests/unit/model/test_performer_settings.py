"""Positions, norms, feed-forward layers, causal models and activation checkpointing: their laws and formulas."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from protlm.config import ModelConfig
from protlm.model import attention as attention_module
from protlm.model.attention import SelfAttention
from protlm.model.convolution import SegmentConvolution
from protlm.model.performer import EncoderLayer, Performer
from protlm.model.positions import rotary_angles, sinusoids
from protlm.model.segments import Segments
from protlm.ops import oprf_parameter, reference
from protlm.vocabulary import FIRST_RESIDUE
from tests.conftest import TOLERANCE, relative_error
from tests.unit.model.test_performer import KINDS, SIZES, attended, bounds, build, proteins

FLOAT32 = TOLERANCE[torch.float32]
POSITIONS = ("rotary", "learned", "sinusoidal", "none")
SETTINGS = [
    *({"positions": positions} for positions in POSITIONS),
    {"layer_norm": "post"},
    {"ffn": "swiglu"},
    {"qk_norm": False},
    {"rescale_qk": True},
    {"attention": "relu", "projection": "none"},
    {"causal": True},
    {"causal": True, "attention": "softmax"},
    {"causal": True, "attention": "oprf", "conv_width": 5},
    {"causal": True, "layer_norm": "post", "ffn": "swiglu", "positions": "learned"},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@torch.no_grad()
def test_a_protein_has_the_same_logits_alone_and_in_any_row(options):
    model = build(**options)
    members = proteins(*SIZES)
    packed = model(torch.cat(members), bounds(*SIZES)).split(SIZES)
    for tokens, found in zip(members, packed, strict=True):
        assert relative_error(found, model(tokens, bounds(len(tokens)))) < FLOAT32


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_protein_sends_no_gradient_into_its_neighbours(options):
    model = build(**options)
    sizes = (4, 3, 30)
    captured = {}
    model.embedding.register_forward_hook(lambda module, inputs, output: captured.update(x=output))
    logits = model(torch.cat(proteins(*sizes)), bounds(*sizes))
    (gradient,) = torch.autograd.grad(logits[4:7].square().sum(), captured["x"])
    assert gradient[4:7].abs().sum(-1).all()
    assert not gradient[:4].any()
    assert not gradient[7:].any()


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_every_parameter_gets_a_gradient(options):
    model = build(**options, max_positions=30)
    model(torch.cat(proteins(3, 30)), bounds(3, 30)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("options", [*SETTINGS, *({"attention": kind} for kind in KINDS)], ids=str)
def test_reset_is_a_function_of_the_seed_alone_and_sets_everything(options):
    states = []
    for seed, rubbish in ((0, 7.0), (0, -3.0), (1, 7.0)):
        model = Performer(ModelConfig(num_layers=2, **options))
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(rubbish)
        torch.manual_seed(int(rubbish) + 10)
        model.reset(seed)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    assert not torch.equal(states[0]["embedding.weight"], states[2]["embedding.weight"])


CAUSAL = [
    {"attention": kind, "conv_width": width, "positions": positions, "layer_norm": norm, "ffn": ffn}
    for (kind, width, positions), (norm, ffn) in zip(
        product((*KINDS, "trig"), (0, 3, 5), POSITIONS),
        [("pre", "gelu"), ("post", "gelu"), ("pre", "swiglu")] * 28,
        strict=True,
    )
]


@pytest.mark.parametrize("options", CAUSAL, ids=lambda options: "-".join(map(str, options.values())))
@torch.no_grad()
def test_no_logit_of_a_causal_model_depends_on_later_tokens(options):
    model = build(causal=True, num_features=8, **options)
    sizes = (9, 30, 3)
    tokens = torch.cat(proteins(*sizes))
    plain = model(tokens, bounds(*sizes))
    for position in (10, 24, 38):
        changed = tokens.clone()
        changed[position:39] = FIRST_RESIDUE + (tokens[position:39] - FIRST_RESIDUE + 1) % 20
        found = model(changed, bounds(*sizes))
        assert torch.equal(found[:position], plain[:position])
        assert (found[position] - plain[position]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", [*KINDS, "trig"])
def test_no_gradient_of_a_causal_model_flows_to_later_tokens(kind):
    model = build(causal=True, attention=kind)
    captured = {}
    model.embedding.register_forward_hook(lambda module, inputs, output: captured.update(x=output))
    logits = model(proteins(30)[0], bounds(30))
    (gradient,) = torch.autograd.grad(logits[11].square().sum(), captured["x"])
    assert gradient[:12].abs().sum(-1).all()
    assert not gradient[12:].any()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("softmax", "oprf")])
def test_causal_favor_equals_its_float64_twin(kind, monkeypatch):
    model = build(attention=kind, causal=True)
    q, k, v, out = attended(model, torch.cat(proteins(3, 25)), bounds(3, 25), monkeypatch)
    projection = model.layers[0].attention.projection
    expected = reference.favor_attention(q, k, v, projection, feature_map=kind, cu_seqlens=bounds(3, 25), causal=True)
    assert relative_error(out, expected) < FLOAT32


def test_causal_exact_attention_equals_its_float64_twin(monkeypatch):
    model = build(attention="softmax", causal=True)
    q, k, v, out = attended(model, torch.cat(proteins(3, 25)), bounds(3, 25), monkeypatch, "_exact_attention")
    expected = reference.softmax_attention(q, k, v, cu_seqlens=bounds(3, 25), causal=True)
    assert relative_error(out, expected) < FLOAT32


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


@pytest.mark.parametrize("width", [1, 3, 5])
def test_a_causal_convolution_is_padded_at_the_left_of_every_segment(width):
    convolution = SegmentConvolution(6, width, causal=True).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        convolution.weight.copy_(torch.randn(width, 6, generator=generator))
    sizes = (3, 0, 1, 2, 9)
    x = torch.randn(15, 6, generator=generator, dtype=torch.float64)
    found = convolution([x], Segments.from_bounds(bounds(*sizes)))[0].split(sizes)
    for part, result in zip(x.split(sizes), found, strict=True):
        padded = F.pad(part.T, (width - 1, 0)).unsqueeze(0)
        if len(part):
            expected = F.conv1d(padded, convolution.weight.T.unsqueeze(1), groups=6)[0].T
            assert relative_error(result, expected) < 1e-12


def test_a_causal_convolution_starts_as_the_identity():
    convolution = SegmentConvolution(4, 5, causal=True)
    convolution.reset()
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(convolution([x], Segments.from_bounds(bounds(7)))[0], x)


def test_sinusoids_are_those_of_vaswani():
    found = sinusoids(torch.tensor([0, 7]), 8)
    assert found[0].tolist() == [0, 1] * 4
    for pair in range(4):
        angle = 7 / 10000 ** (2 * pair / 8)
        assert found[1, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert found[1, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@torch.no_grad()
def test_added_positions_start_anew_in_every_segment_and_are_as_large_as_embeddings():
    for positions in ("learned", "sinusoidal"):
        model = Performer(ModelConfig(positions=positions, max_positions=40))
        model.reset(0)
        tokens = torch.cat(proteins(40, 7))
        added = model.hidden_states(tokens, bounds(40, 7), (0,))[0] - model.embedding.weight[tokens]
        assert relative_error(added[40:], added[:7]) < 1e-6
        assert added.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.05)
        assert (added[1:40] - added[:39]).abs().amax(-1).min() > 1e-3
        if positions == "learned":
            assert relative_error(added[:40], model.position_embedding.weight) < 1e-6


@torch.no_grad()
def test_without_positions_a_bidirectional_model_sees_a_set():
    model = build(positions="none", conv_width=0)
    tokens = proteins(20)[0]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert relative_error(model(tokens[order], bounds(20)), model(tokens, bounds(20))[order]) < FLOAT32


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@torch.no_grad()
def test_with_added_positions_the_order_of_residues_matters(positions):
    model = build(positions=positions, conv_width=0)
    tokens = proteins(20)[0]
    assert relative_error(model(tokens.flip(0), bounds(20)).flip(0), model(tokens, bounds(20))) > 1e-3


def test_a_segment_that_learned_positions_do_not_reach_is_a_value_error():
    model = build(positions="learned", max_positions=20)
    model(torch.cat(proteins(20, 20)), bounds(20, 20))
    with pytest.raises(ValueError, match=r"max_positions = 20 tokens, got one of 21"):
        model(torch.cat(proteins(3, 21)), bounds(3, 21))


def layer_and_inputs(**options):
    model = build(num_layers=1, **options)
    segments = Segments.from_bounds(bounds(12))
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(3))
    return model.layers[0], (x, segments, rotary_angles(segments.positions, 16, x.dtype))


@torch.no_grad()
def test_post_norm_is_the_norm_of_each_residual_sum():
    layer, (x, *rest) = layer_and_inputs(layer_norm="post")
    middle = layer.attention_norm(x + layer.attention(x, *rest))
    expected = layer.ffn_norm(middle + layer.ffn_out(F.gelu(layer.ffn_in(middle))))
    assert relative_error(layer(x, *rest), expected) < FLOAT32


@torch.no_grad()
def test_swiglu_gates_a_value():
    layer, (x, *rest) = layer_and_inputs(ffn="swiglu")
    middle = x + layer.attention(layer.attention_norm(x), *rest)
    normed = layer.ffn_norm(middle)
    gate = layer.ffn_gate(normed)
    expected = middle + layer.ffn_out(gate * torch.sigmoid(gate) * layer.ffn_in(normed))
    assert relative_error(layer(x, *rest), expected) < FLOAT32


def test_post_norm_models_have_no_final_norm():
    names = build(layer_norm="post").state_dict()
    assert not any("final_norm" in name for name in names)
    assert "final_norm.weight" in build().state_dict()


@torch.no_grad()
def test_the_last_hidden_state_of_a_post_norm_model_is_the_last_layers():
    model = build(layer_norm="post")
    last = []
    model.layers[-1].register_forward_hook(lambda module, inputs, output: last.append(output))
    states = model.hidden_states(proteins(9)[0], bounds(9), (2,))
    assert torch.equal(states[2], last[0])


def gradients(model, checkpoint_activations):
    model.checkpoint_activations = checkpoint_activations
    model.zero_grad()
    torch.manual_seed(7)
    logits = model(torch.cat(proteins(*SIZES)), bounds(*SIZES))
    logits.square().sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"attention": "softmax"}, {"causal": True}], ids=str)
def test_activation_checkpointing_changes_no_bit(options):
    model = build(**options).train()
    for found, expected in zip(gradients(model, True), gradients(model, False), strict=True):
        assert torch.equal(found, expected)


def test_activation_checkpointing_computes_each_layer_twice_in_training_only(monkeypatch):
    model = build().train()
    calls = []
    original = EncoderLayer.forward
    monkeypatch.setattr(EncoderLayer, "forward", lambda self, *inputs: calls.append(self) or original(self, *inputs))
    gradients(model, False)
    assert len(calls) == 2
    gradients(model, True)
    assert len(calls) == 2 + 4
    with torch.no_grad():
        model(proteins(9)[0], bounds(9))
    model.eval()
    gradients(model, True)
    assert len(calls) == 6 + 2 + 2


def test_attention_without_rotary_positions_leaves_q_unturned():
    attention = SelfAttention(ModelConfig(num_heads=2, model_dim=16, qk_norm=False, conv_width=0))
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    x = torch.ones(5, 16)
    q, _, _ = attention.queries_keys_values(x, Segments.from_bounds(bounds(5)), None)
    assert relative_error(q.flatten(1), attention.query(x)) < FLOAT32


@pytest.mark.parametrize("conv_width", [0, 3])
def test_autocast_makes_what_enters_attention_short(conv_width):
    model = build(conv_width=conv_width)
    tokens, segments = proteins(30)[0], Segments.from_bounds(bounds(30))
    attention = model.layers[0].attention
    rotary = rotary_angles(segments.positions, attention.head_dim, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention.queries_keys_values(model.embedding(tokens), segments, rotary)
    assert {x.dtype for x in found} == {torch.bfloat16}


@pytest.mark.parametrize("logit", [-100.0, 100.0])
def test_a_temperature_at_the_end_of_its_range_has_gradients(logit):
    model = build()
    torch.nn.init.constant_(model.layers[0].attention.temperature_logit, logit)
    model(proteins(30)[0], bounds(30)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
