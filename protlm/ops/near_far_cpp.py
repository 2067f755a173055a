"""Near-far attention by the compiled kernel: how a call is divided into blocks and units."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protlm.ops import compiled
from protlm.ops.call_arguments import CallArguments, Segments, Units
from protlm.ops.inputs import AttentionInputs

# States of the blocks of one unit. A thread holds them for the keys, in a backward also for the queries; the states of
# a segment that has more are computed twice.
_UNIT_BYTES = 5 << 20
# Of a unit of a longer segment, whose first and last block are neighbours of other units: more than 2.
_FEWEST_BLOCKS = 4


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the output, for the backward the offsets and factors of `NearFarCall`, and the log-normalisers."""
    run = _Run(inputs)
    out, log_normalisers = run.arguments.empty_outputs()
    offsets, factors = empty_states(inputs)
    run("forward", {"out": out}, log_normalisers, offsets, factors)
    return out.to(inputs.q.dtype), offsets, factors, log_normalisers


def empty_states(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Returns tensors for the offsets and factors."""
    offsets, factors = (inputs.q.new_empty(inputs.q.shape[:3], dtype=torch.float32) for _ in range(2))
    return offsets, factors


def backward(
    inputs: AttentionInputs,
    out_grad: Tensor,
    out: Tensor,
    offsets: Tensor,
    factors: Tensor,
    log_normalisers: Tensor,
    sums_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; `sums_grad` is that of the log-normalisers, None for zero."""
    run = _Run(inputs)
    q_grad, k_grad, v_grad = (run.arguments.result_like(x) for x in (inputs.q, inputs.k, inputs.v))
    tensors = {"out": out, "out_grad": out_grad, "q_grad": q_grad, "k_grad": k_grad, "v_grad": v_grad}
    sums_grad = None if sums_grad is None else sums_grad.contiguous()
    run("backward", tensors, log_normalisers, offsets, factors, sums_grad)
    return q_grad.to(inputs.q.dtype), k_grad.to(inputs.q.dtype), v_grad.to(inputs.q.dtype)


class _Run:
    """One call of the kernel: all of its arguments except the results."""

    def __init__(self, inputs: AttentionInputs) -> None:
        plan = _plan_of(inputs)
        self.arguments = CallArguments(inputs, plan.positions)
        favor = self.arguments.call
        favor.groups, favor.num_groups = self.arguments.pointer(plan.groups), len(plan.groups)
        favor.num_slots = plan.num_slots
        self._plan = plan

    def __call__(
        self,
        task: str,
        tensors: dict[str, Tensor],
        log_normalisers: Tensor,
        offsets: Tensor,
        factors: Tensor,
        sums_grad: Tensor | None = None,
    ) -> None:
        """Runs a task on the other tensors that it reads or writes."""
        plan = self._plan
        self.arguments.enter(tensors, {"query_sums": log_normalisers})
        call = compiled.NearFarCall(
            favor=self.arguments.call,
            offsets=self.arguments.pointer(offsets),
            factors=self.arguments.pointer(factors),
            sums_grad=None if sums_grad is None else self.arguments.pointer(sums_grad),
            bounds=self.arguments.pointer(plan.bounds),
            units=self.arguments.pointer(plan.units),
            num_units=len(plan.units),
            longest_unit=int(plan.units[:, 5].max(initial=0)),
            widest_block=int(np.diff(plan.bounds).max(initial=0)),
        )
        self.arguments.run("near_far", task, call, call.favor)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The blocks of a call and the units into which it is divided.

    Attributes:
        bounds: int64, for every segment the bounds of its blocks among the real tokens of its row.
        units: int64, rows of `NearFarUnit`, the longest first.
        groups: int64, rows of `FavorGroup`.
        num_slots: Number of units whose states others need.
        positions: int32, the real tokens of every row in order; None if every token is real.
    """

    bounds: np.ndarray
    units: np.ndarray
    groups: np.ndarray
    num_slots: int
    positions: np.ndarray | None = None


def _plan_of(inputs: AttentionInputs) -> _Plan:
    head_dim, width = inputs.q.shape[-1], inputs.near_block
    most = max(_FEWEST_BLOCKS, _UNIT_BYTES // (4 * inputs.num_features * (head_dim + 2)))
    if inputs.cu_seqlens is None and inputs.token_mask is None:
        return _plan_of_rows(inputs.q.shape[0], inputs.q.shape[2], width, most)
    return _plan(Segments.of(inputs), width, most)


@functools.lru_cache(maxsize=64)
def _plan_of_rows(batch: int, length: int, width: int, most_blocks: int) -> _Plan:
    starts = np.arange(batch, dtype=np.int64) * length
    return _plan(Segments(starts, starts + length, False, length, None), width, most_blocks)


def _plan(segments: Segments, width: int, most_blocks: int) -> _Plan:
    """Returns the plan for blocks of `width` tokens and units of so many blocks."""
    starts, lengths = segments.starts, segments.stops - segments.starts
    num_blocks = -(-lengths // width)
    first_bound = np.cumsum(num_blocks + 1) - (num_blocks + 1)
    of_bound = np.repeat(np.arange(len(starts)), num_blocks + 1)
    block = np.arange(len(of_bound)) - first_bound[of_bound]
    tokens = starts[of_bound] + np.minimum(block * width, lengths[of_bound])
    bounds = segments.places(tokens)
    if segments.real is None and not segments.is_packed:
        bounds = bounds - starts[of_bound]

    units = Units.of(num_blocks, most_blocks)
    segment = units.segment
    row = np.zeros_like(segment) if segments.is_packed else segment
    columns = (segment, row, first_bound[segment], num_blocks[segment], units.first, units.count, units.slot)
    return _Plan(
        bounds=np.ascontiguousarray(bounds, dtype=np.int64),
        units=units.table(*columns),
        groups=units.groups,
        num_slots=units.num_slots,
        positions=segments.positions,
    )
