"""ESM C as transformers stores it (`EsmcForMaskedLM`)."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.model.positions import standard_frequencies
from protlm.pretrained.families.esm import HEAD_NAMES
from protlm.pretrained.families.name_map import MOST_LAYERS, WIDEST, Mapped, NameMap, SourceConfig, parse, settings
from protlm.vocabulary import TOKENS

_SCALED_LAYERS = 36
"""Each residual branch is divided by √(layers / 36)."""


class EsmcConfig(SourceConfig):
    """The config.json of an ESM C model."""

    num_hidden_layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)]
    hidden_size: Annotated[int, Field(gt=0, le=WIDEST)]
    num_attention_heads: Annotated[int, Field(gt=0, le=WIDEST)]
    intermediate_size: Annotated[int, Field(gt=0, le=WIDEST)]
    vocab_size: Annotated[int, Field(ge=len(TOKENS), le=4096)] = 64
    max_position_embeddings: Annotated[int, Field(gt=2, le=1 << 20)] = 2048
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    tie_word_embeddings: Literal[False] = False


def map_esmc(content: dict[str, Any], names: NameMap, folder: Path) -> Mapped:
    """Maps all tensors of an ESM C model, and returns its settings; raises ModelError as `map_esm` does."""
    where = str(folder / "config.json")
    source = parse(EsmcConfig, content, where)
    scale = (source.num_hidden_layers / _SCALED_LAYERS) ** -0.5
    names.put("embedding.weight", "esmc.embed_tokens.weight")
    names.put("rotary_frequencies", by=lambda: standard_frequencies(source.hidden_size // source.num_attention_heads))
    for number in range(source.num_hidden_layers):
        theirs, ours = f"esmc.layers.{number}", f"layers.{number}"
        for target, name in (
            ("attention.query", "self_attn.q_proj"), ("attention.key", "self_attn.k_proj"),
            ("attention.value", "self_attn.v_proj"), ("ffn_gate", "mlp.gate_proj"), ("ffn_in", "mlp.up_proj"),
        ):  # fmt: skip
            names.linear(f"{ours}.{target}", f"{theirs}.{name}")
        for target, name in (("attention.output", "self_attn.o_proj"), ("ffn_out", "mlp.down_proj")):
            names.linear(f"{ours}.{target}", f"{theirs}.{name}", by=lambda weight: weight * scale)
        names.norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        names.norm(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm")
        names.put(f"{ours}.attention.query_norm.weight", f"{theirs}.self_attn.q_norm.weight")
        names.put(f"{ours}.attention.key_norm.weight", f"{theirs}.self_attn.k_norm.weight")
    names.linear("final_norm", "esmc.norm")
    names.pairs("head", "lm_head", HEAD_NAMES)
    names.put("head.decoder", "lm_head.decoder.weight")
    names.put("head.bias", "lm_head.decoder.bias")
    names.drop(r"esmc\.rotary_emb\.(original_)?inv_freq")
    # ESM's tokens with `|` in place of the last one before `<mask>`; the rows behind them are of no token.
    tokens = [*TOKENS[:-2], "|", TOKENS[-1], *(f"<unused_{row}>" for row in range(len(TOKENS), source.vocab_size))]
    config = settings(
        where, num_layers=source.num_hidden_layers, model_dim=source.hidden_size, num_heads=source.num_attention_heads,
        ffn_dim=source.intermediate_size, ffn="swiglu", layer_norm="pre", positions="rotary", stored_frequencies=True,
        norm_eps=1e-5, qk_layer_norm=True, tied_head=False, vocabulary=tokens,
    )  # fmt: skip
    return Mapped(config=config, trained_residues=source.max_position_embeddings - SPECIAL_TOKENS_PER_SEGMENT)
