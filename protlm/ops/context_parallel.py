"""Attention over a length that is split over processes: which states and gradients the ranks of a group exchange.

Each rank holds consecutive tokens of every segment, the ranks in order. Ranks exchange states and their gradients, only
of the segments that continue across ranks: the size of a message does not depend on the length. Bidirectional ranks
merge their states into one, and sum its gradients. Causal ranks gather states, and each begins with the merged state of
the ranks before it; in the backward each sends the gradient of the state that it began with, and sums those of the
ranks after it.

Near-far attention exchanges heads instead (`head_parallel`).

A backend contributes the halves of its forward, `fold` and `read`, and of its backward, `query_gradients` and
`key_gradients`; the backends of the ranks may differ. Causal attention always runs on `favor_torch`.
"""

import dataclasses
import math
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from protlm.ops import favor_torch
from protlm.ops.head_parallel import backward_by_heads, forward_by_heads
from protlm.ops.inputs import AttentionInputs
from protlm.ops.process_groups import group_of


def local_bounds(cu_seqlens: Tensor, start: int, stop: int) -> Tensor:
    """Returns the bounds of all segments within the tokens from start to stop of a packed row, counted from start.

    Every rank of a group gets the same number of segments; those of which it has no token are empty.

    Args:
        cu_seqlens: int32 bounds of the whole row.
        start: The first token of this rank.
        stop: The token after its last one.

    Raises:
        ValueError: A start below 0 or after stop.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"start, stop: expected 0 <= start <= stop, got {start} and {stop}")
    return cu_seqlens.clamp(start, stop) - start


def forward_in_group(backend: ModuleType, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the output and the tensors that `backward_in_group` needs, like the `forward` of a backend.

    The states are those of whole segments, for causal attention those of the tokens on the ranks before this one.
    """
    if inputs.near_block:
        return forward_by_heads(backend, inputs)
    if inputs.causal:
        states, references = _states_before(inputs)
    else:
        states, references = _merged_states(backend, inputs)
    out, query_sums = backend.read(inputs, states, references)
    return out, states, references, query_sums


