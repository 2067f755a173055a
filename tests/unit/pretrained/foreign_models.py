"""Models of transformers with random weights, saved as it saves them, and what it computes with them."""

import json
import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", reason="the source of the models is not installed")

PROTBERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO")
SAPIENS = ("<s>", "<pad>", "</s>", "<unk>", *"ACDEFGHIKLMNPQRSTVWY", "<mask>")
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160}
ESM = {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1, "layer_norm_eps": 1e-5, "max_position_embeddings": 200}
ESM2 = {**ESM, "position_embedding_type": "rotary", "token_dropout": True}
ESM1B = {**ESM, "position_embedding_type": "absolute", "token_dropout": True, "emb_layer_norm_before": True}
ESM1V = {**ESM1B, "emb_layer_norm_before": False}

FAMILIES = {
    "esm2": ("Esm", {**SIZES, **ESM2}),
    "esm2-wide": ("Esm", {**ESM2, **SIZES, "hidden_size": 320, "num_attention_heads": 20, "num_hidden_layers": 6}),
    "esm2-deep": ("Esm", {**SIZES, **ESM2, "num_hidden_layers": 30}),
    "esm1b": ("Esm", {**SIZES, **ESM1B}),
    "esm1v": ("Esm", {**SIZES, **ESM1V}),
    "esmc": ("Esmc", {**SIZES, "vocab_size": 64, "intermediate_size": 128}),
    "bert": ("Bert", {**SIZES, "vocab_size": 30, "max_position_embeddings": 200}),
    "roberta": (
        "Roberta",
        {**SIZES, "vocab_size": 25, "max_position_embeddings": 202, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
}
VOCABULARIES = {"bert": PROTBERT, "roberta": SAPIENS}


def randomise(model, seed=0):
    """Gives every weight, norms and biases too, a value that has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                is_embedding = "embed" in name and "dense" not in name
                parameter.copy_(0.6 * noise if is_embedding else 1.5 * parameter.shape[-1] ** -0.5 * noise)
            elif "orm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)


def build(family, **changes):
    """Returns a model of transformers in evaluation mode with random weights."""
    name, values = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**values, **changes}, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForMaskedLM")(config).eval()
    randomise(model)
    return model


def save(model, folder, family="esm2", **options):
    """Writes a model and its vocabulary as a directory of transformers."""
    model.save_pretrained(folder, **options)
    if family in VOCABULARIES:
        (folder / "vocab.txt").write_text("\n".join(VOCABULARIES[family]))
    return folder


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@torch.no_grad()
def outputs(model, members):
    """Returns the hidden states of every layer and the logits of each token, from a batch with padding."""
    width = max(map(len, members))
    tokens = torch.full((len(members), width), model.config.pad_token_id)
    mask = torch.zeros_like(tokens)
    for number, member in enumerate(members):
        tokens[number, : len(member)], mask[number, : len(member)] = member, 1
    result = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    return [state[mask.bool()] for state in result.hidden_states], result.logits[mask.bool()]
