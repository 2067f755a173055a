"""Exact attention to near tokens and FAVOR to far ones under one normaliser, in plain torch.

Segments are cut into blocks of `near_block` tokens. A query takes the keys of its own block and of the neighbouring
ones by exact weights, and all others by the state of its block: the sum of the states of the blocks that are not near.
Blocks are computed in spans of many, together with the blocks on either side of them. One sweep folds what comes after
each span, from the last one to the first; another goes from the first to the last, carries what came before, and merges
near and far. So no state is subtracted from another, and all exponents are absolute: exact weights and estimates
have the same unit.

The backward has the same form twice. The queries of far blocks have a state too, the sum of their features times the
gradients that they pull with; the keys read it as queries read that of the keys.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from protlm.ops.blocks import Block, cut_into_blocks
from protlm.ops.inputs import AttentionInputs, result_like
from protlm.ops.near_far_blocks import FarStates, NearWeights, Span, in_blocks
from protlm.ops.torch_maps import ExponentialMap
from protlm.ops.torch_states import LOG_ZERO, NOT_REAL, Saved, State

# Features of one span, all heads of a group of heads together.
_SPAN_FEATURES = 1 << 18
# More blocks make the sums over blocks dearer, fewer the halo.
_SPAN_BLOCKS = 16
_SPAN_TOKENS = 2048
# Spans whose later states are kept at once; of a longer segment they are folded once more.
_KEPT_SPANS = 64

_Side = Callable[[Span], tuple[Tensor, Tensor]]
"""Takes a span to the exponents (heads, segments, positions, features) of its keys or queries, and to their values."""


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns the output, like v, and the logarithms of the normalisers (batch, heads, length)."""
    out = result_like(inputs.v, is_zeroed=True)
    log_normalisers = inputs.q.new_zeros(inputs.q.shape[:3], dtype=inputs.compute_dtype)
    for heads in _head_groups(inputs):
        run = _Run(inputs, heads)
        for group in run.groups():
            run.write_outputs(group, out[:, heads], log_normalisers[:, heads])
    return out, log_normalisers


