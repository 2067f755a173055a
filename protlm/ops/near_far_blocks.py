"""The blocks of near-far attention: which tokens they hold, exact weights of near ones, and states of far ones.

Axes are (heads, segments, blocks, positions of a block, …), or with blocks and positions as one axis of positions.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from protlm.ops.blocks import Stretch
from protlm.ops.torch_states import LOG_ZERO, State

# The blocks of a span share their references unless those of one are this far below; exp(2 · 30) is finite in float32.
_MAX_FALL = 30.0


@dataclass(frozen=True)
class Span:
    """The blocks from first to last of a group of segments; those outside of the segments hold no token.

    Attributes:
        whole: All positions of the segments.
        members: Number of segments.
        width: Positions of a block.
        first: The first block.
        last: The block after the last one.
    """

    whole: Stretch
    members: int
    width: int
    first: int
    last: int

    @property
    def has_far(self) -> bool:
        """Whether any token is far of another: there are blocks that are no neighbours."""
        return self.whole.length > 2 * self.width

    @property
    def is_outside(self) -> bool:
        """Whether no block has a position of the segments."""
        return self.first * self.width >= self.whole.length or self.last <= 0

    def widened(self, halo: int) -> "Span":
        """Returns the span with so many more blocks on either side."""
        return replace(self, first=self.first - halo, last=self.last + halo)

    def moved(self, blocks: int) -> "Span":
        """Returns the span of as many blocks, so many later."""
        return replace(self, first=self.first + blocks, last=self.last + blocks)

    def inside(self) -> Stretch:
        """Returns the positions that are inside of the segments."""
        return self.whole.narrow(*self._bounds())

    def padded(self, x: Tensor, value: float) -> Tensor:
        """Returns (heads, segments, positions, …) of all positions from that of those inside."""
        padding = self._padding()
        return pad(x, (0, 0, *padding), value=value) if any(padding) else x

    def valid(self, device: torch.device) -> Tensor | None:
        """Returns (segments, positions), True at real tokens; None if all are real."""
        inside, padding = self.inside(), self._padding()
        valid = inside.valid
        if not any(padding):
            return valid
        if valid is None:
            valid = torch.ones((self.members, inside.length), dtype=torch.bool, device=device)
        return pad(valid, padding, value=False)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Writes (heads, segments, positions, …) to (batch, heads, length, …), zeros where a token is not real."""
        inside = self.inside()
        inside.put(tensor, values[:, :, : inside.length])

    def _bounds(self) -> tuple[int, int]:
        return max(self.first * self.width, 0), min(self.last * self.width, self.whole.length)

    def _padding(self) -> tuple[int, int]:
        start, stop = self._bounds()
        return start - self.first * self.width, self.last * self.width - stop


def in_blocks(x: Tensor, width: int) -> Tensor:
    """Returns (heads, segments, blocks, width, …) from (heads, segments, positions, …)."""
    return x.view(*x.shape[:2], -1, width, *x.shape[3:])


