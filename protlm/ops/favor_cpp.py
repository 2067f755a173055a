"""FAVOR on the CPU by the compiled kernels: how a call is divided and passed to C++.

The kernels compute in float32, also for shorter inputs, but for bidirectional calls of bfloat16 on a processor that has
units for it. A call is divided into units, consecutive tokens of one segment; the partial states of a long
segment are merged in their order. No result depends on the number of threads.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protlm.ops import compiled, favor_torch, near_far_cpp
from protlm.ops.call_arguments import CallArguments, Segments, Units
from protlm.ops.inputs import AttentionInputs

LOG_BASE = 2.0
"""Base of the references and query sums of exponential maps."""
# Tokens of a segment that one thread processes at a time: enough to make the state they are folded into cheap.
_UNIT_TOKENS = 2048
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# References of segments without a key, as in favor_torch.
_LOG_ZERO = -1e30


def covers(inputs: AttentionInputs) -> bool:
    """Returns whether the kernel can compute a call; the others go to `favor_torch`."""
    is_causal_in_group = inputs.causal and bool(inputs.group_name) and not inputs.near_block
    has_dtype = inputs.q.device.type == "cpu" and inputs.q.dtype in _DTYPES
    return has_dtype and "cpp" in inputs.map_definition.backends and not is_causal_in_group


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the tensors of `favor_torch.forward`, with logarithms to base 2 unless they are absolute."""
    if inputs.near_block:
        return near_far_cpp.forward(inputs)
    run = _Run(inputs, _dtype_of(inputs))
    out, query_sums = run.empty_outputs()
    states, references = run.empty_states()
    run("forward", {"out": out}, query_sums=query_sums, states=states, references=references)
    return out.to(inputs.q.dtype), states, references, query_sums


