"""A small ESM-2 with random weights as transformers and fair-esm store it, written without either."""

import argparse
import json

import torch
from safetensors.torch import load_file, save_file

DIM, FFN = 16, 24
CONFIG = {
    "model_type": "esm", "num_hidden_layers": 2, "hidden_size": DIM, "num_attention_heads": 2, "intermediate_size": FFN,
    "vocab_size": 33, "layer_norm_eps": 1e-5, "position_embedding_type": "rotary", "token_dropout": True,
    "max_position_embeddings": 102, "pad_token_id": 1, "hidden_act": "gelu",
}  # fmt: skip


def esm_tensors(seed=0):
    """Returns the tensors of a small ESM-2 under the names of transformers."""
    shapes = {
        "esm.embeddings.word_embeddings.weight": (33, DIM), "lm_head.bias": (33,), "lm_head.dense.weight": (DIM, DIM),
        "lm_head.dense.bias": (DIM,), "esm.contact_head.regression.weight": (1, 4),
        "esm.contact_head.regression.bias": (1,), "esm.embeddings.position_embeddings.weight": (102, DIM),
    }  # fmt: skip
    for norm in ("lm_head.layer_norm", "esm.encoder.emb_layer_norm_after"):
        shapes |= {f"{norm}.weight": (DIM,), f"{norm}.bias": (DIM,)}
    for layer in ("esm.encoder.layer.0", "esm.encoder.layer.1"):
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{layer}.{name}.weight": (DIM, DIM), f"{layer}.{name}.bias": (DIM,)}
        shapes |= {f"{layer}.intermediate.dense.weight": (FFN, DIM), f"{layer}.intermediate.dense.bias": (FFN,)}
        shapes |= {f"{layer}.output.dense.weight": (DIM, FFN), f"{layer}.output.dense.bias": (DIM,)}
        for norm in ("attention.LayerNorm", "LayerNorm"):
            shapes |= {f"{layer}.{norm}.weight": (DIM,), f"{layer}.{norm}.bias": (DIM,)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {"esm.embeddings.position_ids": torch.arange(102)[None]}


_FAIRSEQ_NAMES = {
    "esm.encoder.layer.": "layers.", "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj", "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj", "attention.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1", "output.dense": "fc2", "LayerNorm": "final_layer_norm",
    "esm.embeddings.word_embeddings": "embed_tokens", "esm.encoder.": "",
}  # fmt: skip


def write_fairseq_checkpoint(path):
    """Writes the model as fair-esm stores it."""
    tensors = {}
    for name, tensor in esm_tensors().items():
        for theirs, ours in _FAIRSEQ_NAMES.items():
            name = name.replace(theirs, ours)
        if not name.startswith("esm."):
            tensors[name] = tensor
    arguments = argparse.Namespace(
        encoder_layers=2, encoder_embed_dim=DIM, encoder_attention_heads=2, token_dropout=True
    )
    torch.save({"cfg": {"model": arguments}, "model": tensors}, path)


def write_checkpoint(folder):
    """Writes the model into a new folder, and returns the folder."""
    folder.mkdir()
    save_file(esm_tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def change(folder, **tensors):
    """Replaces tensors of the checkpoint, given with `__` for dots; None removes one."""
    content = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        content.pop(key, None)
        if tensor is not None:
            content[key] = tensor
    save_file(content, folder / "model.safetensors")