class FarStates:
    """The states of the far keys of a span's blocks: the sums of the columns that are not a block's own neighbours.

    A column is the state of some keys: of all blocks before the first near one, of each block of the span and of one on
    either side, and of all blocks after these. Of a span of B blocks, block r reads the columns up to r and from r + 4;
    a row r = B reads the blocks before the next span that are far from it.

    Attributes:
        features: (heads, segments, positions, features), relative to the references of their block.
        references: The references (heads, segments, blocks, features).
    """

    def __init__(
        self,
        before: State | None,
        exponents: Tensor,
        values: Tensor,
        after: State | None,
        width: int,
        *,
        is_causal: bool = False,
    ) -> None:
        """Folds every block.

        Args:
            before: The state before the blocks, (heads, segments, features, head_dim + 1); None if nothing is read of
                what comes before a block.
            exponents: (heads, segments, positions, features) of all blocks, also those on either side of the span; −∞
                where a token is not real. Overwritten by the features.
            values: (heads, segments, positions, head_dim + 1).
            after: The state after the blocks; None if nothing is read of what comes after a block.
            width: Positions of a block.
            is_causal: Whether no bit may depend on a column that is not read, whatever it holds.
        """
        blocks, values = in_blocks(exponents, width), in_blocks(values, width)
        largest = blocks.amax(3).clamp_(min=LOG_ZERO)
        self._before, self._after, self._is_causal = before, after, is_causal
        self._is_read = _read_columns(largest.shape[2], before is not None, after is not None).to(largest.device)
        none = torch.full_like(largest[:, :, :1], LOG_ZERO)
        outer = [none if state is None else state.references.unsqueeze(2) for state in (before, after)]
        self._columns = torch.cat((outer[0], largest, outer[1]), 2)
        self._shared = self._columns.amax(2, keepdim=True)
        self._is_shared = not is_causal and self._may_share()
        self.references = self._shared.expand_as(largest) if self._is_shared else largest
        self.features = exponents
        features = blocks.sub_(self.references.unsqueeze(3)).exp_()
        sums = torch.bmm(features.flatten(0, 2).transpose(1, 2), values.flatten(0, 2))
        self._sums = sums.view(*largest.shape, -1)

    def of_blocks(self) -> State:
        """Returns the state that each block of the span reads (heads, segments, blocks, features, head_dim + 1)."""
        return self._merged(slice(0, -1), self._after)

    def carried(self) -> State:
        """Returns the state that is before the next span."""
        state = self._merged(slice(-1, None), None)
        return State(state.sums.squeeze(2), state.references.squeeze(2))

    def _may_share(self) -> bool:
        """Returns whether all columns stay in range relative to one reference for each feature."""
        return bool(((self._columns >= self._shared - _MAX_FALL) | (self._columns <= LOG_ZERO)).all())

    @functools.cached_property
    def _largest_read(self) -> Tensor:
        """Returns the largest reference of the columns that a row reads (heads, segments, rows, features)."""
        num_rows = len(self._is_read)
        largest = torch.full_like(self._columns[:, :, :num_rows], LOG_ZERO)
        if self._before is not None:
            largest = self._columns.cummax(2).values[:, :, :num_rows]
        if self._after is not None:
            following = self._columns.flip(2).cummax(2).values.flip(2)[:, :, 4:]
            largest = torch.maximum(largest, pad(following, (0, 0, 0, 1), value=LOG_ZERO))
        return largest

    def _merged(self, rows: slice, after: State | None) -> State:
        is_read, largest = self._is_read[rows], self._largest_read[:, :, rows]
        if not self._is_shared:
            return State(self._merged_one_by_one(is_read, largest, rows), largest)
        lanes = self._sums.flatten(3).flatten(0, 1)
        sums = torch.bmm(is_read[:, 1:-1].to(lanes.dtype).expand(len(lanes), -1, -1), lanes)
        sums = sums.view(*largest.shape, -1)
        shared = self._shared.squeeze(2)
        for outer in (self._before, after):
            if outer is not None:
                sums += (outer.sums * torch.exp(outer.references - shared).unsqueeze(-1)).unsqueeze(2)
        # What reads nothing keeps log 0: its shared references would hide the exact weights.
        return State(sums, torch.where(largest <= LOG_ZERO, largest, self._shared))

    def _merged_one_by_one(self, is_read: Tensor, largest: Tensor, rows: slice) -> Tensor:
        """Returns the sums that rows read, with a weight for every column, row and feature."""
        exponents = self._columns.unsqueeze(2) - largest.unsqueeze(3)
        weights = exponents.masked_fill_(~is_read.unsqueeze(-1), -torch.inf).exp_()
        nothing = torch.zeros_like(self._sums[:, :, 0])
        outer = [nothing if state is None else state.sums for state in (self._before, self._after)]
        columns = torch.cat((outer[0].unsqueeze(2), self._sums, outer[1].unsqueeze(2)), 2)
        if not self._is_causal:
            return torch.einsum("hmrcf,hmcfx->hmrfx", weights, columns)
        # Zero times a value that is not finite would reach back to earlier tokens; it reaches the later ones only.
        sums = torch.einsum("hmrcf,hmcfx->hmrfx", weights, columns.nan_to_num(0.0, 0.0, 0.0))
        return sums.add_((columns - columns).cumsum(2)[:, :, : len(self._is_read)][:, :, rows])


@functools.cache
def _read_columns(num_blocks: int, reads_before: bool, reads_after: bool) -> Tensor:
    """Returns True where a row reads a column (rows, columns), for so many blocks, those on either side included."""
    rows, columns = torch.arange(num_blocks - 1).unsqueeze(1), torch.arange(num_blocks + 2)
    return ((columns <= rows) & reads_before) | ((columns >= rows + 4) & reads_after)


