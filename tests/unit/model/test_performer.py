import math
from itertools import pairwise

import pytest
import torch

from protlm.config import ModelConfig
from protlm.model import attention as attention_module
from protlm.model.attention import SelfAttention
from protlm.model.convolution import SegmentConvolution
from protlm.model.performer import Performer
from protlm.model.positions import rotary_angles, rotate
from protlm.model.segments import Segments
from protlm.ops import reference
from protlm.vocabulary import CLS, EOS, FIRST_RESIDUE
from tests.conftest import TOLERANCE, relative_error

FLOAT32 = TOLERANCE[torch.float32]
KINDS = ("positive", "hyperbolic", "regularised", "oprf", "relu", "softmax")
# Three tokens are `<cls>`, one residue and `<eos>`.
SIZES = (3, 40, 3, 17, 90, 41, 3)


def build(seed=0, **options):
    """Returns a small model in evaluation mode whose weights are all away from what they start as."""
    sizes = {"num_layers": 2, "model_dim": 32, "num_heads": 2, "ffn_dim": 48, "num_features": 24}
    model = Performer(ModelConfig(**{**sizes, **options}))
    model.reset(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
            if parameter.dim() == 2 and parameter.shape[0] == model.config.conv_width:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def bounds(*sizes):
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)


def proteins(*sizes, seed=0):
    """Returns one tensor of tokens a protein, `<cls>` and `<eos>` included in its size."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for size in sizes:
        tokens = torch.randint(FIRST_RESIDUE, FIRST_RESIDUE + 20, (size,), generator=generator)
        tokens[0], tokens[-1] = CLS, EOS
        result.append(tokens)
    return result


@pytest.mark.parametrize("conv_width", [0, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_protein_has_the_same_logits_alone_and_in_any_row(kind, conv_width):
    model = build(attention=kind, conv_width=conv_width)
    members = proteins(*SIZES)
    packed = model(torch.cat(members), bounds(*SIZES)).split(SIZES)
    for tokens, found in zip(members, packed, strict=True):
        assert relative_error(found, model(tokens, bounds(len(tokens)))) < FLOAT32


@pytest.mark.parametrize("kind", KINDS)
def test_a_protein_sends_no_gradient_into_its_neighbours(kind):
    model = build(attention=kind)
    sizes = (4, 3, 30)
    captured = {}
    model.embedding.register_forward_hook(lambda module, inputs, output: captured.update(x=output))
    logits = model(torch.cat(proteins(*sizes)), bounds(*sizes))
    (gradient,) = torch.autograd.grad(logits[4:7].square().sum(), captured["x"])
    assert gradient[4:7].abs().sum(-1).all()
    assert not gradient[:4].any()
    assert not gradient[7:].any()


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
    found = model(reversed_tokens, bounds(20))[1:-1].flip(0)
    assert relative_error(found, model(tokens, bounds(20))[1:-1]) > 1e-3


@torch.no_grad()
def test_target_positions_choose_logits():
    model = build()
    tokens, chosen = torch.cat(proteins(5, 9)), torch.tensor([9, 2, 2])
    every = model(tokens, bounds(5, 9))
    assert every.shape == (14, 33)
    assert relative_error(model(tokens, bounds(5, 9), chosen), every[chosen]) < FLOAT32


def attended(model, tokens, cu_seqlens, monkeypatch, kind="favor_attention"):
    """Returns the q, k and v that the first layer's attention is given, and what it makes of them."""
    seen = []
    original = getattr(attention_module, kind)

    def spy(q, k, v, *arguments, **options):
        seen.append((q, k, v, original(q, k, v, *arguments, **options)))
        return seen[-1][-1]

    monkeypatch.setattr(attention_module, kind, spy)
    with torch.no_grad():
        model(tokens, cu_seqlens)
    return seen[0]


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
    model = Performer(ModelConfig(max_temperature=2.0))
    model.reset(0)
    for layer in model.layers:
        assert (2 * torch.sigmoid(layer.attention.temperature_logit) - 1.5).abs().max() < 1e-6


def test_the_temperature_is_learned():
    model = build()
    model(proteins(30)[0], bounds(30)).square().sum().backward()
    for layer in model.layers:
        assert layer.attention.temperature_logit.grad.abs().min() > 0