def backward_in_group(
    backend: ModuleType,
    inputs: AttentionInputs,
    out_grad: Tensor,
    out: Tensor,
    states: Tensor,
    references: Tensor,
    query_sums: Tensor,
    sums_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v of this rank's tokens.

    `sums_grad` is the gradient of the query sums of near-far attention; None for zero.
    """
    if inputs.near_block:
        return backward_by_heads(backend, inputs, out_grad, out, states, references, query_sums, sums_grad)
    assert sums_grad is None
    saved = (out_grad, out, states, references, query_sums)
    if inputs.causal:
        return _causal_backward(inputs, *saved)
    q_grad, state_grad = backend.query_gradients(inputs, *saved)
    state_grad = sum_over_ranks(state_grad, inputs)
    return q_grad, *backend.key_gradients(inputs, states, references, state_grad)


def sum_over_ranks(x: Tensor, inputs: AttentionInputs) -> Tensor:
    """Returns x (segments, …) with the sum over all ranks, in equal bits, for segments that continue across ranks.

    x is overwritten.
    """
    shared = _Shared.of(inputs)
    sums = shared.take(x)
    _reduce(sums, dist.ReduceOp.SUM, inputs)
    return shared.put(x, sums)


@dataclass(frozen=True)
class _Shared:
    """The numbers of the segments of which several ranks may have tokens, equal on all ranks; None for all segments."""

    numbers: Tensor | None

    @classmethod
    def of(cls, inputs: AttentionInputs) -> "_Shared":
        """Returns the last segment of every rank but the last: only these can continue on another rank."""
        others = group_of(inputs.group_name).size() - 1
        if inputs.near_block:
            # Every rank computes some heads of all segments.
            return cls(None)
        if inputs.cu_seqlens is None or inputs.num_segments <= others:
            return cls(None)
        # A rank without a token names the first segment, whose values then stay correct.
        return cls(_edges(inputs)[:-1, 1].clamp(min=0))

    def take(self, x: Tensor) -> Tensor:
        """Returns a copy of the rows of x of these segments; x itself, to be overwritten, for all segments."""
        return x if self.numbers is None else x.index_select(0, self.numbers)

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """Returns x with these values for these segments; x may be overwritten."""
        if self.numbers is None:
            return values
        # The two values of a segment that is named twice are equal up to rounding: take the first of them.
        first = (self.numbers[:, None] == self.numbers).int().argmax(1)
        return x.index_copy_(0, self.numbers, values.index_select(0, first))


def _edges(inputs: AttentionInputs) -> Tensor:
    """Returns the first and last segment with a token on each rank (ranks, 2); for no token their number and −1."""
    assert inputs.cu_seqlens is not None
    has_token = inputs.cu_seqlens.diff() > 0
    numbers = torch.arange(inputs.num_segments, device=has_token.device)
    first, last = torch.where(has_token, numbers, len(numbers)).amin(), torch.where(has_token, numbers, -1).amax()
    own = torch.stack((first, last))
    group = group_of(inputs.group_name)
    edges = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(edges, own, group)
    return torch.stack(edges)


def _reduce(x: Tensor, operation: dist.ReduceOp.RedOpType, inputs: AttentionInputs) -> None:
    dist.all_reduce(x, operation, group_of(inputs.group_name))


def _merged_states(backend: ModuleType, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns the states of the keys of all ranks.

    Those of exponential maps are means of v, ones, and the logarithms of the sums of the features: the form of the
    compiled backends. A segment without a key on any rank keeps its zeros.
    """
    states, references = backend.fold(inputs)
    # Between ranks logarithms are natural, as the backends of the ranks may differ.
    log_base = math.log(backend.LOG_BASE)
    references = references * log_base
    shared = _Shared.of(inputs)
    own, sums = shared.take(references), shared.take(states)
    largest = own.clone()
    _reduce(largest, dist.ReduceOp.MAX, inputs)
    sums.mul_(torch.exp(own - largest).unsqueeze(-1))
    _reduce(sums, dist.ReduceOp.SUM, inputs)
    states, references = shared.put(states, sums), shared.put(references, largest)
    if inputs.is_exponential:
        weights = states[..., -1:].clone()
        weights.masked_fill_(weights == 0, 1.0)
        states.div_(weights)
        references = references + weights.squeeze(-1).log()
    return states, references / log_base


def _states_before(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns the states of the tokens on the ranks before this one, merged in the order of the ranks."""
    # Whole segments are folded: among the keys of one rank, order does not matter to the ranks after it.
    states, references = favor_torch.fold(dataclasses.replace(inputs, causal=False))
    links = _Links.of(inputs)
    states, references = _gathered((states[links.ending], references[links.ending]), inputs.group_name)
    before = favor_torch.empty_states(inputs)
    if links.earlier:
        states, references = states[links.earlier], references[links.earlier]
        largest = references.amax(0)
        before[0][links.beginning] = (states * torch.exp(references - largest).unsqueeze(-1)).sum(0)
        before[1][links.beginning] = largest
    return before


def _causal_backward(
    inputs: AttentionInputs, out_grad: Tensor, out: Tensor, states: Tensor, references: Tensor, query_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q_grad, k_grad, v_grad, state_grad = favor_torch.causal_gradients(
        inputs, out_grad, out, states, references, query_sums
    )
    links = _Links.of(inputs)
    own = state_grad[links.beginning], references[links.beginning]
    grads, all_references = _gathered(own, inputs.group_name)
    if links.later:
        grads, all_references = grads[links.later], all_references[links.later]
        # References only rise from rank to rank: relative to the lowest ones no gradient grows, and no key of this rank
        # has an exponent above them.
        moved = (grads * torch.exp(all_references[0] - all_references).unsqueeze(-1)).sum(0)
        # The queries of later ranks see every key that this one has of their segment.
        keys = dataclasses.replace(_segments_of(inputs, links.ending), causal=False)
        further = favor_torch.key_gradients(keys, moved, all_references[0], moved)
        for grad, more in zip((k_grad, v_grad), further, strict=True):
            _tokens_of(grad, inputs, links.ending).add_(more)
    return q_grad, k_grad, v_grad


@dataclass(frozen=True)
class _Links:
    """The segments that this rank shares with other ranks.

    Attributes:
        beginning: The segments that ranks before this one may have begun: the first, or every row.
        ending: The segments that ranks after this one may continue: the last, or every row.
        earlier: The ranks that hold earlier tokens of `beginning`.
        later: The ranks that hold later tokens of `ending`.
    """

    beginning: slice
    ending: slice
    earlier: list[int]
    later: list[int]

    @classmethod
    def of(cls, inputs: AttentionInputs) -> "_Links":
        """Returns the links, by a collective; a rank without a token has none, and any segments for the shapes."""
        group = group_of(inputs.group_name)
        rank, size = group.rank(), group.size()
        if inputs.cu_seqlens is None:
            return cls(slice(None), slice(None), list(range(rank)), list(range(rank + 1, size)))
        edges = _edges(inputs).tolist()
        first, last = edges[rank]
        beginning, ending = min(first, inputs.num_segments - 1), max(last, 0)
        return cls(
            slice(beginning, beginning + 1),
            slice(ending, ending + 1),
            [other for other in range(rank) if edges[other][1] == first],
            [other for other in range(rank + 1, size) if edges[other][0] == last],
        )


def _segments_of(inputs: AttentionInputs, segments: slice) -> AttentionInputs:
    """Returns the inputs for these segments of a packed row; without one, the inputs themselves."""
    bounds, mask, a = inputs.cu_seqlens, inputs.token_mask, inputs.oprf_a
    if bounds is None:
        return inputs
    own_bounds = bounds[segments.start : segments.stop + 1]
    return dataclasses.replace(
        inputs,
        q=_tokens_of(inputs.q, inputs, segments),
        k=_tokens_of(inputs.k, inputs, segments),
        v=_tokens_of(inputs.v, inputs, segments),
        token_mask=None if mask is None else mask[:, int(own_bounds[0]) : int(own_bounds[-1])],
        cu_seqlens=own_bounds - own_bounds[0],
        oprf_a=a if a is None or a.dim() == 1 else a[segments],
    )


def _tokens_of(x: Tensor, inputs: AttentionInputs, segments: slice) -> Tensor:
    """Returns a view of the tokens of these segments in x (batch, heads, length, …)."""
    bounds = inputs.cu_seqlens
    return x if bounds is None else x[:, :, int(bounds[segments.start]) : int(bounds[segments.stop])]


def _gathered(tensors: tuple[Tensor, Tensor], group_name: str) -> tuple[Tensor, Tensor]:
    """Returns two tensors of every rank (ranks, …), gathered by one collective."""
    group = group_of(group_name)
    own = torch.cat([tensor.flatten() for tensor in tensors])
    gathered = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(gathered, own, group)
    first, second = torch.split(torch.stack(gathered), [tensor.numel() for tensor in tensors], 1)
    return first.reshape(len(gathered), *tensors[0].shape), second.reshape(len(gathered), *tensors[1].shape)
