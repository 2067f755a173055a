"""The laws of the model under every setting: proteins do not interact, everything learns, causal models look back."""

from itertools import product

import pytest
import torch

from protlm.config import ModelConfig
from protlm.model.performer import Performer
from protlm.vocabulary import FIRST_RESIDUE
from tests.conftest import TOLERANCE, relative_error
from tests.unit.model.small_models import KINDS, SIZES, bounds, build, proteins

FLOAT32 = TOLERANCE[torch.float32]
POSITIONS = ("rotary", "learned", "sinusoidal", "none")

SETTINGS = [
    *({"positions": positions} for positions in POSITIONS),
    {"layer_norm": "post"},
    {"ffn": "swiglu"},
    {"qk_norm": False},
    {"rescale_qk": True},
    {"attention": "relu", "projection": "none"},
    {"attention": "oprf", "projection": "simplex"},
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
    for tokens, actual in zip(members, packed, strict=True):
        assert relative_error(actual, model(tokens, bounds(len(tokens)))) < FLOAT32


@torch.no_grad()
def test_trig_attention_keeps_proteins_apart_too():
    # Its renormaliser is a sum of signed terms: rounding before it is amplified, more than for other maps.
    model = build(attention="trig", max_temperature=0.5, num_features=256)
    members = proteins(*SIZES)
    packed = model(torch.cat(members), bounds(*SIZES)).split(SIZES)
    for tokens, actual in zip(members, packed, strict=True):
        assert relative_error(actual, model(tokens, bounds(len(tokens)))) < 10 * FLOAT32


@pytest.mark.parametrize("options", [*SETTINGS, *({"attention": kind} for kind in KINDS)], ids=str)
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
        [("pre", "gelu"), ("post", "gelu"), ("pre", "swiglu")] * 36,
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
        actual = model(changed, bounds(*sizes))
        assert torch.equal(actual[:position], plain[:position])
        assert (actual[position] - plain[position]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", [*KINDS, "trig"])
def test_no_gradient_of_a_causal_model_flows_to_later_tokens(kind):
    model = build(causal=True, attention=kind)
    captured = {}
    model.embedding.register_forward_hook(lambda module, inputs, output: captured.update(x=output))
    logits = model(proteins(30)[0], bounds(30))
    (gradient,) = torch.autograd.grad(logits[11].square().sum(), captured["x"])
    assert gradient[:12].abs().sum(-1).all()
    assert not gradient[12:].any()
