"""How a batch or a packed row is divided: which segments are computed together, and in which stretches of positions.

A block is a set of segments with one state each. Short segments of similar length are padded into one block; a long
segment is a block of its own. The positions of a block are cut into stretches, so that the features of a stretch stay
small.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

# A segment joins a block only if it fills at least this share of the block's longest one.
_MIN_FILL = 0.75


@dataclass(frozen=True)
class Stretch:
    """A stretch of positions of one or more segments, seen as (heads, segments, positions, …).

    Attributes:
        rows: Rows of the batch, if the stretch is a rectangle of the batch.
        positions: Positions of that rectangle.
        index: (segments, positions), places in a packed row, if the stretch is no rectangle; beyond the end of a
            segment its last position is repeated.
        valid: (segments, positions), True at real tokens; None if all are real.
        has_padding: Whether the positions include the caller's own padding, of unknown content.
    """

    rows: slice
    positions: slice
    index: Tensor | None
    valid: Tensor | None
    has_padding: bool

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.positions.stop - self.positions.start if self.index is None else self.index.shape[1]

    def narrow(self, start: int, stop: int) -> "Stretch":
        """Returns the stretch of the positions from start to stop, counted within this one."""
        first = self.positions.start
        return replace(
            self,
            positions=slice(first + start, first + stop) if self.index is None else self.positions,
            index=None if self.index is None else self.index[:, start:stop],
            valid=None if self.valid is None else self.valid[:, start:stop],
        )

    def take(self, tensor: Tensor, dtype: torch.dtype, *, only_valid: bool = False) -> Tensor:
        """Returns (heads, segments, positions, …) from (batch, heads, length, …), with zeros for the caller's padding.

        With only_valid, positions beyond the end of a segment are zeros too.
        """
        if self.index is None:
            taken = tensor[self.rows, :, self.positions].transpose(0, 1).to(dtype)
        else:
            flat = tensor[0].transpose(0, 1).index_select(0, self.index.flatten())
            taken = flat.view(*self.index.shape, *flat.shape[1:]).movedim(2, 0).to(dtype)
        if self.valid is None or not (self.has_padding or only_valid):
            return taken
        return taken.masked_fill(~self.valid[..., None], 0.0)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Writes (heads, segments, positions, …) to (batch, heads, length, …), with zeros where a token is not real."""
        if self.index is None:
            if self.valid is not None:
                values = values.masked_fill(~self.valid[..., None], 0.0)
            tensor[self.rows, :, self.positions] = values.transpose(0, 1)
            return
        assert self.valid is not None
        real = self.valid.flatten().nonzero().squeeze(1)
        flat = values.movedim(0, 2).flatten(0, 1).index_select(0, real).to(tensor.dtype)
        tensor[0].transpose(0, 1).index_copy_(0, self.index.flatten().index_select(0, real), flat)


@dataclass(frozen=True)
class Block:
    """Segments that are computed together.

    Attributes:
        segments: Their numbers.
        whole: All their positions.
        stretches: The same in stretches, first positions first.
    """

    segments: Tensor
    whole: Stretch
    stretches: tuple[Stretch, ...]


def cut_into_blocks(
    q: Tensor, token_mask: Tensor | None, cu_seqlens: Tensor | None, max_tokens: int, max_positions: int
) -> Iterator[Block]:
    """Yields blocks that together cover every position once.

    Args:
        q: (batch, heads, length, head_dim); only shape and device matter.
        token_mask: (batch, length), True at real tokens.
        cu_seqlens: Bounds of the segments of a packed row; None takes each row of the batch as a segment.
        max_tokens: Most tokens of a stretch; several segments share a block only if they fit.
        max_positions: Most positions of a stretch.

    Raises:
        ValueError: Bounds that do not rise from 0 to the length.
    """
    batch, _, length, _ = q.shape
    step = min(max_tokens, max_positions)
    if cu_seqlens is not None:
        yield from _packed_blocks(token_mask, read_bounds(cu_seqlens, length), max_tokens, step, q.device)
        return
    if length == 0:
        return
    rows_per_block = max(1, max_tokens // length)
    for first in range(0, batch, rows_per_block):
        rows = slice(first, min(first + rows_per_block, batch))
        whole = _rectangle(rows, 0, length, token_mask)
        yield Block(torch.arange(rows.start, rows.stop, device=q.device), whole, _cut(whole, step))


def _rectangle(rows: slice, start: int, stop: int, mask: Tensor | None) -> Stretch:
    valid = None if mask is None else mask[rows, start:stop]
    return Stretch(rows, slice(start, stop), None, valid, has_padding=mask is not None)


def _cut(stretch: Stretch, step: int) -> tuple[Stretch, ...]:
    return tuple(stretch.narrow(start, min(start + step, stretch.length)) for start in range(0, stretch.length, step))


def read_bounds(cu_seqlens: Tensor, length: int) -> list[int]:
    """Returns the bounds of the segments of a packed row as integers.

    Raises:
        ValueError: Bounds that do not rise from 0 to the length.
    """
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(start > stop for start, stop in pairwise(bounds)):
        raise ValueError(f"cu_seqlens: expected bounds that rise from 0 to the length {length}, got {bounds[:8]}…")
    return bounds


def _packed_blocks(
    token_mask: Tensor | None, bounds: list[int], max_tokens: int, step: int, device: torch.device
) -> Iterator[Block]:
    by_length = sorted(range(len(bounds) - 1), key=lambda i: bounds[i + 1] - bounds[i], reverse=True)
    waiting = [i for i in by_length if bounds[i + 1] > bounds[i]]
    first = 0
    while first < len(waiting):
        longest = bounds[waiting[first] + 1] - bounds[waiting[first]]
        last = first + 1
        while (
            last < len(waiting)
            and (last + 1 - first) * longest <= max_tokens
            and bounds[waiting[last] + 1] - bounds[waiting[last]] >= _MIN_FILL * longest
        ):
            last += 1
        members = waiting[first:last]
        if len(members) == 1:
            start = bounds[members[0]]
            whole = _rectangle(slice(0, 1), start, start + longest, token_mask)
        else:
            whole = _gathered([bounds[i : i + 2] for i in members], longest, token_mask, device)
        yield Block(torch.tensor(members, device=device), whole, _cut(whole, step))
        first = last


def _gathered(segments: list[list[int]], longest: int, token_mask: Tensor | None, device: torch.device) -> Stretch:
    starts, stops = torch.tensor(segments, device=device).unsqueeze(-1).unbind(1)
    index = starts + torch.arange(longest, device=device)
    valid = index < stops
    index = torch.minimum(index, stops - 1)
    if token_mask is not None:
        valid = valid & token_mask[0][index]
    return Stretch(slice(0, 1), slice(0, 0), index, valid, has_padding=token_mask is not None)
