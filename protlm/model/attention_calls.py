"""Access to the q, k and v of every layer while a model runs, one layer at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from protlm.model.attention import SelfAttention
from protlm.model.segments import Segments


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of the attention of one layer on one packed row.

    Attributes:
        layer: Number of the layer, from 1.
        attention: The module, on which `attend` repeats the call.
        q: Queries, as they enter the attention.
        k: Keys.
        v: Values.
        segments: The segments of the row.
    """

    layer: int
    attention: SelfAttention
    q: Float[Tensor, "length heads head_dim"]
    k: Float[Tensor, "length heads head_dim"]
    v: Float[Tensor, "length heads head_dim"]
    segments: Segments


@torch.no_grad()
def visit_attention(
    model: nn.Module,
    tokens: Int[Tensor, " length"],
    cu_seqlens: Int[Tensor, " bounds"],
    visit: Callable[[AttentionCall], None],
) -> None:
    """Runs `model(tokens, cu_seqlens)` once, in evaluation mode and uncompiled, and visits each layer before it runs.

    Args:
        model: A `Performer`, or a module that wraps one.
        tokens: A packed row, not empty.
        cu_seqlens: int32 bounds of its segments.
        visit: Called with every layer's call, in order; a call keeps its tensors alive.
    """
    attentions = [module for module in model.modules() if isinstance(module, SelfAttention)]
    layers = {attention: number for number, attention in enumerate(attentions, start=1)}

    def visit_call(
        attention: nn.Module, arguments: tuple[Tensor, Segments, tuple[Tensor, Tensor] | None, Tensor | None]
    ) -> None:
        assert isinstance(attention, SelfAttention)
        x, segments, rotary, _ = arguments
        # While a layer runs, its weights are complete even if devices share them.
        q, k, v = attention.queries_keys_values(x, segments, rotary)
        visit(AttentionCall(layers[attention], attention, q, k, v, segments))

    handles = [attention.register_forward_pre_hook(visit_call) for attention in attentions]
    try:
        # A compiled layer would not call the hooks.
        with _evaluating(model), torch.compiler.set_stance("force_eager"):
            model(tokens, cu_seqlens)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
