"""The model as a whole: what a logit depends on, positions, norms, hidden states, redraws and checkpointing."""

import pytest
import torch
import torch.nn.functional as F

from protlm.config import ModelConfig
from protlm.model.performer import EncoderLayer, Performer
from protlm.model.positions import rotary_angles
from protlm.vocabulary import FIRST_RESIDUE
from tests.conftest import TOLERANCE, relative_error
from tests.unit.model.small_models import EXACT, KINDS, SIZES, bounds, build, proteins, segments_of

FLOAT32 = TOLERANCE[torch.float32]


@pytest.mark.parametrize("conv_width", [0, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_protein_has_the_same_logits_alone_and_in_any_row(kind, conv_width):
    model = build(attention=kind, conv_width=conv_width)
    members = proteins(*SIZES)
    packed = model(torch.cat(members), bounds(*SIZES)).split(SIZES)
    for tokens, actual in zip(members, packed, strict=True):
        assert relative_error(actual, model(tokens, bounds(len(tokens)))) < FLOAT32


@torch.no_grad()
def test_every_residue_changes_every_logit_of_its_protein():
    model = build(conv_width=0)
    tokens = proteins(20)[0]
    plain = model(tokens, bounds(20))
    for position in (1, 18):
        changed = tokens.clone()
        changed[position] = FIRST_RESIDUE + (tokens[position] - FIRST_RESIDUE + 1) % 20
        assert (model(changed, bounds(20)) - plain).abs().amax(-1).gt(1e-6).all()


@torch.no_grad()
def test_the_order_of_residues_matters():
    model = build(conv_width=0)
    tokens = proteins(20)[0]
    reversed_tokens = torch.cat((tokens[:1], tokens[1:-1].flip(0), tokens[-1:]))
    actual = model(reversed_tokens, bounds(20))[1:-1].flip(0)
    assert relative_error(actual, model(tokens, bounds(20))[1:-1]) > 1e-3


@torch.no_grad()
def test_target_positions_choose_logits():
    model = build()
    tokens, chosen = torch.cat(proteins(5, 9)), torch.tensor([9, 2, 2])
    every = model(tokens, bounds(5, 9))
    assert every.shape == (14, 33)
    assert relative_error(model(tokens, bounds(5, 9), chosen), every[chosen]) < FLOAT32


def test_projections_are_saved_float32_and_differ_between_layers_and_heads():
    state = build().state_dict()
    first, second = (state[f"layers.{layer}.attention.projection"] for layer in (0, 1))
    assert first.dtype == torch.float32
    assert first.shape == (2, 24, 16)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert not any("projection" in name for name, _ in build().named_parameters())
    assert not any("projection" in name for name in build(attention="softmax").state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_redraw_changes_the_projections_and_nothing_else(kind):
    model = build(attention=kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.redraw(torch.Generator().manual_seed(5))
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if name.endswith("projection")}
    assert len(changed) == (0 if kind in EXACT else 2)
    model.redraw(torch.Generator().manual_seed(5))
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_hidden_states_are_numbered_from_the_embedding_to_after_the_final_norm():
    model = build(num_layers=3)
    tokens, cu_seqlens = torch.cat(proteins(5, 12)), bounds(5, 12)
    captured = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, output: captured.append(output))
    states = model.hidden_states(tokens, cu_seqlens, (3, 0, 2))
    assert set(states) == {0, 2, 3}
    assert torch.equal(states[0], model.embedding.weight[tokens])
    assert torch.equal(states[2], captured[1])
    assert torch.equal(states[3], model.final_norm(captured[2]))
    logits = model.head(states[3], model.embedding.weight)
    assert torch.equal(model(tokens, cu_seqlens), logits)


def test_a_layer_that_is_not_there_is_a_value_error():
    model = build()
    for layer in (3, -1):
        with pytest.raises(ValueError, match="layers: expected numbers from 0 to 2"):
            model.hidden_states(proteins(3)[0], bounds(3), (layer,))


@torch.no_grad()
def test_a_state_dict_in_another_model_gives_equal_logits():
    model, other = build(seed=0), build(seed=5)
    tokens, cu_seqlens = proteins(20)[0], bounds(20)
    assert not torch.equal(model(tokens, cu_seqlens), other(tokens, cu_seqlens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens, cu_seqlens), other(tokens, cu_seqlens))


def test_the_residual_stream_does_not_grow_with_depth_at_the_start():
    scales = []
    for num_layers in (2, 12):
        model = Performer(ModelConfig(num_layers=num_layers)).eval()
        model.reset(0)
        last = []
        model.layers[-1].register_forward_hook(lambda module, inputs, output, last=last: last.append(output))
        with torch.no_grad():
            model(proteins(60)[0], bounds(60))
        scales.append(last[0].std().item())
    assert scales[1] < 1.5 * scales[0]


def test_dropout_acts_in_training_only():
    model = build(dropout=0.5)
    tokens, cu_seqlens = proteins(20)[0], bounds(20)
    assert torch.equal(model(tokens, cu_seqlens), model(tokens, cu_seqlens))
    model.train()
    assert not torch.equal(model(tokens, cu_seqlens), model(tokens, cu_seqlens))


@pytest.mark.parametrize("conv_width", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind, conv_width):
    model = build(attention=kind, conv_width=conv_width)
    model(torch.cat(proteins(3, 30)), bounds(3, 30)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("conv_width", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_works_and_stays_near_float32(kind, conv_width):
    model = build(attention=kind, conv_width=conv_width)
    tokens = torch.cat(proteins(*SIZES))
    with torch.no_grad():
        expected = model(tokens, bounds(*SIZES))
        with torch.autocast("cpu", torch.bfloat16):
            actual = model(tokens, bounds(*SIZES))
    assert relative_error(actual.float(), expected) < 0.1


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
    segments = segments_of(12)
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
    for actual, expected in zip(gradients(model, True), gradients(model, False), strict=True):
        assert torch.equal(actual, expected)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_logits_at_targets_are_those_of_the_whole_row(kind, norm):
    """Without gradients the last layer computes its feed-forward part at the targets only."""
    model = build(attention=kind, layer_norm=norm)
    tokens, cu_seqlens = torch.cat(proteins(30, 3, 17)), bounds(30, 3, 17)
    targets = torch.tensor([4, 49, 31, 4, 0])
    with torch.no_grad():
        expected = model(tokens, cu_seqlens)[targets]
        assert relative_error(model(tokens, cu_seqlens, targets), expected) < 1e-6
        assert model(tokens, cu_seqlens, targets[:0]).shape == (0, expected.shape[1])
    torch.testing.assert_close(model(tokens, cu_seqlens, targets).detach(), expected, atol=1e-5, rtol=1e-5)
