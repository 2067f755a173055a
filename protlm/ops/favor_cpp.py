"""FAVOR on the CPU by the compiled kernel: how a call is divided and passed to C++.

The kernel computes in float32. A call is divided into units, consecutive tokens of one segment; the partial states of a
long segment are merged in their order. No result depends on the number of threads.
"""

import ctypes
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protlm.ops import compiled
from protlm.ops.blocks import read_bounds
from protlm.ops.feature_maps import check_backend
from protlm.ops.inputs import AttentionInputs, result_like

LOG_BASE = 2.0
"""Base of the references and query sums of exponential maps."""
# Tokens of a segment that one thread processes at a time: enough to make the state they are folded into cheap.
_UNIT_TOKENS = 2048
# References of segments without a key, as in favor_torch.
_LOG_ZERO = -1e30


def covers(inputs: AttentionInputs) -> bool:
    """Returns whether the kernel can compute a call; the others go to `favor_torch`."""
    is_causal_in_group = inputs.causal and bool(inputs.group_name)
    is_float32 = inputs.q.device.type == "cpu" and inputs.q.dtype == torch.float32
    return is_float32 and inputs.is_plain and "cpp" in inputs.map_definition.backends and not is_causal_in_group


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the tensors of `favor_torch.forward`, with logarithms to base 2."""
    run = _Run(inputs)
    out, query_sums = run.empty_outputs()
    states, references = run.empty_states()
    run("forward", {"out": out}, query_sums=query_sums, states=states, references=references)
    return out, states, references, query_sums


def backward(
    inputs: AttentionInputs, out_grad: Tensor, out: Tensor, states: Tensor, references: Tensor, query_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; features are computed again."""
    run = _Run(inputs)
    q_grad, k_grad, v_grad = (run.result_like(x) for x in (inputs.q, inputs.k, inputs.v))
    tensors = {"out": out, "out_grad": out_grad, "q_grad": q_grad, "k_grad": k_grad, "v_grad": v_grad}
    run("backward", tensors, query_sums=query_sums, states=states, references=references)
    return q_grad, k_grad, v_grad


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
    return out, query_sums


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
    return q_grad, state_grad


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
    return k_grad, v_grad


