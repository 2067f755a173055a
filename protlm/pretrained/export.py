"""A model as a directory that transformers loads, where it has an architecture that computes the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT, ModelConfig
from protlm.errors import ModelError
from protlm.model.performer import Performer
from protlm.model.positions import rotary_frequencies
from protlm.pretrained.families import bert, esm
from protlm.pretrained.model_description import ModelDescription
from protlm.vocabulary import CLS, EOS, MASK, PAD, TOKENS, VOCABULARY_SIZE, ModelVocabulary

_NO_LIMIT = 10**30
"""What transformers writes for a tokenizer without a longest input."""
_WANTED: dict[str, Any] = {
    "local_bias": 0.0, "causal": False, "qk_norm": False, "rescale_qk": False, "conv_width": 0, "ffn": "gelu",
    "norm": "layer", "qk_layer_norm": False, "head": "dense",
}  # fmt: skip
"""The settings that every architecture of transformers here has."""
_PRE_NORM = {"vocabulary": (), "tied_head": True, "residues_as_x": ""}
_POST_NORM = {"embedding_norm": True, "token_dropout": False, "positions": "learned", "tied_head": True}


def export(model: Performer, description: ModelDescription, folder: Path) -> str:
    """Writes a directory of transformers, and returns the name of the architecture in it.

    Args:
        model: The network, on the CPU.
        description: Its description, for the model card.
        folder: The directory, which exists and is empty.

    Raises:
        ModelError: transformers has no such architecture; the message names what stands in the way.
    """
    config = model.config
    _check(config)
    tensors = model.state_dict()
    if config.layer_norm == "pre":
        name, content, named = "EsmForMaskedLM", _esm_config(config, description), _esm_tensors(config, tensors)
        _write_esm_tokenizer(config, folder)
    else:
        vocabulary = config.tokens()
        is_bert = "[CLS]" in vocabulary.tokens
        name = "BertForMaskedLM" if is_bert else "RobertaForMaskedLM"
        first = 0 if is_bert else 1 + _number(vocabulary, PAD)
        content = _bert_config(config, vocabulary, is_bert=is_bert, first_position=first)
        named = _bert_tensors(config, tensors, is_bert=is_bert, first_position=first)
        _write_tokenizer(config, vocabulary, folder)
    # Cloned: safetensors refuses two names for one tensor.
    save_file(
        {key: tensor.clone().contiguous() for key, tensor in named.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    _write_json(folder / "config.json", {"architectures": [name], **content})
    (folder / "README.md").write_text(_card(description, name), encoding="utf-8")
    return name


def _check(config: ModelConfig) -> None:
    wanted = _WANTED | (_PRE_NORM if config.layer_norm == "pre" else _POST_NORM)
    obstacles = [
        f"{key} = {getattr(config, key)!r}"[:80] for key, value in wanted.items() if getattr(config, key) != value
    ]
    if config.attention != ("softmax",):
        obstacles.insert(0, f"attention = {config.attention_name!r}")
    if config.layer_norm == "post" and config.tokens().pad is None:
        obstacles.append("a vocabulary without padding")
    if config.layer_norm == "pre" and config.positions not in ("rotary", "learned"):
        obstacles.append(f"positions = {config.positions!r}")
    if obstacles:
        raise ModelError(
            f"--to hf: transformers has no architecture with {', '.join(obstacles)} and layer_norm = "
            f"{config.layer_norm!r}; convert to protlm instead"
        )


def _esm_config(config: ModelConfig, description: ModelDescription) -> dict[str, Any]:
    num_positions = config.max_positions
    if config.positions == "rotary" and description.trained_residues is not None:
        # No limit of the model: what it was trained on.
        num_positions = description.trained_residues + SPECIAL_TOKENS_PER_SEGMENT
    return {
        "model_type": "esm", "vocab_size": VOCABULARY_SIZE, "mask_token_id": MASK, "pad_token_id": PAD,
        "cls_token_id": CLS, "eos_token_id": EOS, "position_embedding_type": _positions(config),
        "max_position_embeddings": num_positions + PAD + 1, "emb_layer_norm_before": config.embedding_norm,
        "token_dropout": config.token_dropout, "attention_probs_dropout_prob": 0.0, **_sizes(config),
    }  # fmt: skip


def _positions(config: ModelConfig) -> str:
    return "rotary" if config.positions == "rotary" else "absolute"


def _sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.model_dim, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "intermediate_size": config.ffn_dim,
        "layer_norm_eps": config.norm_eps, "hidden_act": "gelu", "hidden_dropout_prob": config.dropout,
        "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip


def _esm_tensors(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {
        "esm.embeddings.word_embeddings.weight": tensors["embedding.weight"],
        "lm_head.decoder.weight": tensors["embedding.weight"],
        "lm_head.bias": tensors["head.bias"],
        # transformers expects a contact head; ours has none, and this one predicts no contacts.
        "esm.contact_head.regression.weight": torch.zeros(1, config.num_layers * config.num_heads),
        "esm.contact_head.regression.bias": torch.zeros(1),
    }
    if config.positions == "rotary":
        stored = tensors.get("rotary_frequencies", rotary_frequencies(config.head_dim))
        for number in range(config.num_layers):
            named[f"esm.encoder.layer.{number}.attention.self.rotary_embeddings.inv_freq"] = stored
    else:
        named["esm.embeddings.position_embeddings.weight"] = _with_padding(tensors, PAD + 1)
    _name_layers(named, tensors, config, "esm.encoder.layer", esm.LAYER_NAMES)
    _name(named, tensors, "head", "lm_head", esm.HEAD_NAMES)
    _name(named, tensors, "", "", {"final_norm": "esm.encoder.emb_layer_norm_after"})
    if config.embedding_norm:
        _name(named, tensors, "", "", {"embedding_norm": "esm.embeddings.layer_norm"})
    return named


def _bert_config(
    config: ModelConfig, vocabulary: ModelVocabulary, *, is_bert: bool, first_position: int
) -> dict[str, Any]:
    return {
        "model_type": "bert" if is_bert else "roberta", "vocab_size": len(vocabulary),
        "pad_token_id": _number(vocabulary, PAD), "bos_token_id": _number(vocabulary, CLS),
        "eos_token_id": _number(vocabulary, EOS), "max_position_embeddings": config.max_positions + first_position,
        "type_vocab_size": 1, "position_embedding_type": "absolute",
        "attention_probs_dropout_prob": config.dropout, **_sizes(config),
    }  # fmt: skip


def _bert_tensors(
    config: ModelConfig, tensors: Mapping[str, Tensor], *, is_bert: bool, first_position: int
) -> dict[str, Tensor]:
    prefix = "bert" if is_bert else "roberta"
    embeddings = f"{prefix}.embeddings"
    named = {
        f"{embeddings}.word_embeddings.weight": tensors["embedding.weight"],
        f"{embeddings}.position_embeddings.weight": _with_padding(tensors, first_position),
        f"{embeddings}.token_type_embeddings.weight": torch.zeros(1, config.model_dim),
        ("cls.predictions.bias" if is_bert else "lm_head.bias"): tensors["head.bias"],
    }
    _name_layers(named, tensors, config, f"{prefix}.encoder.layer", bert.LAYER_NAMES)
    _name(named, tensors, "", "", {"embedding_norm": f"{embeddings}.LayerNorm"})
    if is_bert:
        _name(named, tensors, "head", "cls.predictions.transform", bert.BERT_HEAD_NAMES)
    else:
        _name(named, tensors, "head", "lm_head", esm.HEAD_NAMES)
    return named


def _with_padding(tensors: Mapping[str, Tensor], num_rows: int) -> Tensor:
    """Returns the positions behind rows that only padding has."""
    positions = tensors["position_embedding.weight"]
    return torch.cat([positions.new_zeros(num_rows, positions.shape[1]), positions])


def _name_layers(
    named: dict[str, Tensor], tensors: Mapping[str, Tensor], config: ModelConfig, prefix: str, names: Mapping[str, str]
) -> None:
    for number in range(config.num_layers):
        _name(named, tensors, f"layers.{number}", f"{prefix}.{number}", names)


def _name(
    named: dict[str, Tensor], tensors: Mapping[str, Tensor], ours: str, theirs: str, names: Mapping[str, str]
) -> None:
    """Adds weight and bias of modules under their names in transformers."""
    for own, other in names.items():
        for part in ("weight", "bias"):
            target, source = f"{theirs}.{other}.{part}".lstrip("."), f"{ours}.{own}.{part}".lstrip(".")
            named[target] = tensors[source]


def _number(vocabulary: ModelVocabulary, token: int) -> int:
    return int(vocabulary.columns[token])


def _longest_input(config: ModelConfig) -> int:
    return config.max_positions if config.positions == "learned" else _NO_LIMIT


def _write_esm_tokenizer(config: ModelConfig, folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    content = {f"{name}_token": f"<{name}>" for name in ("unk", "pad", "cls", "mask", "eos")}
    content |= {"tokenizer_class": "EsmTokenizer", "model_max_length": _longest_input(config)}  # type: ignore[dict-item]
    _write_json(folder / "tokenizer_config.json", content)


def _write_tokenizer(config: ModelConfig, vocabulary: ModelVocabulary, folder: Path) -> None:
    """Writes a tokenizer that makes a token of each letter, whether there are spaces between them or not."""
    tokens = vocabulary.tokens
    special = {
        name: tokens[_number(vocabulary, number)]
        for name, number in (("cls", CLS), ("pad", PAD), ("sep", EOS), ("unk", TOKENS.index("<unk>")), ("mask", MASK))
        if _number(vocabulary, number) >= 0
    }
    replacements = [_replacement(r"\s", "")]
    if vocabulary.lacked and vocabulary.stand_in == "X":
        replacements.append(_replacement(f"[{vocabulary.lacked}]", "X"))
    ends = [special["cls"], special["sep"]]
    around = [{"SpecialToken": {"id": end, "type_id": 0}} for end in ends]
    content = {
        "version": "1.0", "truncation": None, "padding": None, "decoder": None,
        "added_tokens": [
            {"id": tokens.index(token), "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for token in sorted(special.values(), key=tokens.index)
        ],
        "normalizer": {"type": "Sequence", "normalizers": replacements},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [around[0], {"Sequence": {"id": "A", "type_id": 0}}, around[1]],
            "pair": [around[0], {"Sequence": {"id": "A", "type_id": 0}}, around[1],
                     {"Sequence": {"id": "B", "type_id": 0}}, around[1]],
            "special_tokens": {end: {"id": end, "ids": [tokens.index(end)], "tokens": [end]} for end in ends},
        },
        "model": {
            "type": "WordLevel", "vocab": {token: number for number, token in enumerate(tokens)},
            "unk_token": special.get("unk", vocabulary.stand_in),
        },
    }  # fmt: skip
    _write_json(folder / "tokenizer.json", content)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": _longest_input(config),
            **{f"{name}_token": token for name, token in special.items()},
        },
    )


def _replacement(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _card(description: ModelDescription, name: str) -> str:
    origin = description.origin or description.fine_tuned_from
    header = ["---", f"license: {origin.licence}", "---"] if origin is not None and origin.licence else []
    source = "a model trained with protlm"
    if origin is not None:
        revision = f" (revision {origin.revision})" if origin.revision else ""
        source = f"{origin.source}{revision}"
    if description.fine_tuned_from is not None:
        source += ", fine-tuned with protlm,"
    lines = [
        *header,
        f"# {'A model trained with protlm' if origin is None else origin.source}, for transformers",
        "",
        f"Written by `protlm convert` from {source} as `{name}`.",
        f"Weights in protlm (xxh3-128): `{description.weights_hash}`.",
        "",
    ]
    return "\n".join(lines)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
