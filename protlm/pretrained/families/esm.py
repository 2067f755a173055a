"""ESM-2, ESM-1b and ESM-1v as transformers stores them (`EsmForMaskedLM`)."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.errors import ModelError
from protlm.model.positions import standard_frequencies
from protlm.pretrained.families.name_map import MOST_LAYERS, WIDEST, Mapped, NameMap, SourceConfig, parse, settings
from protlm.pretrained.families.tokenizers import read_tokens
from protlm.vocabulary import VOCABULARY_SIZE

_INV_FREQ = r"esm\.(?:encoder\.layer\.(?:\d+|\*)\.attention\.self\.)?rotary_embeddings\.inv_freq"

LAYER_NAMES = {
    "attention.query": "attention.self.query", "attention.key": "attention.self.key",
    "attention.value": "attention.self.value", "attention.output": "attention.output.dense",
    "attention_norm": "attention.LayerNorm", "ffn_in": "intermediate.dense", "ffn_out": "output.dense",
    "ffn_norm": "LayerNorm",
}  # fmt: skip
"""The modules of a layer: our names, and those under `esm.encoder.layer.N`."""
HEAD_NAMES = {"dense": "dense", "norm": "layer_norm"}
"""Modules of the head: our names, and those under `lm_head`; RoBERTa and ESM C have the same."""


class EsmConfig(SourceConfig):
    """The config.json of an ESM model."""

    num_hidden_layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)]
    hidden_size: Annotated[int, Field(gt=0, le=WIDEST)]
    num_attention_heads: Annotated[int, Field(gt=0, le=WIDEST)]
    intermediate_size: Annotated[int, Field(gt=0, le=WIDEST)]
    vocab_size: Annotated[int, Field(gt=0)] = VOCABULARY_SIZE
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-12
    max_position_embeddings: Annotated[int, Field(gt=0, le=1 << 20)] = 1026
    pad_token_id: Annotated[int, Field(ge=0, le=100)] = 1
    position_embedding_type: Literal["absolute", "rotary"] = "absolute"
    rope_theta: Literal[10000] = 10000
    emb_layer_norm_before: bool | None = None
    token_dropout: bool | None = False
    hidden_act: Literal["gelu"] = "gelu"
    is_decoder: Literal[False] = False
    add_cross_attention: Literal[False] = False
    is_folding_model: Literal[False] = False
    tie_word_embeddings: Literal[True] = True


def map_esm(content: dict[str, Any], names: NameMap, folder: Path) -> Mapped:
    """Maps all tensors of an ESM model, and returns its settings.

    Raises:
        ModelError: Another architecture, or a tensor that is missing.
    """
    where = str(folder / "config.json")
    source = parse(EsmConfig, content, where)
    tokens = read_tokens(folder, source.vocab_size) if source.vocab_size != VOCABULARY_SIZE else ()
    if len(tokens) > VOCABULARY_SIZE and not {"L", "A", "G"} <= set(tokens):
        raise ModelError(
            f"{where}: its {len(tokens)} tokens are of structures, as SaProt's, which protlm does not read"
        )
    is_rotary = source.position_embedding_type == "rotary"
    first = source.pad_token_id + 1
    names.put(
        "embedding.weight", "esm.embeddings.word_embeddings.weight", ties=["lm_head.decoder.weight"]
    )  # fmt: skip
    if is_rotary:
        # Older files of ESM-2 have learned positions that are never used.
        names.drop(r"esm\.embeddings\.position_embeddings\.weight")
        _map_frequencies(names, source.hidden_size // source.num_attention_heads)
    else:
        names.put(
            "position_embedding.weight", "esm.embeddings.position_embeddings.weight", by=lambda table: table[first:]
        )
    if source.emb_layer_norm_before:
        names.norm("embedding_norm", "esm.embeddings.layer_norm")
    for number in range(source.num_hidden_layers):
        names.pairs(f"layers.{number}", f"esm.encoder.layer.{number}", LAYER_NAMES)
    names.norm("final_norm", "esm.encoder.emb_layer_norm_after")
    names.pairs("head", "lm_head", HEAD_NAMES)
    names.put("head.bias", "lm_head.bias", ties=["lm_head.decoder.bias"])
    names.drop(r"esm\.embeddings\.position_ids")
    names.drop(r"esm\.contact_head\.regression\.(weight|bias)")
    num_positions = source.max_position_embeddings - first
    config = settings(
        where, num_layers=source.num_hidden_layers, model_dim=source.hidden_size, num_heads=source.num_attention_heads,
        ffn_dim=source.intermediate_size, norm_eps=source.layer_norm_eps, layer_norm="pre",
        positions="rotary" if is_rotary else "learned", stored_frequencies=is_rotary,
        max_positions=num_positions, embedding_norm=bool(source.emb_layer_norm_before),
        token_dropout=bool(source.token_dropout), vocabulary=tokens,
    )  # fmt: skip
    return Mapped(config=config, trained_residues=num_positions - SPECIAL_TOKENS_PER_SEGMENT)


def _map_frequencies(names: NameMap, head_dim: int) -> None:
    """Maps the rotary frequencies, which a file may hold once, or the same for every layer, or not at all."""
    stored = names.matching(_INV_FREQ)
    if stored:
        names.equal("rotary_frequencies", stored)
    else:

        def computed() -> Tensor:
            return standard_frequencies(head_dim)

        names.put("rotary_frequencies", by=computed)
