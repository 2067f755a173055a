"""AMPLIFY, whose code is in no package: against its formulas, written out here in float64."""

import json

import pytest
import torch
from safetensors.torch import save_file

from protlm.errors import ModelError
from protlm.pretrained.foreign import read_folder
from tests.conftest import TOLERANCE, relative_error
from tests.unit.model.small_models import bounds, proteins

VOCABULARY = ("<pad>", "<unk>", "<mask>", "<bos>", "<eos>", "|", *"LAGVSERTIDPKQNFYMHWCB")
DIM, HEADS, LAYERS, FFN = 24, 3, 2, 40
CONFIG = {
    "model_type": "AMPLIFY", "num_hidden_layers": LAYERS, "hidden_size": DIM, "num_attention_heads": HEADS,
    "vocab_size": len(VOCABULARY), "norm_eps": 1e-5, "max_length": 2048, "rms_norm": True, "hidden_act": "SwiGLU",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (27, DIM), "decoder.weight": (27, DIM), "decoder.bias": (27,)}
    for number in range(LAYERS):
        layer = f"transformer_encoder.{number}"
        shapes |= {f"{layer}.{name}.weight": (DIM, DIM) for name in ("q", "k", "v", "wo")}
        shapes |= {f"{layer}.ffn.w12.weight": (2 * FFN, DIM), f"{layer}.ffn.w3.weight": (DIM, FFN)}
        shapes |= {f"{layer}.attention_norm.weight": (DIM,), f"{layer}.ffn_norm.weight": (DIM,)}
    shapes["layer_norm_2.weight"] = (DIM,)
    tensors = {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    vocab = {token: number for number, token in enumerate(VOCABULARY)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
    return tmp_path, tensors


def rms(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def rotated(x):
    """Rotates neighbouring pairs, as complex numbers."""
    length, _, dim = x.shape
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    turned = (
        torch.view_as_complex(x.reshape(length, HEADS, -1, 2)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.view_as_real(turned).flatten(2)


def logits_of(tensors, tokens):
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    x = tensors["encoder.weight"][tokens]
    for number in range(LAYERS):
        weights = {
            name.removeprefix(f"transformer_encoder.{number}.").removesuffix(".weight"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"transformer_encoder.{number}.")
        }
        y = rms(x, weights["attention_norm"])
        q, k, v = ((y @ weights[name].T).view(-1, HEADS, DIM // HEADS) for name in ("q", "k", "v"))
        scores = torch.einsum("qhd,khd->hqk", rotated(q), rotated(k)) / (DIM // HEADS) ** 0.5
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ weights["wo"].T
        gate, value = (rms(x, weights["ffn_norm"]) @ weights["ffn.w12"].T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * value) @ weights["ffn.w3"].T
    return rms(x, tensors["layer_norm_2.weight"]) @ tensors["decoder.weight"].T + tensors["decoder.bias"]


@torch.no_grad()
def test_the_logits_are_those_of_its_formulas(folder):
    path, tensors = folder
    model, description = read_folder(path, "amplify")
    members = proteins(30, 17)
    members[0][7] = 32
    actual = model(torch.cat(members), bounds(30, 17)).split((30, 17))
    for member, logits in zip(members, actual, strict=True):
        expected = logits_of(tensors, model.token_table.own(member))
        assert relative_error(logits, expected) < TOLERANCE[torch.float32]
    assert (description.trained_residues, description.max_residues) == (2046, None)
    assert (model.token_table.vocabulary.lacked, model.token_table.vocabulary.stand_in) == ("XUZO", "<unk>")


@pytest.mark.parametrize("key", ["rms_norm", "layer_norm_before_last_layer"])
def test_a_variant_without_a_norm_of_the_published_models_is_refused(folder, key):
    path, _ = folder
    (path / "config.json").write_text(json.dumps({**CONFIG, key: False}))
    with pytest.raises(ModelError, match=key):
        read_folder(path, "amplify")
