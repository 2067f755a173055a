"""Half-precision weights: what is short and what is not, and that the results stay near those of float32."""

import pytest
import torch
from torch import nn

from protlm.inference.attention_swap import exact_twin
from protlm.model import attention
from protlm.model.half_precision import HalfLinear, halve
from protlm.model.performer import EncoderLayer
from protlm.model.qk_norm import normalise, prepare
from tests.unit.model.small_models import KINDS, bounds, build, proteins

SIZES = (3, 40, 17, 90)
DTYPES = {torch.bfloat16: 8e-2, torch.float16: 1e-2}
"""The number types, and how far results may be from those of float32, relative to their largest."""
SETTINGS = {
    **{kind: {"attention": kind} for kind in KINDS},
    "trig": {"attention": "trig"},
    "convolution": {"conv_width": 3},
    "free q and k": {"qk_norm": False, "attention": "softmax"},
    "post-LN": {"layer_norm": "post", "positions": "learned", "embedding_norm": True, "attention": "softmax"},
    "SwiGLU, RMS": {"ffn": "swiglu", "norm": "rms", "attention": "softmax"},
    "norms of q and k": {"qk_norm": False, "qk_layer_norm": True, "attention": "softmax"},
    "another head": {"head": "linear", "tied_head": False},
    "causal": {"causal": True},
    "balanced": {"attention": "near-far", "estimator": True, "qk_balance": True},
}  # fmt: skip


def halved(dtype, **settings):
    model = build(**settings)
    halve(model, dtype)
    return model


def row(*sizes):
    return torch.cat(proteins(*sizes)), bounds(*sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_results_are_float32_and_near_those_of_float32(name, dtype):
    tokens, cu_seqlens = row(*SIZES)
    model, half = build(**SETTINGS[name]), halved(dtype, **SETTINGS[name])
    pairs = [(model(tokens, cu_seqlens), half(tokens, cu_seqlens))]
    for layer in range(3):
        pairs.append(tuple(each.hidden_states(tokens, cu_seqlens, [layer])[layer] for each in (model, half)))
    for wanted, got in pairs:
        assert got.dtype == torch.float32
        error = (got - wanted).abs().max() / wanted.abs().max()
        assert error < DTYPES[dtype]
    # Rounded, and not computed in float32 after all.
    assert not torch.equal(model(tokens, cu_seqlens), half(tokens, cu_seqlens))


def test_only_linear_layers_are_short():
    model = halved(torch.bfloat16, conv_width=3, positions="learned", attention="positive")
    short = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.bfloat16}
    linear = {f"{name}.{part}" for name, module in model.named_modules() if isinstance(module, nn.Linear)
              for part in ("weight", "bias")}  # fmt: skip
    assert short == linear
    assert len(linear) == 2 * (2 * 6 + 1)
    assert all(type(module) is HalfLinear for module in model.modules() if isinstance(module, nn.Linear))


def test_the_names_of_the_weights_stay():
    assert set(halved(torch.float16).state_dict()) == set(build().state_dict())


@pytest.mark.parametrize("kind", ["positive", "softmax", "local"])
@torch.no_grad()
def test_a_protein_does_not_depend_on_the_others(kind):
    model = halved(torch.bfloat16, attention=kind)
    alone, other = proteins(40, 90)
    logits = model(torch.cat([other, alone]), bounds(90, 40))[90:]
    expected = model(alone, bounds(40))
    assert (logits - expected).abs().max() < 2e-2 * expected.abs().max()


@torch.no_grad()
def test_attention_is_given_half_precision(monkeypatch):
    model = halved(torch.bfloat16, attention="softmax")
    seen = []
    real = attention.softmax_attention
    monkeypatch.setattr(
        attention,
        "softmax_attention",
        lambda *arguments: seen.extend(tensor.dtype for tensor in arguments[:3]) or real(*arguments),
    )
    model(*row(20))
    assert set(seen) == {torch.bfloat16}


@torch.no_grad()
def test_positions_that_are_wanted_alone_are_those_of_the_whole_row():
    tokens, cu_seqlens = row(*SIZES)
    wanted = torch.tensor([5, 50, 61])
    for kind in ("softmax", "positive"):
        model = halved(torch.bfloat16, attention=kind)
        expected = model(tokens, cu_seqlens)[wanted]
        assert (model(tokens, cu_seqlens, wanted) - expected).abs().max() < 3e-2 * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["positive", "softmax", "post-LN", "norms of q and k"])
@torch.no_grad()
def test_norms_residual_sums_and_logits_are_float32(name, dtype):
    model = halved(dtype, **SETTINGS[name])
    seen: dict[str, set[torch.dtype]] = {"norm": set(), "layer": set()}

    def note(kind):
        return lambda _module, given, got: seen[kind].update((given[0].dtype, got.dtype))

    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.register_forward_hook(note("norm"))
        elif isinstance(module, EncoderLayer):
            module.register_forward_hook(note("layer"))
    tokens, cu_seqlens = row(*SIZES)
    logits = model(tokens, cu_seqlens)
    assert seen == {"norm": {torch.float32}, "layer": {torch.float32}}
    # Not rounded on the way either.
    for result in (logits, *model.hidden_states(tokens, cu_seqlens, [0, 1, 2]).values()):
        assert (result != result.to(dtype).float()).float().mean() > 0.5


@torch.no_grad()
def test_results_are_those_of_rounding_at_linear_layers_alone():
    """A twin in float64 whose linear layers round their weights, what they are given and what they return."""
    tokens, cu_seqlens = row(*SIZES)
    # Exact attention would also be computed in half precision.
    half, twin = halved(torch.bfloat16, attention="positive"), build(attention="positive")

    def rounded(x):
        return x.to(torch.bfloat16).to(x.dtype)

    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(rounded(module.weight))
            module.bias.copy_(rounded(module.bias))
            module.register_forward_pre_hook(lambda _, given: (rounded(given[0]),))
            module.register_forward_hook(lambda _module, _given, got: rounded(got))
    wanted, got = twin(tokens, cu_seqlens), half(tokens, cu_seqlens)
    # Rarely a number lies so close to the middle of two that both round it differently.
    assert (wanted - got).abs().median() < 5e-3 * wanted.abs().max()
    assert (wanted - build(attention="positive")(tokens, cu_seqlens)).abs().median() > 0


@torch.no_grad()
def test_long_and_empty_vectors_keep_their_length_in_float16():
    lengths = torch.tensor([2.0])
    x = torch.stack([torch.full((1, 64), 9000.0), torch.zeros(1, 64), torch.full((1, 64), 1e-7)]).half()
    rotary = torch.ones(3, 64), torch.zeros(3, 64)
    for result in (normalise(x, lengths), prepare(x, lengths, rotary)):
        norms = torch.linalg.vector_norm(result, dim=-1).ravel()
        assert result.dtype == torch.float32
        assert torch.allclose(norms, torch.tensor([2.0, 0.0, 2.0]), atol=1e-3)


@torch.no_grad()
def test_the_exact_twin_of_a_half_precision_estimator_computes_in_it():
    settings = {"attention": "near-far", "estimator": True, "qk_balance": True}
    tokens, cu_seqlens = row(*SIZES)
    half, full = (exact_twin(model)(tokens, cu_seqlens) for model in
                  (halved(torch.bfloat16, **settings), build(**settings)))  # fmt: skip
    assert 0 < (half - full).abs().max() < 8e-2 * full.abs().max()