class _Run:
    """One call of the kernel: all of its arguments except the results."""

    def __init__(self, inputs: AttentionInputs) -> None:
        compiled.library()
        check_backend(inputs.feature_map, "cpp")
        self._inputs = inputs
        self._heads, self._head_dim = inputs.q.shape[1], inputs.q.shape[-1]
        # The call holds only pointers: what they point to must live until it is over.
        plan = _plan_of(inputs)
        self._alive: list[Any] = [plan]
        self._has_empty, self._is_partial = plan.has_empty, plan.positions is not None
        projection, scale = self._projection()
        self._call = compiled.FavorCall(
            heads=self._heads,
            head_dim=self._head_dim,
            num_tokens=inputs.q.shape[2],
            num_rows=projection.shape[-2],
            mirror=inputs.map_definition.mirrors_rows,
            is_exponential=inputs.is_exponential,
            is_causal=inputs.causal,
            projection_head_stride=projection[0].numel() if projection.dim() == 3 else 0,
            scale=scale,
            projection=self._pointer(projection),
            oprf_a=self._oprf_a(),
            positions=plan.positions.ctypes.data if plan.positions is not None else None,
            units=plan.units.ctypes.data,
            groups=plan.groups.ctypes.data,
            num_units=len(plan.units),
            num_groups=len(plan.groups),
            num_slots=plan.num_slots,
            longest_unit=plan.longest_unit,
            q=self._strided(inputs.q),
            k=self._strided(inputs.k),
            v=self._strided(inputs.v),
            result_bytes=inputs.q.numel() * inputs.q.element_size(),
            num_threads=torch.get_num_threads(),
        )

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
        call = self._call
        for name, tensor in tensors.items():
            setattr(call, name, self._strided(tensor))
        call.states, call.references = self._pointer(states), self._pointer(references)
        call.query_sums = None if query_sums is None else self._pointer(query_sums)
        call.state_grads = None if state_grads is None else self._pointer(state_grads)
        functions = compiled.functions("favor", compiled.best_kernel())
        call.workspace = self._pointer(torch.empty(functions["workspace"](ctypes.byref(call))))
        functions[task](ctypes.byref(call))

    def result_like(self, x: Tensor) -> Tensor:
        """Returns a tensor for results along the length, zeroed if the kernel does not write all of it."""
        return result_like(x, is_zeroed=self._is_partial)

    def empty_outputs(self) -> tuple[Tensor, Tensor]:
        """Returns tensors for the output and the query sums, zeroed if the kernel does not write all of them."""
        q = self._inputs.q
        query_sums = (q.new_zeros if self._is_partial else q.new_empty)(q.shape[:3])
        return self.result_like(self._inputs.v), query_sums

    def empty_states(self) -> tuple[Tensor, Tensor]:
        """Returns tensors for states and references, filled with those of no key if a segment has no token."""
        inputs = self._inputs
        sizes = (inputs.num_segments, self._heads, inputs.num_features)
        states = inputs.q.new_empty((*sizes, self._head_dim + 1))
        references = inputs.q.new_empty((*sizes[:2], sizes[2] if inputs.is_exponential else 1))
        if self._has_empty:
            states.zero_()
            references.fill_(_LOG_ZERO)
        return states, references

    def _projection(self) -> tuple[Tensor, float]:
        """Returns the rows for the kernel, and the factor by which it multiplies them."""
        projection = self._inputs.projection
        if projection is None:
            return torch.eye(self._head_dim), 1.0
        rows = self._inputs.map_definition.rescaled(projection.float())
        return rows.contiguous(), self._head_dim**-0.25

    def _oprf_a(self) -> int | None:
        a = self._inputs.oprf_a
        if a is None:
            return None
        return self._pointer(a.detach().double().expand(self._inputs.num_segments, -1).contiguous())

    def _strided(self, x: Tensor) -> compiled.StridedTensor:
        x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        return compiled.StridedTensor(self._pointer(x), *x.stride()[:3])

    def _pointer(self, x: Tensor) -> int:
        self._alive.append(x)
        return x.data_ptr()


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
        return _plan_of_rows(batch, length, _UNIT_TOKENS)
    is_packed = inputs.cu_seqlens is not None
    if inputs.cu_seqlens is None:
        bounds = np.arange(batch + 1, dtype=np.int64) * length
    else:
        bounds = np.asarray(read_bounds(inputs.cu_seqlens, length), dtype=np.int64)
    if inputs.token_mask is None:
        return _plan(bounds[:-1], np.diff(bounds), is_packed, _UNIT_TOKENS)
    real = np.flatnonzero(inputs.token_mask.contiguous().numpy())
    bounds = np.searchsorted(real, bounds)
    plan = _plan(bounds[:-1], np.diff(bounds), is_packed, _UNIT_TOKENS)
    return dataclasses.replace(plan, positions=(real % max(length, 1)).astype(np.int32))


@functools.lru_cache(maxsize=64)
def _plan_of_rows(batch: int, length: int, unit_tokens: int) -> _Plan:
    return _plan(np.zeros(batch, dtype=np.int64), np.full(batch, length, dtype=np.int64), False, unit_tokens)


def _plan(first: np.ndarray, counts: np.ndarray, is_packed: bool, unit_tokens: int) -> _Plan:
    """Returns the plan for segments, given the place of the first token of each and the number of its tokens."""
    num_units = -(-counts // unit_tokens)
    segment = np.repeat(np.arange(len(counts)), num_units)
    index = np.arange(len(segment)) - np.repeat(np.cumsum(num_units) - num_units, num_units)
    starts = counts[segment] * index // num_units[segment]
    stops = counts[segment] * (index + 1) // num_units[segment]
    is_cut = num_units > 1
    slots = np.where(is_cut, num_units, 0)
    first_slot = np.where(is_cut, np.cumsum(slots) - slots, -1)
    slot = np.where(is_cut[segment], first_slot[segment] + index, -1)
    row = np.zeros_like(segment) if is_packed else segment
    columns = (segment, row, first[segment] + starts, stops - starts, slot, first_slot[segment])
    units = np.stack(columns, 1)[np.argsort(starts - stops, kind="stable")]
    groups = np.stack((np.arange(len(counts)), first_slot, num_units), 1)[is_cut]
    return _Plan(
        units=np.ascontiguousarray(units, dtype=np.int64),
        groups=np.ascontiguousarray(groups, dtype=np.int64),
        num_slots=int(slots.sum()),
        longest_unit=int(units[:, 3].max(initial=0)),
        has_empty=bool((counts == 0).any()),
    )
