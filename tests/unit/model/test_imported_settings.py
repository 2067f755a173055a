"""The settings of models that were trained elsewhere, each against its formula."""

import pytest
import torch
import torch.nn.functional as F

from protlm.config import ModelConfig
from protlm.model.performer import Performer
from protlm.model.positions import rotary_frequencies
from protlm.vocabulary import MASK
from tests.conftest import TOLERANCE, relative_error
from tests.unit.model.small_models import bounds, build, proteins

FLOAT32 = TOLERANCE[torch.float32]
TOKENS = ("<pad>", "<mask>", "<cls>", "<eos>", "<unk>", *"YWVTSRQPNMLKIHGFEDCA", "|")
EVERYTHING = {
    "attention": "softmax", "qk_norm": False, "conv_width": 0, "norm": "rms", "norm_eps": 1e-3, "embedding_norm": True,
    "qk_layer_norm": True, "token_dropout": True, "stored_frequencies": True, "tied_head": False, "vocabulary": TOKENS,
}  # fmt: skip


def masked(*sizes):
    members = proteins(*sizes)
    for number, tokens in enumerate(members):
        tokens[1 : 1 + number] = MASK
    return members


@pytest.mark.parametrize("head", ["dense", "linear"])
@torch.no_grad()
def test_a_protein_has_the_same_logits_alone_and_in_any_row(head):
    sizes = (5, 40, 9, 70)
    model, members = build(**EVERYTHING, head=head), masked(*sizes)
    packed = model(torch.cat(members), bounds(*sizes)).split(sizes)
    assert packed[0].shape == (5, len(TOKENS))
    for tokens, actual in zip(members, packed, strict=True):
        assert relative_error(actual, model(tokens, bounds(len(tokens)))) < FLOAT32


def test_every_weight_is_set_by_the_seed_and_gets_a_gradient():
    model = Performer(ModelConfig(num_layers=1, model_dim=16, num_heads=2, ffn_dim=8, **EVERYTHING))
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)
    model.reset(3)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert torch.equal(model.rotary_frequencies, rotary_frequencies(8))
    model(torch.cat(masked(6, 7)), bounds(6, 7)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_token_dropout_zeroes_masks_and_scales_by_the_share_of_each_protein():
    model = build(token_dropout=True, positions="none", conv_width=0)
    members = masked(8, 8, 10)
    state = model.hidden_states(torch.cat(members), bounds(8, 8, 10), (0,))[0]
    expected = []
    for number, tokens in enumerate(members):
        x = model.embedding(tokens) * (tokens != MASK).unsqueeze(1)
        expected.append(x * 0.88 / (1 - number / len(tokens)))
    assert relative_error(state, torch.cat(expected)) < FLOAT32


@torch.no_grad()
def test_the_embedding_norm_comes_after_the_positions():
    model = build(embedding_norm=True, positions="learned", max_positions=10, norm_eps=0.5)
    (tokens,) = proteins(10)
    x = model.embedding(tokens) + model.position_embedding.weight
    norm = model.embedding_norm
    expected = F.layer_norm(x, (32,), norm.weight, norm.bias, 0.5)
    assert relative_error(model.hidden_states(tokens, bounds(10), (0,))[0], expected) < FLOAT32


@torch.no_grad()
def test_stored_frequencies_are_used_and_saved():
    model, plain = (build(stored_frequencies=stored) for stored in (True, False))
    assert set(model.state_dict()) - set(plain.state_dict()) == {"rotary_frequencies"}
    (tokens,) = proteins(30)
    assert torch.equal(model(tokens, bounds(30)), plain(tokens, bounds(30)))
    model.rotary_frequencies.mul_(0.9)
    assert relative_error(model(tokens, bounds(30)), plain(tokens, bounds(30))) > 1e-3


@torch.no_grad()
def test_q_and_k_are_normalised_over_all_heads_before_they_are_rotated():
    model = build(qk_norm=False, qk_layer_norm=True, norm_eps=0.3, positions="none", conv_width=0)
    attention = model.layers[0].attention
    x = torch.randn(7, 32)
    q, k, v = attention._projected(x)
    assert relative_error(q, F.layer_norm(attention.query(x), (32,), attention.query_norm.weight, None, 0.3)) < FLOAT32
    assert relative_error(k, F.layer_norm(attention.key(x), (32,), attention.key_norm.weight, None, 0.3)) < FLOAT32
    assert torch.equal(v, attention.value(x))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@torch.no_grad()
def test_every_norm_has_the_eps_and_kind_of_the_settings(norm):
    model = build(norm=norm, norm_eps=0.25, embedding_norm=True, qk_norm=False, qk_layer_norm=True)
    kinds = torch.nn.LayerNorm | torch.nn.RMSNorm
    norms = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    assert len(norms) == 2 * 4 + 3
    assert {module.eps for module in norms.values()} == {0.25}
    wanted = torch.nn.RMSNorm if norm == "rms" else torch.nn.LayerNorm
    of_stream = [
        name for name in norms if name.endswith(("attention_norm", "ffn_norm", "final_norm", "embedding_norm"))
    ]
    assert len(of_stream) == 6
    assert all(isinstance(norms[name], wanted) for name in of_stream)


@torch.no_grad()
def test_an_untied_head_has_a_matrix_of_its_own():
    model = build(tied_head=False, head="linear")
    (tokens,) = proteins(9)
    x = model.hidden_states(tokens, bounds(9), (2,))[2]
    assert relative_error(model(tokens, bounds(9)), x @ model.head.decoder.T + model.head.bias) < FLOAT32


@torch.no_grad()
def test_tokens_are_translated_at_the_entrance_and_logits_at_the_exit():
    model = build(vocabulary=TOKENS)
    (tokens,) = proteins(12)
    tokens[3] = 24
    own = model.token_table.own(tokens)
    assert [TOKENS[number] for number in own[[0, 3, 11]].tolist()] == ["<cls>", "<unk>", "<eos>"]
    assert torch.equal(model.hidden_states(tokens, bounds(12), (0,))[0], model.embedding(own))
    logits = model(tokens, bounds(12))
    columns = model.token_table.columns(logits)
    assert columns.shape == (12, 33)
    assert torch.equal(columns[:, 4], logits[:, TOKENS.index("L")])
    assert columns[:, 24].eq(-torch.inf).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qk_layer_norm": True}, "qk_layer_norm: expected false"),
        ({"stored_frequencies": True, "positions": "none"}, "stored_frequencies: expected false"),
        ({"vocabulary": ("A",)}, "vocabulary: expected a token <cls>"),
        ({"vocabulary": tuple(f"t{i}" for i in range(5000))}, "vocabulary: expected at most 4,096 tokens"),
        ({"residues_as_x": "!"}, "vocabulary: expected residue letters"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)