def backward(
    inputs: AttentionInputs,
    out_grad: Tensor,
    out: Tensor,
    states: Tensor,
    references: Tensor,
    query_sums: Tensor,
    sums_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; features are computed again.

    `sums_grad` is the gradient of absolute query sums, those of a near field; None for zero.
    """
    if inputs.near_block:
        return near_far_cpp.backward(inputs, out_grad, out, states, references, query_sums, sums_grad)
    assert sums_grad is None
    run = _Run(inputs, _dtype_of(inputs))
    q_grad, k_grad, v_grad = (run.result_like(x) for x in (inputs.q, inputs.k, inputs.v))
    tensors = {"out": out, "out_grad": out_grad, "q_grad": q_grad, "k_grad": k_grad, "v_grad": v_grad}
    run("backward", tensors, query_sums=query_sums, states=states, references=references)
    return q_grad.to(inputs.q.dtype), k_grad.to(inputs.q.dtype), v_grad.to(inputs.q.dtype)


def _dtype_of(inputs: AttentionInputs) -> torch.dtype:
    """Returns the type in which whole calls are computed: bfloat16 only where the processor has units for it."""
    is_bfloat16 = inputs.q.dtype == torch.bfloat16 and not inputs.causal and bool(compiled.best_half_kernel())
    return torch.bfloat16 if is_bfloat16 else torch.float32


def empty_states(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns tensors in the shapes of the states and references of `forward`."""
    return near_far_cpp.empty_states(inputs) if inputs.near_block else favor_torch.empty_states(inputs)


def fold(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns the states of all keys and their references: the first half of the bidirectional `forward`."""
    run = _Run(inputs)
    states, references = run.empty_states()
    run("fold", {}, states=states, references=references)
    return states, references


def read(inputs: AttentionInputs, states: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output and the query sums, read from the states of whole segments."""
    run = _Run(inputs)
    out, query_sums = run.empty_outputs()
    run("read", {"out": out}, query_sums=query_sums, states=states, references=references)
    return out.to(inputs.q.dtype), query_sums


def query_gradients(
    inputs: AttentionInputs, out_grad: Tensor, out: Tensor, states: Tensor, references: Tensor, query_sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of q and of the states: the first half of the bidirectional `backward`."""
    run = _Run(inputs)
    q_grad, state_grad = run.result_like(inputs.q), torch.zeros_like(states)
    tensors = {"out": out, "out_grad": out_grad, "q_grad": q_grad}
    run(
        "query_gradients",
        tensors,
        query_sums=query_sums,
        states=states,
        references=references,
        state_grads=state_grad,
    )
    return q_grad.to(inputs.q.dtype), state_grad


def key_gradients(
    inputs: AttentionInputs, states: Tensor, references: Tensor, state_grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of k and v, given those of the states."""
    run = _Run(inputs)
    k_grad, v_grad = run.result_like(inputs.k), run.result_like(inputs.v)
    run(
        "key_gradients",
        {"k_grad": k_grad, "v_grad": v_grad},
        states=states,
        references=references,
        state_grads=state_grad,
    )
    return k_grad.to(inputs.q.dtype), v_grad.to(inputs.q.dtype)


class _Run:
    """One call of the kernel: all of its arguments except the results."""

    def __init__(self, inputs: AttentionInputs, dtype: torch.dtype = torch.float32) -> None:
        plan = _plan_of(inputs)
        self._inputs, self._arguments = inputs, CallArguments(inputs, plan.positions, dtype)
        self._has_empty = plan.has_empty
        self._call = self._arguments.call
        self._call.units, self._call.groups = map(self._arguments.pointer, (plan.units, plan.groups))
        self._call.num_units, self._call.num_groups = len(plan.units), len(plan.groups)
        self._call.num_slots, self._call.longest_unit = plan.num_slots, plan.longest_unit

    def __call__(
        self,
        task: str,
        tensors: dict[str, Tensor],
        *,
        states: Tensor,
        references: Tensor,
        query_sums: Tensor | None = None,
        state_grads: Tensor | None = None,
    ) -> None:
        """Runs one task of the kernel on the other tensors that it reads or writes; `tensors` lie along the length."""
        named = {"states": states, "references": references, "query_sums": query_sums, "state_grads": state_grads}
        self._arguments.enter(tensors, {name: x for name, x in named.items() if x is not None})
        self._arguments.run("favor", task, self._call, self._call)

    def result_like(self, x: Tensor) -> Tensor:
        """Returns a tensor for results along the length, zeroed if the kernel does not write all of it."""
        return self._arguments.result_like(x)

    def empty_outputs(self) -> tuple[Tensor, Tensor]:
        """Returns tensors for the output and the query sums, zeroed if the kernel does not write all of them."""
        return self._arguments.empty_outputs()

    def empty_states(self) -> tuple[Tensor, Tensor]:
        """Returns tensors for states and references, filled with those of no key if a segment has no token."""
        inputs = self._inputs
        sizes = (inputs.num_segments, inputs.q.shape[1], inputs.num_features)
        states = inputs.q.new_empty((*sizes, inputs.q.shape[-1] + 1), dtype=torch.float32)
        references = states.new_empty((*sizes[:2], sizes[2] if inputs.is_exponential else 1))
        if self._has_empty:
            states.zero_()
            references.fill_(_LOG_ZERO)
        return states, references


@dataclass(frozen=True, slots=True)
class _Plan:
    """The units into which a call is divided.

    Attributes:
        units: int64, rows of `FavorUnit`, the longest first.
        groups: int64, rows of `FavorGroup`.
        num_slots: Number of partial states.
        longest_unit: Number of tokens of the longest unit.
        has_empty: Whether a segment has no real token.
        positions: int32, the real tokens of every row in order; None if every token is real.
    """

    units: np.ndarray
    groups: np.ndarray
    num_slots: int
    longest_unit: int
    has_empty: bool
    positions: np.ndarray | None = None


def _plan_of(inputs: AttentionInputs) -> _Plan:
    batch, length = inputs.q.shape[0], inputs.q.shape[2]
    if inputs.cu_seqlens is None and inputs.token_mask is None:
        return _plan_of_rows(batch, length, _UNIT_TOKENS, inputs.causal)
    segments = Segments.of(inputs)
    first = segments.places(segments.starts)
    counts = segments.places(segments.stops) - first
    return _plan(first, counts, segments.is_packed, _UNIT_TOKENS, inputs.causal, segments.positions)


@functools.lru_cache(maxsize=64)
def _plan_of_rows(batch: int, length: int, unit_tokens: int, causal: bool) -> _Plan:
    counts = np.full(batch, length, dtype=np.int64)
    return _plan(np.zeros(batch, dtype=np.int64), counts, False, unit_tokens, causal)


def _plan(
    first: np.ndarray,
    counts: np.ndarray,
    is_packed: bool,
    unit_tokens: int,
    causal: bool,
    positions: np.ndarray | None = None,
) -> _Plan:
    """Returns the plan for segments, given the place of the first token of each and the number of its tokens."""
    units = Units.of(counts, unit_tokens, is_even=not causal)
    row = np.zeros_like(units.segment) if is_packed else units.segment
    places = first[units.segment] + units.first
    return _Plan(
        units=units.table(units.segment, row, places, units.count, units.slot, units.first_slot),
        groups=units.groups,
        num_slots=units.num_slots,
        longest_unit=int(units.count.max(initial=0)),
        has_empty=bool((counts == 0).any()),
        positions=positions,
    )
