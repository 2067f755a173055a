"""AMPLIFY as its authors store it."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.model.positions import standard_frequencies
from protlm.pretrained.families.name_map import MOST_LAYERS, WIDEST, Mapped, NameMap, SourceConfig, parse, settings
from protlm.pretrained.families.tokenizers import read_tokens


class AmplifyConfig(SourceConfig):
    """The config.json of an AMPLIFY model."""

    num_hidden_layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)]
    hidden_size: Annotated[int, Field(gt=0, le=WIDEST)]
    num_attention_heads: Annotated[int, Field(gt=0, le=WIDEST)]
    vocab_size: Annotated[int, Field(gt=0)]
    norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    max_length: Annotated[int, Field(gt=2, le=1 << 20)] = 2048
    rms_norm: Literal[True] = True
    hidden_act: Literal["SwiGLU", "swiglu"] = "SwiGLU"
    layer_norm_after_embedding: Literal[False] = False
    layer_norm_before_last_layer: Literal[True] = True
    ffn_bias: Literal[False] = False
    att_bias: Literal[False] = False


def map_amplify(content: dict[str, Any], names: NameMap, folder: Path) -> Mapped:
    """Maps all tensors of an AMPLIFY model, and returns its settings; raises ModelError as `map_esm` does."""
    where = str(folder / "config.json")
    source = parse(AmplifyConfig, content, where)
    head_dim = source.hidden_size // source.num_attention_heads

    def in_halves(weight: Tensor) -> Tensor:
        """Returns the rows of W_q or W_k so that the rotated pairs are (i, i + d/2) in place of (2i, 2i + 1)."""
        pairs = torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])
        heads = torch.arange(source.num_attention_heads).unsqueeze(1) * head_dim
        return weight[(heads + pairs).flatten()]

    names.put("embedding.weight", "encoder.weight")
    names.put("rotary_frequencies", by=lambda: standard_frequencies(head_dim))
    ffn_dim = names.shape("transformer_encoder.0.ffn.w12.weight")[0] // 2
    for number in range(source.num_hidden_layers):
        theirs, ours = f"transformer_encoder.{number}", f"layers.{number}"
        names.linear(f"{ours}.attention.query", f"{theirs}.q", by=in_halves)
        names.linear(f"{ours}.attention.key", f"{theirs}.k", by=in_halves)
        names.linear(f"{ours}.attention.value", f"{theirs}.v")
        names.linear(f"{ours}.attention.output", f"{theirs}.wo")
        names.split((f"{ours}.ffn_gate.weight", f"{ours}.ffn_in.weight"), f"{theirs}.ffn.w12.weight")
        names.zeros(f"{ours}.ffn_gate.bias", ffn_dim)
        names.zeros(f"{ours}.ffn_in.bias", ffn_dim)
        names.linear(f"{ours}.ffn_out", f"{theirs}.ffn.w3")
        names.put(f"{ours}.attention_norm.weight", f"{theirs}.attention_norm.weight")
        names.put(f"{ours}.ffn_norm.weight", f"{theirs}.ffn_norm.weight")
    names.put("final_norm.weight", "layer_norm_2.weight")
    names.put("head.decoder", "decoder.weight")
    names.put("head.bias", "decoder.bias")
    names.drop(r"freqs_cis")
    config = settings(
        where, num_layers=source.num_hidden_layers, model_dim=source.hidden_size, num_heads=source.num_attention_heads,
        ffn_dim=ffn_dim, ffn="swiglu", layer_norm="pre", norm="rms", norm_eps=source.norm_eps, positions="rotary",
        stored_frequencies=True, head="linear", tied_head=False, vocabulary=read_tokens(folder, source.vocab_size),
    )  # fmt: skip
    return Mapped(config=config, trained_residues=source.max_length - SPECIAL_TOKENS_PER_SEGMENT)