def test_without_qk_norm_q_keeps_its_norms(monkeypatch):
    model = build(qk_norm=False)
    q, _, _, _ = attended(model, proteins(30)[0], bounds(30), monkeypatch)
    norms = q.norm(dim=-1)
    assert norms.max() > 1.2 * norms.min()
    assert not any("temperature" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("sizes", [(30,), (3, 20, 7)])
def test_softmax_attention_equals_its_float64_twin(sizes, monkeypatch):
    model = build(attention="softmax")
    q, k, v, out = attended(model, torch.cat(proteins(*sizes)), bounds(*sizes), monkeypatch, "_exact_attention")
    assert relative_error(out, reference.softmax_attention(q, k, v, cu_seqlens=bounds(*sizes))) < FLOAT32


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "softmax"])
def test_favor_attention_is_given_the_saved_projection_of_its_head(kind, monkeypatch):
    model = build(attention=kind)
    q, k, v, out = attended(model, torch.cat(proteins(3, 25)), bounds(3, 25), monkeypatch)
    projection = model.state_dict()["layers.0.attention.projection"]
    expected = reference.favor_attention(q, k, v, projection, feature_map=kind, cu_seqlens=bounds(3, 25))
    assert relative_error(out, expected) < FLOAT32


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
    cosines, sines = rotary_angles(Segments.from_bounds(bounds(3, 0, 4)).positions, 8, torch.float32)
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


@pytest.mark.parametrize("width", [1, 3, 5])
def test_the_convolution_is_a_padded_depthwise_one_on_every_segment(width):
    convolution = SegmentConvolution(6, width).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        convolution.weight.copy_(torch.randn(width, 6, generator=generator))
    sizes = (3, 0, 1, 2, 9)
    x = torch.randn(15, 6, generator=generator, dtype=torch.float64)
    found = convolution([x], Segments.from_bounds(bounds(*sizes)))[0]
    kernel = convolution.weight.T.unsqueeze(1)
    for start, stop in pairwise(bounds(*sizes).tolist()):
        if stop > start:
            part = x[start:stop].T.unsqueeze(0)
            expected = torch.nn.functional.conv1d(part, kernel, padding=width // 2, groups=6)[0].T
            assert relative_error(found[start:stop], expected) < 1e-12


@torch.no_grad()
def test_the_convolution_starts_as_the_identity():
    with_conv, without = (Performer(ModelConfig(conv_width=width)) for width in (3, 0))
    for model in (with_conv, without):
        model.reset(0)
    tokens = torch.cat(proteins(3, 20))
    found, expected = (model.eval()(tokens, bounds(3, 20)) for model in (with_conv, without))
    assert relative_error(found, expected) < FLOAT32
    convolution = SegmentConvolution(4, 5)
    convolution.reset()
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(convolution([x], Segments.from_bounds(bounds(7)))[0], x)


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
    assert len(changed) == (0 if kind == "softmax" else 2)
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


def test_attention_copes_with_one_token_and_with_a_segment_of_length_zero():
    attention = SelfAttention(ModelConfig(num_heads=2, model_dim=16))
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    attention.redraw(torch.Generator().manual_seed(0))
    for sizes in ((1,), (0, 1), (2, 0, 3)):
        segments = Segments.from_bounds(bounds(*sizes))
        x = torch.ones(sum(sizes), 16)
        assert attention(x, segments, rotary_angles(segments.positions, 8, x.dtype)).isfinite().all()


def test_segments_know_positions_lengths_and_neighbours():
    segments = Segments.from_bounds(bounds(2, 0, 3))
    assert segments.cpu_bounds.tolist() == [0, 2, 2, 5]
    assert segments.longest == 3
    assert segments.positions.tolist() == [0, 1, 0, 1, 2]
    assert segments.lengths.tolist() == [2, 2, 3, 3, 3]
    assert segments.numbers.tolist() == [0, 0, 2, 2, 2]
    assert segments.lacks_neighbour(1).tolist() == [False, True, False, False, True]
    assert segments.lacks_neighbour(-2).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("conv_width", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_works_and_stays_near_float32(kind, conv_width):
    model = build(attention=kind, conv_width=conv_width)
    tokens = torch.cat(proteins(*SIZES))
    with torch.no_grad():
        expected = model(tokens, bounds(*SIZES))
        with torch.autocast("cpu", torch.bfloat16):
            found = model(tokens, bounds(*SIZES))
    assert relative_error(found.float(), expected) < 0.1


def test_a_protein_that_went_to_nan_spoils_no_other():
    convolution = SegmentConvolution(4, 3)
    torch.nn.init.ones_(convolution.weight)
    x = torch.ones(7, 4)
    x[:3] = torch.nan
    out = convolution([x], Segments.from_bounds(bounds(3, 4)))[0]
    assert out[:3].isnan().all()
    assert out[3:].isfinite().all()


def test_a_layer_that_is_not_there_is_a_value_error():
    model = build()
    for layer in (3, -1):
        with pytest.raises(ValueError, match="layers: expected numbers from 0 to 2"):
            model.hidden_states(proteins(3)[0], bounds(3), (layer,))
