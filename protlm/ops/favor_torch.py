"""FAVOR in plain torch, stretch by stretch: how the state of a segment is built, read and differentiated.

Bidirectional attention folds all keys of a segment into a state of (features, head_dim), then every query reads it.
Causal attention goes through the stretches once: a query reads the state of the earlier stretches, and the keys of its
own stretch by a small matrix of weights.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from protlm.ops import near_far_torch
from protlm.ops.blocks import Block, Stretch, cut_into_blocks
from protlm.ops.inputs import AttentionInputs, result_like
from protlm.ops.torch_maps import TorchMap, torch_map
from protlm.ops.torch_states import LOG_ZERO, Saved, State, add_product, product

# Features of one stretch, all heads together: large enough for the matrix multiply, small enough for the cache.
_STRETCH_FEATURES = 1 << 20
_MIN_STRETCH_TOKENS = 64
_CAUSAL_STRETCH_LENGTH = 128
LOG_BASE = math.e
"""Base of the references and query sums of exponential maps."""
# A causal stretch ends before a key whose exponent is this far above its references; exp(2 · 40) is finite in float32.
_MAX_RISE = 40.0


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the output and the tensors that `backward` needs.

    Returns:
        out, like v; the states (segments, heads, features, head_dim + 1) of whole segments, Σ φ(k)·[v, 1]; their
        references (segments, heads, features or 1); the query sums (batch, heads, length): the renormaliser of each
        query, for exponential maps its logarithm. With a near field the states are empty, and the logarithms absolute.
    """
    if inputs.near_block:
        out, log_normalisers = near_far_torch.forward(inputs)
        return out, *empty_states(inputs), log_normalisers
    run = _Run(inputs)
    states, references = empty_states(inputs)
    out, query_sums = run.empty_outputs()
    for block in run.blocks():
        state = run.empty_state(block)
        if not inputs.causal:
            run.fold(block, state)
        run.write_outputs(block, state, out, query_sums)
        state.put(states, references, block)
    return out, states, references, query_sums


