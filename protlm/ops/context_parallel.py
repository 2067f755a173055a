"""Attention over a length that is split over processes: hides what the ranks of a group tell each other.

Each rank holds consecutive tokens of every segment, the ranks in order. What crosses between them is states and their
gradients, whose size does not depend on the length. Bidirectional ranks merge their states into one, and add up its
gradients. Causal ranks gather the states of all, and each begins with the merged state of those before it; on the way
back each hands in the gradient of the state that it began with, and adds up those of the ranks after it.

A backend takes part with the halves of its forward, `fold` and `read`, and of its backward, `query_gradients` and
`key_gradients`; all ranks use the same backend. Causal attention is left to `favor_torch`.
"""

import dataclasses
import math
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

from protlm.ops import favor_torch
from protlm.ops.inputs import AttentionInputs


def local_bounds(cu_seqlens: Tensor, start: int, stop: int) -> Tensor:
    """Returns the bounds of all segments within the tokens from start to stop of a packed row, counted from start.

    Every rank of a group gets as many segments; one that it has nothing of is empty there.

    Args:
        cu_seqlens: int32 bounds of the whole row.
        start: The first token of this rank.
        stop: The token after its last one.

    Raises:
        ValueError: A part that is none.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"start, stop: expected 0 <= start <= stop, got {start} and {stop}")
    return cu_seqlens.clamp(start, stop) - start


def group_name_of(process_group: ProcessGroup | None) -> str:
    """Returns the name by which an operator finds a group again, empty for one process.

    Raises:
        ValueError: No group, or one that this process is not in.
    """
    if process_group is None:
        return ""
    if not isinstance(process_group, ProcessGroup):
        raise ValueError(
            f"process_group: expected a torch.distributed.ProcessGroup that this process is in, got {process_group!r}"
        )
    return process_group.group_name if process_group.size() > 1 else ""


def forward(backend: ModuleType, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the output and what `backward` needs, as the `forward` of a backend does.

    The states are those of whole segments; of causal attention those of the tokens on the ranks before this one.
    """
    if inputs.causal:
        states, references = _states_before(inputs)
    else:
        states, references = _merged_states(backend, inputs)
    out, query_sums = backend.read(inputs, states, references)
    return out, states, references, query_sums


def backward(
    backend: ModuleType,
    inputs: AttentionInputs,
    out_grad: Tensor,
    out: Tensor,
    states: Tensor,
    references: Tensor,
    query_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v of this rank's tokens."""
    saved = (out_grad, out, states, references, query_sums)
    if inputs.causal:
        return _causal_backward(inputs, *saved)
    q_grad, state_grad = backend.query_gradients(inputs, *saved)
    sum_over_ranks(state_grad, inputs.group_name)
    return q_grad, *backend.key_gradients(inputs, states, references, state_grad)


def sum_over_ranks(x: Tensor, group_name: str) -> None:
    """Adds up a tensor over the ranks of a group, in place; the bits are the same on all of them."""
    dist.all_reduce(x, dist.ReduceOp.SUM, _group(group_name))


def _group(name: str) -> ProcessGroup:
    # As torch's functional collectives find it; there is no public way from a name to its group.
    group: ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    return group


def _merged_states(backend: ModuleType, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns the states of the keys of all ranks.

    Those of exponential maps are means of v, ones, and the logarithms of the sums of the features: what the compiled
    backends make of a state. A segment without a key anywhere keeps its zeros.
    """
    states, references = backend.fold(inputs)
    log_base = math.log(backend.LOG_BASE)
    largest = references.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, _group(inputs.group_name))
    states.mul_(torch.exp((references - largest) * log_base).unsqueeze(-1))
    sum_over_ranks(states, inputs.group_name)
    if not inputs.is_exponential:
        return states, largest
    sums = states[..., -1:].clone()
    sums.masked_fill_(sums == 0, 1.0)
    return states.div_(sums), largest.add_(sums.squeeze(-1).log() / log_base)


def _states_before(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns the states of the tokens on the ranks before this one, merged in the order of the ranks."""
    # Whole segments are folded: among the keys of one rank, order does not matter to the ranks after it.
    states, references = _gathered(favor_torch.fold(dataclasses.replace(inputs, causal=False)), inputs.group_name)
    rank = _group(inputs.group_name).rank()
    if rank == 0:
        return favor_torch.empty_states(inputs)
    largest = references[:rank].amax(0)
    moved = states[:rank] * torch.exp(references[:rank] - largest).unsqueeze(-1)
    return moved.sum(0), largest


def _causal_backward(
    inputs: AttentionInputs, out_grad: Tensor, out: Tensor, states: Tensor, references: Tensor, query_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q_grad, k_grad, v_grad, state_grad = favor_torch.causal_gradients(
        inputs, out_grad, out, states, references, query_sums
    )
    after = _gradient_after(state_grad, references, inputs.group_name)
    if after is not None:
        later_grad, later_references = after
        # The queries of later ranks see every key of this one.
        whole = dataclasses.replace(inputs, causal=False)
        grads = favor_torch.key_gradients(whole, states, later_references, later_grad)
        k_grad.add_(grads[0])
        v_grad.add_(grads[1])
    return q_grad, k_grad, v_grad


def _gradient_after(state_grad: Tensor, references: Tensor, group_name: str) -> tuple[Tensor, Tensor] | None:
    """Returns what the ranks after this one give to the states up to its end, and its references; None for the last.

    Each rank hands in the gradient of the states that it began with. References only rise from rank to rank: moved to
    those of the next rank, no gradient grows, and no key of this rank has an exponent above them.
    """
    grads, all_references = _gathered((state_grad, references), group_name)
    later = _group(group_name).rank() + 1
    if later == len(grads):
        return None
    moved = grads[later:] * torch.exp(all_references[later] - all_references[later:]).unsqueeze(-1)
    return moved.sum(0), all_references[later]


def _gathered(parts: tuple[Tensor, Tensor], group_name: str) -> tuple[Tensor, Tensor]:
    """Returns two tensors of every rank, (ranks, …), by one collective."""
    group = _group(group_name)
    own = torch.cat([part.flatten() for part in parts])
    gathered = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(gathered, own, group)
    first, second = torch.split(torch.stack(gathered), [part.numel() for part in parts], 1)
    return first.reshape(len(gathered), *parts[0].shape), second.reshape(len(gathered), *parts[1].shape)
