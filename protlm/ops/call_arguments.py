"""The arguments of one call of a compiled kernel of attention, and the segments that it is divided into."""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protlm.ops import compiled
from protlm.ops.blocks import read_bounds
from protlm.ops.feature_maps import check_backend
from protlm.ops.inputs import AttentionInputs, result_like


class CallArguments:
    """The structure `FavorCall` of the inputs of a call, and all that it points to.

    Attributes:
        call: The structure, without results and units.
    """

    def __init__(
        self, inputs: AttentionInputs, positions: np.ndarray | None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Fills the structure.

        Args:
            inputs: The inputs of the call.
            positions: int32, the real tokens of every row in order; None if every token is real.
            dtype: Of the kernel, float32 or bfloat16; tensors along the length that have another are copied.
        """
        compiled.library()
        check_backend(inputs.feature_map, "cpp")
        self._inputs, self._is_partial, self._dtype = inputs, positions is not None, dtype
        # The structure holds only pointers: what they point to must live until the call is over.
        self._alive: list[Any] = []
        projection, scale = self._projection()
        bias = inputs.feature_bias
        bias = None if bias is None else bias.detach().float().contiguous()
        self.call = compiled.FavorCall(
            heads=inputs.q.shape[1],
            head_dim=inputs.q.shape[-1],
            num_tokens=inputs.q.shape[2],
            num_rows=projection.shape[-2],
            mirror=inputs.map_definition.mirrors_rows,
            is_exponential=inputs.is_exponential,
            is_causal=inputs.causal,
            projection_head_stride=projection.shape[-2:].numel() if projection.dim() == 3 else 0,
            scale=scale,
            projection=self.pointer(projection),
            oprf_a=self._oprf_a(),
            feature_bias=None if bias is None else self.pointer(bias),
            feature_bias_head_stride=0 if bias is None or bias.dim() == 1 else bias.shape[1],
            positions=None if positions is None else self.pointer(positions),
            q=self._strided(inputs.q),
            k=self._strided(inputs.k),
            v=self._strided(inputs.v),
            result_bytes=inputs.q.numel() * dtype.itemsize,
            num_threads=torch.get_num_threads(),
        )

    def enter(self, along_the_length: dict[str, Tensor], others: dict[str, Tensor]) -> None:
        """Enters the other tensors that a task reads or writes, by the names of the members."""
        for name, tensor in along_the_length.items():
            setattr(self.call, name, self._strided(tensor))
        for name, tensor in others.items():
            setattr(self.call, name, self.pointer(tensor))

    def run(self, op: str, task: str, argument: ctypes.Structure, holder: compiled.FavorCall) -> None:
        """Runs a task of an op on its structure; `holder` is the part of it with the workspace and the kind of task."""
        functions = compiled.functions(op, compiled.kernel_of(self._dtype))
        holder.is_backward = task == "backward"
        # Of this type whatever the default of the program is.
        holder.workspace = self.pointer(
            torch.empty(functions["workspace"](ctypes.byref(argument)), dtype=torch.float32, device="cpu")
        )
        functions[task](ctypes.byref(argument))

    def pointer(self, x: Tensor | np.ndarray) -> int:
        """Returns the address of an array, which lives as long as this object."""
        self._alive.append(x)
        return x.data_ptr() if isinstance(x, Tensor) else x.ctypes.data

    def result_like(self, x: Tensor) -> Tensor:
        """Returns a tensor for results of the kernel along the length, zeroed if it does not write all of it."""
        return result_like(x, dtype=self._dtype, is_zeroed=self._is_partial)

    def empty_outputs(self) -> tuple[Tensor, Tensor]:
        """Returns tensors for the output and the query sums, zeroed if the kernel does not write all of them."""
        q = self._inputs.q
        query_sums = (q.new_zeros if self._is_partial else q.new_empty)(q.shape[:3], dtype=torch.float32)
        return self.result_like(self._inputs.v), query_sums

    def _projection(self) -> tuple[Tensor, float]:
        """Returns the rows for the kernel, and the factor by which it multiplies them."""
        projection, head_dim = self._inputs.projection, self._inputs.q.shape[-1]
        if projection is None:
            return torch.eye(head_dim, dtype=torch.float32, device="cpu"), 1.0
        # Rounded once to the type of q, as in every backend.
        rows = self._inputs.map_definition.rescaled(projection.float()).to(self._inputs.q.dtype)
        return rows.float().contiguous(), head_dim**-0.25

    def _oprf_a(self) -> int | None:
        a = self._inputs.oprf_a
        if a is None:
            return None
        return self.pointer(a.detach().double().expand(self._inputs.num_segments, -1).contiguous())

    def _strided(self, x: Tensor) -> compiled.StridedTensor:
        x = x.to(self._dtype)
        x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        return compiled.StridedTensor(self.pointer(x), *x.stride()[:3])


@dataclass(frozen=True)
class Units:
    """The units of a call, consecutive tokens or blocks of one segment, the longest first; int64.

    Attributes:
        segment: The segment of each.
        first: Its first token or block in the segment.
        count: How many it has.
        slot: The place of its partial state; −1 if the segment is this one unit.
        first_slot: That of the first unit of the segment.
        groups: Rows of `FavorGroup`: the segments of several units.
        num_slots: Number of partial states.
    """

    segment: np.ndarray
    first: np.ndarray
    count: np.ndarray
    slot: np.ndarray
    first_slot: np.ndarray
    groups: np.ndarray
    num_slots: int

    @classmethod
    def of(cls, counts: np.ndarray, most: int, *, is_even: bool = True) -> "Units":
        """Returns the units of segments of so many tokens or blocks.

        Args:
            counts: Of each segment.
            most: The most of one unit.
            is_even: Whether the units of a segment are of nearly equal size, and not all but the last one full, so that
                no unit depends on what comes after it.
        """
        num_units = -(-counts // most)
        segment = np.repeat(np.arange(len(counts)), num_units)
        index = np.arange(len(segment)) - np.repeat(np.cumsum(num_units) - num_units, num_units)
        size = counts[segment]
        bounds = (
            [size * (index + end) // num_units[segment] for end in (0, 1)]
            if is_even
            else [np.minimum((index + end) * most, size) for end in (0, 1)]
        )
        is_cut = num_units > 1
        slots = np.where(is_cut, num_units, 0)
        first_slot = np.where(is_cut, np.cumsum(slots) - slots, -1)
        slot = np.where(is_cut[segment], first_slot[segment] + index, -1)
        order = np.argsort(bounds[0] - bounds[1], kind="stable")
        groups = np.stack((np.arange(len(counts)), first_slot, num_units), 1)[is_cut]
        return cls(
            segment=segment[order],
            first=bounds[0][order],
            count=(bounds[1] - bounds[0])[order],
            slot=slot[order],
            first_slot=first_slot[segment][order],
            groups=np.ascontiguousarray(groups, dtype=np.int64),
            num_slots=int(slots.sum()),
        )

    def table(self, *columns: np.ndarray) -> np.ndarray:
        """Returns columns of the units as the rows of a structure, int64."""
        return np.ascontiguousarray(np.stack(columns, 1), dtype=np.int64)


@dataclass(frozen=True)
class Segments:
    """The segments of a call, one after the other, and the places of their real tokens.

    Attributes:
        starts: int64, the first token of every segment among those of all rows.
        stops: The token after the last one.
        is_packed: Whether all lie in one row; else every row is one.
        row_length: Tokens of a row.
        real: int64, the real tokens among those of all rows; None if every token is real.
    """

    starts: np.ndarray
    stops: np.ndarray
    is_packed: bool
    row_length: int
    real: np.ndarray | None

    @classmethod
    def of(cls, inputs: AttentionInputs) -> "Segments":
        """Returns the segments of a call."""
        batch, length = inputs.q.shape[0], inputs.q.shape[2]
        if inputs.cu_seqlens is None:
            bounds = np.arange(batch + 1, dtype=np.int64) * length
        else:
            bounds = np.asarray(read_bounds(inputs.cu_seqlens, length), dtype=np.int64)
        mask = inputs.token_mask
        real = None if mask is None else np.flatnonzero(mask.contiguous().numpy())
        return cls(bounds[:-1], bounds[1:], inputs.cu_seqlens is not None, length, real)

    @property
    def positions(self) -> np.ndarray | None:
        """The real tokens in their rows, int32; None if every token is real."""
        return None if self.real is None else (self.real % max(self.row_length, 1)).astype(np.int32)

    def places(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the place in `positions` of the first real token from each of these on.

        If every token is real it is the place in the row, for starts and for what lies within a segment.
        """
        if self.real is not None:
            return np.searchsorted(self.real, tokens)
        return tokens
