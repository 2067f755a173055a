"""The units of a call, runs of consecutive tokens of one segment: how they are cut without waiting for the device.

Their bounds are computed on the device, also for packed rows.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from protlm.ops.inputs import AttentionInputs


@dataclass(frozen=True)
class Units:
    """The units of a call.

    Attributes:
        table: int32 (units, 3): segment, first position, position after the last; the two are equal for empty units.
            With a reach (units, 5): then also the first position in reach and the position after the last.
        first: int32 (segments + 1): number of the first unit of each segment.
        tokens: Most tokens of a unit.
    """

    table: Tensor
    first: Tensor
    tokens: int

    @property
    def count(self) -> int:
        """Number of units, empty ones included."""
        return self.table.shape[0]


def cut_into_units(inputs: AttentionInputs, tokens: int) -> Units:
    """Returns units of at most `tokens` tokens; only the device knows how many each segment has."""
    batch, _, length, _ = inputs.q.shape
    if inputs.cu_seqlens is None:
        return _units_of_rows(batch, length, tokens, inputs.q.device)
    return _cut(inputs.cu_seqlens, length // tokens + inputs.num_segments, tokens)


def with_reach(units: Units, inputs: AttentionInputs, reach: int) -> Units:
    """Returns the units with the positions of their segments that are at most `reach` away from one of theirs."""
    table, length = units.table, inputs.q.shape[2]
    starts: Tensor | int = 0
    stops: Tensor | int = length
    if inputs.cu_seqlens is not None:
        starts, stops = inputs.cu_seqlens[table[:, 0]], inputs.cu_seqlens[table[:, 0] + 1]
    reach = min(reach, length)
    low = (table[:, 1] - reach).clamp(min=starts)
    high = (table[:, 2] + reach).clamp(max=stops)
    return replace(units, table=torch.cat((table, low.unsqueeze(1), high.unsqueeze(1)), 1).int())


def whole_segments(inputs: AttentionInputs) -> Units:
    """Returns every segment as one unit, of any length."""
    batch, _, length, _ = inputs.q.shape
    if inputs.cu_seqlens is None:
        return _units_of_rows(batch, length, length, inputs.q.device)
    bounds = inputs.cu_seqlens
    segments = torch.arange(inputs.num_segments, dtype=torch.int32, device=bounds.device)
    return Units(torch.stack((segments, bounds[:-1], bounds[1:]), 1), segments, length)


def _units_of_rows(batch: int, length: int, tokens: int, device: torch.device) -> Units:
    # Built for each call: a tensor kept from the capture of a CUDA graph, or from another stream, may be invalid.
    per_row = -(-length // tokens)
    units = torch.arange(batch * per_row, dtype=torch.int32, device=device)
    starts = units % per_row * tokens
    table = torch.stack((units // per_row, starts, (starts + tokens).clamp(max=length)), 1)
    return Units(table, torch.arange(batch + 1, dtype=torch.int32, device=device) * per_row, tokens)


def _cut(bounds: Tensor, count: int, tokens: int) -> Units:
    starts, stops = bounds[:-1], bounds[1:]
    first = torch.nn.functional.pad(((stops - starts + tokens - 1) // tokens).cumsum(0, dtype=torch.int32), (1, 0))
    units = torch.arange(count, dtype=torch.int32, device=bounds.device)
    segments = torch.searchsorted(first[1:], units, right=True).clamp_(max=len(starts) - 1)
    begin = starts[segments] + (units - first[segments]) * tokens
    end = torch.minimum(begin + tokens, stops[segments])
    # Units beyond the last token are empty.
    begin = torch.minimum(begin, end)
    return Units(torch.stack((segments.int(), begin, end), 1), first, tokens)


def state_dtype(inputs: AttentionInputs) -> torch.dtype:
    """Returns the dtype of the means of a state: float32 for `relu`, whose kernels round the differences alone."""
    return inputs.v.dtype if inputs.is_exponential else torch.float32