def backward(
    inputs: AttentionInputs,
    out_grad: Tensor,
    out: Tensor,
    states: Tensor,
    references: Tensor,
    query_sums: Tensor,
    sums_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; features are computed again."""
    return all_gradients(inputs, out_grad, out, states, references, query_sums, sums_grad)[:3]


def all_gradients(
    inputs: AttentionInputs,
    out_grad: Tensor,
    out: Tensor,
    states: Tensor,
    references: Tensor,
    query_sums: Tensor,
    sums_grad: Tensor | None = None,
    *,
    learns: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns the gradients of q, k and v, and with `learns` of the projection and the feature bias.

    `sums_grad` is the gradient of the query sums, which are logarithms; None for zero.
    """
    saved = Saved(out_grad, out, query_sums, sums_grad)
    if inputs.near_block:
        return near_far_torch.backward(inputs, saved, learns=learns)
    run = _Run(inputs)
    if learns:
        run.map.learn()
    q_grad, k_grad, v_grad = (result_like(x, is_zeroed=True) for x in (inputs.q, inputs.k, inputs.v))
    for block in run.blocks():
        if inputs.causal:
            run.causal_gradients(block, run.empty_state(block), saved, q_grad, k_grad, v_grad)
        else:
            state = State.taken(states, references, block)
            state_grad = run.query_gradients(block, state, saved, q_grad)
            run.key_gradients(block, state_grad, k_grad, v_grad)
    return q_grad, k_grad, v_grad, *run.map.parameter_gradients(inputs)


def fold(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns the states of all keys and their references: the first half of the bidirectional `forward`."""
    run = _Run(inputs)
    states, references = empty_states(inputs)
    for block in run.blocks():
        state = run.empty_state(block)
        run.fold(block, state)
        state.put(states, references, block)
    return states, references


def read(inputs: AttentionInputs, states: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output and the query sums, read from the given states.

    For bidirectional inputs these are the states of whole segments, for causal inputs those of the tokens that precede
    the given ones.
    """
    run = _Run(inputs)
    out, query_sums = run.empty_outputs()
    for block in run.blocks():
        run.write_outputs(block, State.taken(states, references, block), out, query_sums)
    return out, query_sums


def query_gradients(
    inputs: AttentionInputs, out_grad: Tensor, out: Tensor, states: Tensor, references: Tensor, query_sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of q and of the states: the first half of the bidirectional `backward`."""
    run = _Run(inputs)
    saved = Saved(out_grad, out, query_sums)
    q_grad, state_grads = result_like(inputs.q, is_zeroed=True), torch.zeros_like(states)
    for block in run.blocks():
        state_grad = run.query_gradients(block, State.taken(states, references, block), saved, q_grad)
        state_grads[block.segments] = state_grad.sums.transpose(0, 1)
    return q_grad, state_grads


def key_gradients(
    inputs: AttentionInputs, states: Tensor, references: Tensor, state_grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of k and v, given those of the states; only the references of the states matter here."""
    run = _Run(inputs)
    k_grad, v_grad = result_like(inputs.k, is_zeroed=True), result_like(inputs.v, is_zeroed=True)
    for block in run.blocks():
        run.key_gradients(block, State.taken(state_grad, references, block), k_grad, v_grad)
    return k_grad, v_grad


def causal_gradients(
    inputs: AttentionInputs, out_grad: Tensor, out: Tensor, states: Tensor, references: Tensor, query_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v, and of the states that were given to a causal `read`."""
    run = _Run(inputs)
    saved = Saved(out_grad, out, query_sums)
    q_grad, k_grad, v_grad = (result_like(x, is_zeroed=True) for x in (inputs.q, inputs.k, inputs.v))
    state_grads = torch.zeros_like(states)
    for block in run.blocks():
        before = State.taken(states, references, block)
        state_grad = run.causal_gradients(block, before, saved, q_grad, k_grad, v_grad)
        shrink = torch.exp(references[block.segments].transpose(0, 1) - state_grad.references)
        state_grads[block.segments] = (state_grad.sums * shrink.unsqueeze(-1)).transpose(0, 1)
    return q_grad, k_grad, v_grad, state_grads


def empty_states(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns states and references of no key, in the shapes of `forward`."""
    if inputs.near_block:
        return inputs.q.new_zeros(0, dtype=inputs.compute_dtype), inputs.q.new_zeros(0, dtype=inputs.compute_dtype)
    heads, head_dim = inputs.q.shape[1], inputs.q.shape[-1]
    sizes = (inputs.num_segments, heads, inputs.num_features)
    states = inputs.q.new_zeros((*sizes, head_dim + 1), dtype=inputs.compute_dtype)
    return states, states.new_full((*sizes[:2], sizes[2] if inputs.is_exponential else 1), LOG_ZERO)


class _Run:
    """One call of the op: the inputs and their map."""

    def __init__(self, inputs: AttentionInputs) -> None:
        self.inputs = inputs
        self.map: TorchMap = torch_map(inputs)

    def blocks(self) -> Iterator[Block]:
        """Yields the blocks, each with its constants entered into the map."""
        inputs = self.inputs
        tokens = max(_MIN_STRETCH_TOKENS, _STRETCH_FEATURES // (inputs.q.shape[1] * inputs.num_features))
        length = _CAUSAL_STRETCH_LENGTH if inputs.causal else tokens
        for block in cut_into_blocks(inputs.q, inputs.token_mask, inputs.cu_seqlens, tokens, length):
            self.map.enter(block.segments)
            yield block

    def empty_state(self, block: Block) -> State:
        """Returns the state of no key."""
        heads, members, head_dim = self.inputs.q.shape[1], len(block.segments), self.inputs.q.shape[-1]
        shape = (heads, members, self.map.num_features, head_dim + 1)
        sums = torch.zeros(shape, dtype=self.map.dtype, device=self.inputs.q.device)
        return State(sums, sums.new_full((heads, members, self.map.num_references), LOG_ZERO))

    def empty_outputs(self) -> tuple[Tensor, Tensor]:
        """Returns an output and query sums that are zero."""
        q = self.inputs.q
        return result_like(self.inputs.v, is_zeroed=True), q.new_zeros(q.shape[:3], dtype=self.map.dtype)

    def write_outputs(self, block: Block, state: State, out: Tensor, query_sums: Tensor) -> None:
        """Writes the output and the query sums of a block."""
        outputs = self.causal_outputs(block, state) if self.inputs.causal else self.outputs(block, state)
        for stretch, stretch_out, stretch_sums in outputs:
            stretch.put(out, stretch_out)
            stretch.put(query_sums.unsqueeze(-1), stretch_sums)

    def fold(self, block: Block, state: State) -> None:
        """Adds all keys of a block to the state."""
        for stretch in block.stretches:
            k, values = self._keys(stretch)
            exponents = self.map.key_exponents(k, stretch.valid)
            state.move_to(torch.maximum(state.references, exponents.amax(2)))
            features = self.map.key_features(k, exponents.sub_(state.references.unsqueeze(2)))
            state.add(features, values)

    def outputs(self, block: Block, state: State) -> Iterator[tuple[Stretch, Tensor, Tensor]]:
        """Yields each stretch with its output and its query sums, read from the state of all keys."""
        for stretch in block.stretches:
            features, offsets = self.map.query_features(self._queries(stretch), state.references)
            yield stretch, *_normalised(product(features, state.sums), offsets)

    def causal_outputs(self, block: Block, state: State) -> Iterator[tuple[Stretch, Tensor, Tensor]]:
        """Yields each stretch with its output and its query sums, folding its keys into the state on the way."""
        for step in self._causal_steps(block, state):
            features, offsets = self.map.query_features(self._queries(step.stretch), state.references)
            weights = product(features, step.features.transpose(2, 3)).tril_()
            # Zero times a value that is not finite would reach back to earlier tokens; it reaches the later ones only.
            sums = product(weights, step.values.nan_to_num(0.0, 0.0, 0.0))
            add_product(sums, features, state.sums)
            sums.add_((step.values - step.values).cumsum(2))
            out, query_sums = _normalised(sums, offsets)
            yield step.stretch.narrow(0, step.count), out[:, :, : step.count], query_sums[:, :, : step.count]

    def query_gradients(self, block: Block, state: State, saved: Saved, q_grad: Tensor) -> State:
        """Writes the gradients of the queries of a block; returns the gradient of the state."""
        state_grad = State(torch.zeros_like(state.sums, memory_format=torch.contiguous_format), state.references)
        for stretch in block.stretches:
            q, features, pulled = self._pulled(stretch, saved, state.references)
            grads = self._features_grad(pulled, state.sums.transpose(2, 3))
            state_grad.add(features, pulled)
            stretch.put(q_grad, self.map.query_gradient(q, features, grads))
        return state_grad

    def key_gradients(self, block: Block, state_grad: State, k_grad: Tensor, v_grad: Tensor) -> None:
        """Writes the gradients of the keys and values of a block."""
        for stretch in block.stretches:
            k, values, features = self._keys_and_features(stretch, state_grad.references)
            stretch.put(v_grad, product(features, state_grad.sums[..., :-1]))
            grads = self._features_grad(values, state_grad.sums.transpose(2, 3))
            stretch.put(k_grad, self.map.key_gradient(k, features, grads))

    def causal_gradients(
        self, block: Block, state: State, saved: Saved, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor
    ) -> State:
        """Writes the gradients of a block: of queries in the order of the stretches, then of keys in reverse order.

        The reverse pass carries the gradient of the state, Σ over later queries. It is relative to the references that
        the state had at each stretch: they do not depend on the queries of the stretch, so nothing overflows.

        Returns:
            The gradient of the state at the start of the block, with the references that it is relative to.
        """
        steps: list[tuple[Stretch, Tensor]] = []
        for step in self._causal_steps(block, state):
            stretch = step.stretch.narrow(0, step.count)
            k_features, values = step.features[:, :, : step.count], step.values[:, :, : step.count]
            q, features, pulled = self._pulled(stretch, saved, state.references)
            grads = self._features_grad(pulled, state.sums.transpose(2, 3))
            weights_grad = product(pulled, values.transpose(2, 3)).tril_()
            add_product(grads, weights_grad, k_features)
            stretch.put(q_grad, self.map.query_gradient(q, features, grads))
            steps.append((stretch, state.references))
        state_grad, later = torch.zeros_like(state.sums), state.references
        for stretch, references in reversed(steps):
            state_grad.mul_(torch.exp(references - later).unsqueeze(-1))
            later = references
            k, values, k_features = self._keys_and_features(stretch, references)
            _, features, pulled = self._pulled(stretch, saved, references)
            weights = product(features, k_features.transpose(2, 3)).tril_()
            weights_grad = product(pulled, values.transpose(2, 3)).tril_()
            stretch_v_grad = product(k_features, state_grad[..., :-1])
            add_product(stretch_v_grad, weights.transpose(2, 3), pulled[..., :-1])
            stretch.put(v_grad, stretch_v_grad)
            grads = self._features_grad(values, state_grad.transpose(2, 3))
            add_product(grads, weights_grad.transpose(2, 3), features)
            add_product(state_grad, features.transpose(2, 3), pulled)
            stretch.put(k_grad, self.map.key_gradient(k, k_features, grads))
        return State(state_grad, later)

    def _causal_steps(self, block: Block, state: State) -> Iterator["_CausalStep"]:
        """Yields each stretch in order while the state holds the tokens before it, then adds its keys to the state.

        References are the largest exponents of the earlier keys and of the first key of a step: every query of the step
        sees that key, so no weight it needs can vanish, and none depends on a later token. Where a later key rises too
        far above them the step ends before that key, and the next one begins with it.
        """
        # Sums that are added to in place must be contiguous.
        state.sums = state.sums.contiguous()
        for stretch in block.stretches:
            start = 0
            while start < stretch.length:
                rest = stretch.narrow(start, stretch.length)
                k, values = self._keys(rest)
                exponents = self.map.key_exponents(k, rest.valid)
                state.move_to(torch.maximum(state.references, exponents[:, :, 0]))
                exponents.sub_(state.references.unsqueeze(2))
                count = _count_in_range(exponents)
                features = self.map.key_features(k, exponents)
                yield _CausalStep(rest, count, features, values)
                state.add(features[:, :, :count], values[:, :, :count])
                start += count

    def _queries(self, stretch: Stretch) -> Tensor:
        return stretch.take(self.inputs.q, self.map.dtype)

    def _keys(self, stretch: Stretch) -> tuple[Tensor, Tensor]:
        """Returns k, and v with a column of ones."""
        k, v = stretch.take(self.inputs.k, self.map.dtype), stretch.take(self.inputs.v, self.map.dtype)
        return k, torch.cat((v, torch.ones_like(v[..., :1])), -1)

    def _keys_and_features(self, stretch: Stretch, references: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns k, v with a column of ones, and the features of k relative to known references."""
        k, values = self._keys(stretch)
        exponents = self.map.key_exponents(k, stretch.valid)
        return k, values, self.map.key_features(k, exponents.sub_(references.unsqueeze(2)))

    def _pulled(self, stretch: Stretch, saved: Saved, references: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q, its features, and the gradient of Σ features·state, still to be multiplied by either factor."""
        q, pulled = self._queries(stretch), saved.pulled(stretch, self.map.dtype)
        query_sums = saved.sums(stretch, self.map.dtype)
        features, divisor = self.map.scaled_query_features(q, references, query_sums)
        return q, features, pulled if divisor is None else pulled.div_(divisor)

    def _features_grad(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the product a·b in a buffer: the gradient of features through the state."""
        out = self.map.buffer("grads", (*a.shape[:-1], b.shape[-1]))
        torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
        return out


@dataclass(frozen=True)
class _CausalStep:
    """Keys whose weights the queries of one stretch take directly.

    Attributes:
        stretch: All positions up to the end of the stretch: the results of a position do not depend on `count`.
        count: Number of positions to keep; the features of later keys may have overflowed.
        features: (heads, segments, positions, features) of the keys, relative to the references of the state.
        values: v with a column of ones.
    """

    stretch: Stretch
    count: int
    features: Tensor
    values: Tensor


def _count_in_range(exponents: Tensor) -> int:
    """Returns the number of leading positions within the largest rise, at least 1; NaN counts as within it."""
    rise = exponents.amax(-1).nan_to_num(-torch.inf).flatten(0, 1).amax(0)
    too_far = (rise > _MAX_RISE).nonzero()
    return int(too_far[0]) if len(too_far) else exponents.shape[2]


def _normalised(sums: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns outputs and query sums from Σ features·[context, key sums]."""
    totals = sums[..., -1:]
    return sums[..., :-1] / totals, totals if offsets is None else totals.log().add_(offsets)