class NearWeights:
    """Exact weights of the keys in a query's own block and its neighbours, for all blocks of a span at once.

    The blocks of all heads and segments are one row of blocks. A window of it, without a copy, is what a block is near
    to. Windows at the ends of a head or segment reach into the next one: these blocks are the halo, whose results are
    dropped.
    """

    def __init__(self, q: Tensor, k: Tensor, span: Span, *, halo: int, is_causal: bool) -> None:
        """Computes the exponents.

        Args:
            q: (heads, segments, positions, head_dim) of the span.
            k: The same.
            span: A span that is widened by the halo.
            halo: Number of blocks at either end whose results are dropped; 2 for gradients, which windows share.
            is_causal: Whether a token sees itself and the earlier ones only.
        """
        self._shape = (*q.shape[:2], span.last - span.first, span.width)
        self._width, self._halo, self._is_causal = span.width, halo, is_causal
        self._num_near = 2 if is_causal else 3
        self._scale = q.shape[-1] ** -0.5
        self._q, self._k = self._queries(q * self._scale), self._windows(k)
        self._weights = torch.bmm(self._q, self._k.transpose(1, 2))
        valid = span.valid(q.device)
        if valid is not None:
            visible = self._windows(valid.expand(len(q), -1, -1).unsqueeze(-1)).transpose(1, 2)
            self._weights.masked_fill_(~visible, -torch.inf)
        if is_causal:
            later = torch.ones((span.width, span.width), dtype=torch.bool, device=q.device).triu_(1)
            self._weights[:, :, span.width :].masked_fill_(later, -torch.inf)

    def maxima(self) -> Tensor:
        """Returns the largest exponent of every query (heads, segments, blocks, width, 1), without the halo."""
        return self._without_halo(self._of_all_blocks(self._weights.amax(-1, keepdim=True)))

    def sums(self, maxima: Tensor, values: Tensor) -> Tensor:
        """Returns Σ weights·values (heads, segments, blocks, width, …) relative to exp(maxima), without the halo.

        Exponents become weights: this can be done once.
        """
        offsets = maxima.new_zeros((*self._shape, 1))
        self._without_halo(offsets).copy_(maxima)
        self._weights.sub_(self._queries(offsets)).exp_()
        if not self._is_causal:
            return self._without_halo(self._of_all_blocks(torch.bmm(self._weights, self._windows(values))))
        # As for far columns: zero times a later value must be zero, whatever that is.
        sums = torch.bmm(self._weights, self._windows(values.nan_to_num(0.0, 0.0, 0.0)))
        sums += self._windows(values - values).cumsum(1)[:, self._width :]
        return self._without_halo(self._of_all_blocks(sums))

    def gradients(self, log_normalisers: Tensor, pulled: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of q, k and v (heads, segments, blocks, width, head_dim), without the halo.

        Args:
            log_normalisers: (heads, segments, positions, 1).
            pulled: (heads, segments, positions, head_dim + 1), the gradients of Σ weights·[v, 1] times the normaliser.
            values: [v, 1].
        """
        weights, q_pulled = self._weights.sub_(self._queries(log_normalisers)).exp_(), self._queries(pulled)
        grads = torch.bmm(q_pulled, self._windows(values).transpose(1, 2)).mul_(weights)
        q_grad = self._of_all_blocks(torch.bmm(grads, self._k).mul_(self._scale))
        k_grad, v_grad = (torch.zeros_like(q_grad) for _ in range(2))
        k_blocks, v_blocks = k_grad.flatten(0, 2), v_grad.flatten(0, 2)
        for place in range(self._num_near):
            keys = slice(place * self._width, (place + 1) * self._width)
            # The windows, moved to the block that is at this place in each of them.
            blocks = slice(place, place + len(weights))
            k_blocks[blocks].baddbmm_(grads[:, :, keys].transpose(1, 2), self._q)
            v_blocks[blocks].baddbmm_(weights[:, :, keys].transpose(1, 2), q_pulled[..., :-1])
        return self._without_halo(q_grad), self._without_halo(k_grad), self._without_halo(v_grad)

    def _row(self, x: Tensor) -> Tensor:
        """Returns the row of blocks (blocks, width, …)."""
        return x.reshape(-1, self._width, x.shape[-1])

    def _windows(self, x: Tensor) -> Tensor:
        """Returns the windows (windows, near blocks · width, …)."""
        row = self._row(x)
        num_windows = len(row) - self._num_near + 1
        # Blocks lie one after the other. The stride of an axis of one token says nothing.
        step = row.stride(0)
        size = (num_windows, self._num_near * self._width, row.shape[-1])
        return row.as_strided(size, (step, step // self._width, row.stride(2)))

    def _queries(self, x: Tensor) -> Tensor:
        """Returns the blocks whose windows they are (windows, width, …): the second block of each."""
        row = self._row(x)
        return row[1 : len(row) - self._num_near + 2]

    def _of_all_blocks(self, x: Tensor) -> Tensor:
        """Returns (heads, segments, blocks, width, …) from results for each window."""
        row = x.new_zeros((self._shape[0] * self._shape[1] * self._shape[2], self._width, x.shape[-1]))
        row[1 : 1 + len(x)] = x
        return row.view(*self._shape, -1)

    def _without_halo(self, x: Tensor) -> Tensor:
        return x[:, :, self._halo : -self._halo]
