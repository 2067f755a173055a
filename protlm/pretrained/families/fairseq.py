"""Checkpoints of fairseq: ESM-2, ESM-1b and ESM-1v as fair-esm publishes them, and RoBERTa models such as sapiens."""

import argparse
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.errors import ModelError
from protlm.model.positions import standard_frequencies
from protlm.pretrained.checkpoint_files import PickledTensors, read_pickle
from protlm.pretrained.families.esm import HEAD_NAMES
from protlm.pretrained.families.name_map import MOST_LAYERS, WIDEST, Mapped, NameMap, SourceConfig, parse, settings
from protlm.vocabulary import MASK

_REFUSED = {
    "protein_bert_base": "ESM-1, without a norm at its end",
    "msa_transformer": "the MSA Transformer, which reads alignments",
}
_FIRST_POSITION = 2
"""The first positions of fairseq belong to padding."""
_TRAINED_POSITIONS = 1024
"""Longest input of ESM-2 in training, with special tokens; fair-esm's files do not hold it."""

_LAYER_NAMES = {
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.out_proj", "attention_norm": "self_attn_layer_norm", "ffn_in": "fc1",
    "ffn_out": "fc2", "ffn_norm": "final_layer_norm",
}  # fmt: skip
"""The modules of a layer: our names and fairseq's."""


class FairseqArguments(SourceConfig):
    """The arguments of the training that are stored beside the weights."""

    arch: str = ""
    encoder_layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)]
    encoder_embed_dim: Annotated[int, Field(gt=0, le=WIDEST)]
    encoder_attention_heads: Annotated[int, Field(gt=0, le=WIDEST)]
    token_dropout: bool = False
    activation_fn: str = "gelu"


def read_fairseq(path: Path) -> tuple[dict[str, Any], PickledTensors]:
    """Returns the arguments and the tensors of a checkpoint.

    Raises:
        ModelError: A file that is damaged, asks for code, or holds something else.
    """
    content = read_pickle(path, allows_namespace=True)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ModelError(f"{path}: expected a checkpoint of fairseq, with `model` and `args` or `cfg`")
    arguments: Any = content.get("args")
    if arguments is None and isinstance(content.get("cfg"), dict):
        arguments = content["cfg"].get("model")
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    if not isinstance(arguments, dict):
        raise ModelError(f"{path}: expected the arguments of fairseq in `args` or `cfg`, got none")
    return arguments, PickledTensors(path, (path,), content["model"])


def map_fairseq(content: dict[str, Any], names: NameMap, path: Path) -> Mapped:
    """Maps all tensors of a checkpoint of fairseq, and returns its settings; raises ModelError as `map_esm` does."""
    arch = content.get("arch")
    if isinstance(arch, str) and (arch in _REFUSED or "gvp" in arch):
        what = _REFUSED.get(arch, "an inverse folding model, which reads structures")
        raise ModelError(f"{path}: {arch} is {what}; protlm does not run it")
    arguments = parse(FairseqArguments, content, str(path))
    if arguments.activation_fn != "gelu":
        raise ModelError(f"{path}: activation_fn: expected gelu, got {arguments.activation_fn[:40]!r}")
    outer = next((prefix for prefix in ("encoder.", "decoder.") if names.has(f"{prefix}lm_head.bias")), "")
    inner = f"{outer}sentence_encoder."
    if not names.has(f"{inner}embed_tokens.weight"):
        inner = outer
    is_esm = names.has(f"{inner}emb_layer_norm_after.weight")
    by = _without_mask if arch == "roberta_large" else _unchanged
    names.put("embedding.weight", f"{inner}embed_tokens.weight", by=by, ties=[f"{outer}lm_head.weight"])
    max_positions = _map_positions(names, arguments, inner, is_esm=is_esm)
    if is_esm:
        names.norm("final_norm", f"{inner}emb_layer_norm_after")
    embedding_norm = f"{inner}emb_layer_norm_before" if is_esm else f"{inner}emb_layer_norm"
    has_embedding_norm = not is_esm or names.has(f"{embedding_norm}.weight")
    if has_embedding_norm:
        names.norm("embedding_norm", embedding_norm)
    for number in range(arguments.encoder_layers):
        names.pairs(f"layers.{number}", f"{inner}layers.{number}", _LAYER_NAMES)
    names.pairs("head", f"{outer}lm_head", HEAD_NAMES)
    names.put("head.bias", f"{outer}lm_head.bias")
    names.drop(r"(.*\.)?contact_head\.regression\.(weight|bias)")
    names.drop(r".*sentence_encoder\.version")
    config = settings(
        str(path), num_layers=arguments.encoder_layers, model_dim=arguments.encoder_embed_dim,
        num_heads=arguments.encoder_attention_heads, ffn_dim=names.shape(f"{inner}layers.0.fc1.weight")[0],
        layer_norm="pre" if is_esm else "post", positions="rotary" if max_positions is None else "learned",
        stored_frequencies=max_positions is None, max_positions=max_positions or _TRAINED_POSITIONS,
        embedding_norm=has_embedding_norm, token_dropout=is_esm and arguments.token_dropout,
        vocabulary=() if is_esm else _dictionary(path),
    )  # fmt: skip
    return Mapped(config=config, trained_residues=(max_positions or _TRAINED_POSITIONS) - SPECIAL_TOKENS_PER_SEGMENT)


def _map_positions(names: NameMap, arguments: FairseqArguments, inner: str, *, is_esm: bool) -> int | None:
    """Maps rotary frequencies or learned positions; returns the number of the latter, None of the former."""
    positions = f"{inner}embed_positions.weight"
    if is_esm and not names.has(positions):
        stored = names.matching(re.escape(inner) + r"layers\.\d+\.self_attn\.rot_emb\.inv_freq")
        if stored:
            names.equal("rotary_frequencies", stored)
        else:
            head_dim = arguments.encoder_embed_dim // arguments.encoder_attention_heads
            names.put("rotary_frequencies", by=lambda: standard_frequencies(head_dim))
        return None
    num_positions = names.shape(positions)[0] - _FIRST_POSITION
    names.put("position_embedding.weight", positions, by=lambda table: table[_FIRST_POSITION:])
    return max(1, num_positions)


def _unchanged(table: Tensor) -> Tensor:
    return table


def _without_mask(table: Tensor) -> Tensor:
    """Returns the embedding of ESM-1b and ESM-1v, in which fair-esm sets that of `<mask>` to zero."""
    table[MASK] = 0.0
    return table


def _dictionary(path: Path) -> tuple[str, ...]:
    """Returns the tokens of the dict.txt beside a checkpoint: fairseq's own around those of the file."""
    file = path.with_name("dict.txt")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text"
        raise ModelError(f"{file}: {reason}; the vocabulary of {path.name} must lie beside it") from None
    return ("<s>", "<pad>", "</s>", "<unk>", *(line.split(" ")[0] for line in lines if line.strip()), "<mask>")
