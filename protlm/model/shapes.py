"""The tensors of a network by name, from its settings alone: what can be counted and looked up before torch is loaded.

It is the twin of the modules; a test holds them together, over settings of all kinds.
"""

from collections.abc import Iterator
from math import prod
from typing import Literal, NamedTuple

from protlm.choices import EXACT_KINDS, AttentionKind
from protlm.config import ModelConfig

Role = Literal["matrix", "other", "fixed"]
"""`matrix`: the weight of a linear layer; `other`: any other parameter; `fixed`: no parameter, and not trained."""


class TensorShape(NamedTuple):
    """The shape of a tensor, and its role."""

    shape: tuple[int, ...]
    role: Role

    @property
    def size(self) -> int:
        """Number of entries."""
        return prod(self.shape)


def tensor_shapes(config: ModelConfig) -> dict[str, TensorShape]:
    """Returns the shape of every tensor of a network's state, in the order of its parameters."""
    return dict(_tensors(config))


def _tensors(config: ModelConfig) -> Iterator[tuple[str, TensorShape]]:
    dim, vocab_size = config.model_dim, len(config.tokens())
    if config.stored_frequencies:
        yield "rotary_frequencies", TensorShape((config.head_dim // 2,), "fixed")
    yield "embedding.weight", TensorShape((vocab_size, dim), "other")
    if config.positions == "learned":
        yield "position_embedding.weight", TensorShape((config.max_positions, dim), "other")
    if config.embedding_norm:
        yield from _norm("embedding_norm", config)
    for number, kind in enumerate(config.kinds):
        for name, tensor in _layer(config, kind):
            yield f"layers.{number}.{name}", tensor
    if config.layer_norm == "pre":
        yield from _norm("final_norm", config)
    if not config.tied_head:
        yield "head.decoder", TensorShape((vocab_size, dim), "other")
    yield "head.bias", TensorShape((vocab_size,), "other")
    if config.head == "dense":
        yield from _linear("head.dense", dim, dim)
        yield "head.norm.weight", TensorShape((dim,), "other")
        yield "head.norm.bias", TensorShape((dim,), "other")


def _layer(config: ModelConfig, kind: AttentionKind) -> Iterator[tuple[str, TensorShape]]:
    dim, is_exact = config.model_dim, kind in EXACT_KINDS
    yield from _norm("attention_norm", config)
    if config.qk_norm:
        is_free = (is_exact or config.estimator) and config.exact_temperature
        name = "log_temperature" if is_free else "temperature_logit"
        yield f"attention.{name}", TensorShape((config.num_heads,), "other")
    if kind == "softmax" and config.local_bias:
        yield "attention.local_bias", TensorShape((config.num_heads,), "other")
    if config.has_projection and not is_exact:
        yield "attention.projection", TensorShape((config.num_heads, config.num_features, config.head_dim), "fixed")
    if config.estimator and not is_exact:
        yield "attention.feature_shift", TensorShape((config.num_heads, config.head_dim), "fixed")
        yield "attention.feature_bias", TensorShape((config.num_heads, config.num_features), "fixed")
    if config.qk_balance and not is_exact:
        for name in ("query_balance", "key_balance"):
            yield f"attention.{name}", TensorShape((config.num_heads, config.head_dim, config.head_dim), "fixed")
    for name in ("query", "key", "value", "output"):
        yield from _linear(f"attention.{name}", dim, dim)
    if config.qk_layer_norm:
        for name in ("query_norm", "key_norm"):
            yield f"attention.{name}.weight", TensorShape((dim,), "other")
    if config.conv_width:
        yield "attention.convolution.weight", TensorShape((config.conv_width, 3 * dim), "other")
    yield from _norm("ffn_norm", config)
    yield from _linear("ffn_in", dim, config.ffn_dim)
    if config.ffn == "swiglu":
        yield from _linear("ffn_gate", dim, config.ffn_dim)
    yield from _linear("ffn_out", config.ffn_dim, dim)


def _linear(name: str, num_inputs: int, num_outputs: int) -> Iterator[tuple[str, TensorShape]]:
    yield f"{name}.weight", TensorShape((num_outputs, num_inputs), "matrix")
    yield f"{name}.bias", TensorShape((num_outputs,), "other")


def _norm(name: str, config: ModelConfig) -> Iterator[tuple[str, TensorShape]]:
    yield f"{name}.weight", TensorShape((config.model_dim,), "other")
    if config.norm == "layer":
        yield f"{name}.bias", TensorShape((config.model_dim,), "other")