def backward(
    inputs: AttentionInputs, saved: Saved, *, learns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns the gradients of q, k and v, and with `learns` of the projection and the feature bias."""
    q_grad, k_grad, v_grad = (result_like(x, is_zeroed=True) for x in (inputs.q, inputs.k, inputs.v))
    learned = []
    for heads in _head_groups(inputs):
        run = _Run(inputs, heads, saved.of_heads(heads))
        if learns:
            run.map.learn()
        for group in run.groups():
            run.write_gradients(group, q_grad[:, heads], k_grad[:, heads], v_grad[:, heads])
        learned.append(run.map.parameter_gradients(run.inputs))
    projection_grad = _of_all_heads([grads[0] for grads in learned], inputs.projection, 3)
    bias_grad = _of_all_heads([grads[1] for grads in learned], inputs.feature_bias, 2)
    return q_grad, k_grad, v_grad, projection_grad, bias_grad


def _head_groups(inputs: AttentionInputs) -> Iterator[slice]:
    """Yields the heads that are computed together: as many as fill a span."""
    num_heads, length = inputs.q.shape[1:3]
    width = max(1, min(inputs.near_block, length))
    step = max(1, _SPAN_FEATURES // (width * _blocks_of_span(width) * inputs.num_features))
    for first in range(0, num_heads, step):
        yield slice(first, min(first + step, num_heads))


def _blocks_of_span(width: int) -> int:
    return max(2, min(_SPAN_BLOCKS, _SPAN_TOKENS // width))


def _of_all_heads(grads: Sequence[Tensor | None], parameter: Tensor | None, axes: int) -> Tensor | None:
    """Returns the gradient of a parameter from those of groups of heads, which share it if it has an axis less."""
    parts = [grad for grad in grads if grad is not None]
    if parameter is None or not parts:
        return None
    return torch.cat(parts) if parameter.dim() == axes else torch.stack(parts).sum(0)


class _Run:
    """One call of the op for a group of heads."""

    def __init__(self, inputs: AttentionInputs, heads: slice, saved: Saved | None = None) -> None:
        self.inputs = inputs.of_heads(heads)
        self.map = ExponentialMap(self.inputs)
        self._saved = saved

    def groups(self) -> Iterator[Block]:
        """Yields groups of segments, each with its constants entered into the map."""
        inputs = self.inputs
        width = max(1, min(inputs.near_block, inputs.q.shape[2]))
        per_token = inputs.q.shape[1] * inputs.num_features
        tokens = max(width * _blocks_of_span(width), _SPAN_FEATURES // per_token)
        for group in cut_into_blocks(inputs.q, inputs.token_mask, inputs.cu_seqlens, tokens, tokens):
            self.map.enter(group.segments)
            yield group

    def write_outputs(self, group: Block, out: Tensor, log_normalisers: Tensor) -> None:
        """Writes the output and the logarithms of the normalisers of a group."""
        before = self._empty_state(group)
        sides = () if self.inputs.causal else (self._keys,)
        for span, after in self._spans_and_what_follows(group, sides):
            sums, maxima, before = self._sums(span, before, after[0] if after else None)
            totals = sums[..., -1:]
            span.put(out, (sums[..., :-1] / totals).flatten(2, 3))
            span.put(log_normalisers.unsqueeze(-1), totals.log().add_(maxima).flatten(2, 3))

    def _sums(self, span: Span, before: State, after: State | None) -> tuple[Tensor, Tensor, State]:
        """Returns Σ weights·[v, 1] (heads, segments, blocks, width, head_dim + 1) of all keys, relative to exp(maxima).

        Here near and far meet: the weights of both are relative to the largest exponent of either.

        Returns:
            The sums; the maxima; the state of what is before the next span and far of it.
        """
        causal, wide = self.inputs.causal, span.widened(1)
        k, values = self._take(wide, self.inputs.k), self._values(wide)
        near = NearWeights(self._take(wide, self.inputs.q), k, wide, halo=1, is_causal=causal)
        maxima = near.maxima()
        if not span.has_far:
            return near.sums(maxima, values), maxima, before
        key_exponents = self.map.key_exponents(k, wide.valid(k.device))
        far = FarStates(before, key_exponents, values, after, span.width, is_causal=causal)
        state = far.of_blocks()
        exponents = in_blocks(self.map.absolute_query_exponents(self._take(span, self.inputs.q)), span.width)
        exponents.add_(state.references.unsqueeze(3))
        maxima = torch.maximum(maxima, exponents.amax(-1, keepdim=True))
        sums = _product(exponents.sub_(maxima).exp_(), state.sums)
        return sums.add_(near.sums(maxima, values)), maxima, far.carried()

    def write_gradients(self, group: Block, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor) -> None:
        """Writes the gradients of a group."""
        before = self._empty_state(group), self._empty_state(group)
        sides = (self._queries,) if self.inputs.causal else (self._queries, self._keys)
        for span, after in self._spans_and_what_follows(group, sides):
            grads = self._near_gradients(span)
            if span.has_far:
                far_grads, before = self._far_gradients(span, before, after)
                grads = tuple(near + in_blocks(far, span.width) for near, far in zip(grads, far_grads, strict=True))
            for tensor, grad in zip((q_grad, k_grad, v_grad), grads, strict=True):
                span.put(tensor, grad.flatten(2, 3))

    def _near_gradients(self, span: Span) -> tuple[Tensor, ...]:
        """Returns the gradients of q, k and v (heads, segments, blocks, width, head_dim) through exact weights."""
        wide = span.widened(2)
        q, k = self._take(wide, self.inputs.q), self._take(wide, self.inputs.k)
        near = NearWeights(q, k, wide, halo=2, is_causal=self.inputs.causal)
        return near.gradients(self._log_normalisers(wide), self._pulled(wide), self._values(wide))

    def _far_gradients(
        self, span: Span, before: tuple[State, State], after: list[State]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[State, State]]:
        """Returns the gradients of q, k and v (heads, segments, positions, head_dim) through far states.

        Args:
            span: The blocks.
            before: The states of the queries and of the keys before them.
            after: The states of the queries and, unless causal, of the keys after them.

        Returns:
            The gradients; the states of the queries and of the keys that are before the next span and far of it.
        """
        causal, width, own = self.inputs.causal, span.width, slice(span.width, -span.width)
        wide = span.widened(1)
        (q_exponents, pulled), (k_exponents, values) = self._queries(wide), self._keys(wide)
        queries = FarStates(None if causal else before[0], q_exponents, pulled, after[0], width)
        keys = FarStates(before[1], k_exponents, values, None if causal else after[1], width)

        sums = _relative_to_readers(keys, queries)
        grads = self._features_grad(in_blocks(pulled[:, :, own], width), sums)
        q = self._take(span, self.inputs.q)
        q_grad = self.map.absolute_query_gradient(q, queries.features[:, :, own], grads)

        sums, k_features = _relative_to_readers(queries, keys), keys.features[:, :, own]
        v_grad = _product(in_blocks(k_features, width), sums[..., :-1]).flatten(2, 3)
        grads = self._features_grad(in_blocks(values[:, :, own], width), sums)
        k_grad = self.map.key_gradient(self._take(span, self.inputs.k), k_features, grads)
        return (q_grad, k_grad, v_grad), (before[0] if causal else queries.carried(), keys.carried())

    def _spans_and_what_follows(self, group: Block, sides: Sequence[_Side]) -> Iterator[tuple[Span, list[State]]]:
        """Yields the spans of a group, first ones first, with the state of each side after the span and far of it."""
        spans = self._spans(group)
        parts = [spans[first : first + _KEPT_SPANS] for first in range(0, len(spans), _KEPT_SPANS)]
        states = [self._empty_state(group) for _ in sides]
        # What follows each part, the last part first: the spans of one part at a time keep what follows them.
        ends = [[state.clone() for state in states]]
        for part in reversed(parts[1:]):
            for span in reversed(part):
                self._fold(span.moved(1), sides, states)
            ends.append([state.clone() for state in states])
        for part, states in zip(parts, reversed(ends), strict=True):
            kept = []
            for span in reversed(part):
                kept.append([state.clone() for state in states])
                if span is not part[0]:
                    self._fold(span.moved(1), sides, states)
            yield from zip(part, reversed(kept), strict=True)

    def _spans(self, group: Block) -> list[Span]:
        length = group.whole.length
        width = min(self.inputs.near_block, length)
        num_blocks, step = math.ceil(length / width), _blocks_of_span(width)
        return [
            Span(group.whole, len(group.segments), width, first, min(first + step, num_blocks))
            for first in range(0, num_blocks, step)
        ]

    def _fold(self, span: Span, sides: Sequence[_Side], states: Sequence[State]) -> None:
        """Adds all blocks of a span to the state of each side."""
        if span.is_outside or not span.has_far:
            return
        for side, state in zip(sides, states, strict=True):
            exponents, values = side(span)
            state.move_to(torch.maximum(state.references, exponents.amax(2)))
            state.add(exponents.sub_(state.references.unsqueeze(2)).exp_(), values)

    def _keys(self, span: Span) -> tuple[Tensor, Tensor]:
        """Returns the exponents of keys, and [v, 1]."""
        k = self._take(span, self.inputs.k)
        return self.map.key_exponents(k, span.valid(k.device)), self._values(span)

    def _queries(self, span: Span) -> tuple[Tensor, Tensor]:
        """Returns the exponents of queries less the logarithms of normalisers, and the gradients of their sums."""
        exponents = self.map.absolute_query_exponents(self._take(span, self.inputs.q))
        return exponents.sub_(self._log_normalisers(span)), self._pulled(span)

    def _values(self, span: Span) -> Tensor:
        v = self._take(span, self.inputs.v)
        return torch.cat((v, torch.ones_like(v[..., :1])), -1)

    def _pulled(self, span: Span) -> Tensor:
        assert self._saved is not None
        return span.padded(self._saved.pulled(span.inside(), self.map.dtype), 0.0)

    def _log_normalisers(self, span: Span) -> Tensor:
        assert self._saved is not None
        return span.padded(self._saved.sums(span.inside(), self.map.dtype), NOT_REAL)

    def _take(self, span: Span, tensor: Tensor) -> Tensor:
        """Returns (heads, segments, positions, …) of the blocks, zeros outside of the segments."""
        return span.padded(span.inside().take(tensor, self.map.dtype), 0.0)

    def _features_grad(self, values: Tensor, sums: Tensor) -> Tensor:
        """Returns Σ values·sums of each feature (heads, segments, positions, features) in a buffer."""
        heads, members, blocks, width = values.shape[:4]
        out = self.map.buffer("grads", (heads, members, blocks * width, sums.shape[3]))
        torch.bmm(values.flatten(0, 2), sums.flatten(0, 2).transpose(1, 2), out=in_blocks(out, width).flatten(0, 2))
        return out

    def _empty_state(self, group: Block) -> State:
        shape = (self.inputs.q.shape[1], len(group.segments), self.inputs.num_features)
        sums = self.inputs.q.new_zeros((*shape, self.inputs.q.shape[-1] + 1), dtype=self.map.dtype)
        return State(sums, sums.new_full(shape, LOG_ZERO))


def _product(features: Tensor, sums: Tensor) -> Tensor:
    """Returns features·sums of each block (heads, segments, blocks, width, …)."""
    return torch.bmm(features.flatten(0, 2), sums.flatten(0, 2)).view(*features.shape[:-1], sums.shape[-1])


def _relative_to_readers(states: FarStates, readers: FarStates) -> Tensor:
    """Returns the sums of far states, for the readers' features, which are relative to references of their blocks.

    Nothing overflows: a weight is at most 1 relative to the normaliser.
    """
    state = states.of_blocks()
    return state.sums.mul_(torch.exp(readers.references[:, :, 1:-1] + state.references).unsqueeze(-1))
