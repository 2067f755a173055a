"""BERT and RoBERTa as transformers stores them: ProtBERT, IgBert, AntiBERTy, sapiens."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from protlm.pretrained.families import esm
from protlm.pretrained.families.esm import HEAD_NAMES
from protlm.pretrained.families.name_map import MOST_LAYERS, WIDEST, Mapped, NameMap, SourceConfig, parse, settings
from protlm.pretrained.families.tokenizers import read_tokens

_PROTBERT = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO"}
"""The tokens of ProtBERT, whose training set had X for U, Z, O and B."""

LAYER_NAMES = esm.LAYER_NAMES | {"attention_norm": "attention.output.LayerNorm", "ffn_norm": "output.LayerNorm"}
"""The modules of a layer: our names, and those under `bert.encoder.layer.N` or `roberta.encoder.layer.N`."""
BERT_HEAD_NAMES = {"dense": "dense", "norm": "LayerNorm"}
"""Modules of BERT's head: our names, and those under `cls.predictions.transform`."""


class BertConfig(SourceConfig):
    """The config.json of a BERT or RoBERTa model."""

    num_hidden_layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)]
    hidden_size: Annotated[int, Field(gt=0, le=WIDEST)]
    num_attention_heads: Annotated[int, Field(gt=0, le=WIDEST)]
    intermediate_size: Annotated[int, Field(gt=0, le=WIDEST)]
    vocab_size: Annotated[int, Field(gt=0)]
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-12
    max_position_embeddings: Annotated[int, Field(gt=0, le=1 << 20)] = 512
    pad_token_id: Annotated[int, Field(ge=0, le=100)] | None = None
    position_embedding_type: Literal["absolute"] | None = "absolute"
    hidden_act: Literal["gelu"] = "gelu"
    is_decoder: Literal[False] = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True


def map_bert(content: dict[str, Any], names: NameMap, folder: Path) -> Mapped:
    """Maps all tensors of a BERT model, and returns its settings; raises ModelError as `map_esm` does."""
    head = "cls.predictions"
    mapped = _map_encoder(content, names, folder, prefix="bert", first_position=0, decoder=f"{head}.decoder.weight")
    names.pairs("head", f"{head}.transform", BERT_HEAD_NAMES)
    names.put("head.bias", f"{head}.bias", ties=[f"{head}.decoder.bias"])
    names.drop(r"bert\.pooler\.dense\.(weight|bias)")
    names.drop(r"cls\.seq_relationship\.(weight|bias)")
    # Further heads of AntiBERTy.
    names.drop(r"cls\.(species|chain|graft)\.(weight|bias)")
    return mapped


def map_roberta(content: dict[str, Any], names: NameMap, folder: Path) -> Mapped:
    """Maps all tensors of a RoBERTa model, and returns its settings; raises ModelError as `map_esm` does."""
    # The positions of RoBERTa begin behind that of padding.
    pad = content.get("pad_token_id")
    first = 1 + (pad if isinstance(pad, int) and 0 <= pad <= 100 else 1)
    mapped = _map_encoder(
        content, names, folder, prefix="roberta", first_position=first, decoder="lm_head.decoder.weight"
    )
    names.pairs("head", "lm_head", HEAD_NAMES)
    names.put("head.bias", "lm_head.bias", ties=["lm_head.decoder.bias"])
    names.drop(r"roberta\.pooler\.dense\.(weight|bias)")
    return mapped


def _map_encoder(
    content: dict[str, Any], names: NameMap, folder: Path, *, prefix: str, first_position: int, decoder: str
) -> Mapped:
    where = str(folder / "config.json")
    source = parse(BertConfig, content, where)
    tokens = read_tokens(folder, source.vocab_size)
    embeddings = f"{prefix}.embeddings"
    # Unless its config unties the two, a decoder in the file is a copy of the embedding.
    ties = [decoder] if source.tie_word_embeddings else []
    names.put("embedding.weight", f"{embeddings}.word_embeddings.weight", ties=ties)
    if not source.tie_word_embeddings:
        names.put("head.decoder", decoder)
    # The first token type is added to every token.
    names.put(
        "position_embedding.weight",
        f"{embeddings}.position_embeddings.weight",
        f"{embeddings}.token_type_embeddings.weight",
        by=lambda positions, types: positions[first_position:] + types[0],
    )
    names.norm("embedding_norm", f"{embeddings}.LayerNorm")
    names.drop(rf"{prefix}\.embeddings\.(position_ids|token_type_ids)")
    for number in range(source.num_hidden_layers):
        names.pairs(f"layers.{number}", f"{prefix}.encoder.layer.{number}", LAYER_NAMES)
    config = settings(
        where, num_layers=source.num_hidden_layers, model_dim=source.hidden_size, num_heads=source.num_attention_heads,
        ffn_dim=source.intermediate_size, norm_eps=source.layer_norm_eps, layer_norm="post", positions="learned",
        max_positions=source.max_position_embeddings - first_position, embedding_norm=True,
        tied_head=source.tie_word_embeddings, vocabulary=tokens,
        residues_as_x="UZOB" if set(tokens) == _PROTBERT else "",
    )  # fmt: skip
    return Mapped(config=config)
