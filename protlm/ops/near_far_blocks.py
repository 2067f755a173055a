"""The blocks of near-far attention: which tokens they hold, exact weights of near ones, and states of far ones.

Axes are (heads, segments, blocks, positions of a block, …), or with blocks and positions as one axis of positions.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from protlm.ops.blocks import Stretch
from protlm.ops.torch_states import LOG_ZERO, State

# Blocks of one span share their references unless a block sees nothing that comes this near to them.
_MAX_FALL = 40.0


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
    return x.unflatten(2, (-1, width))


def block_states(exponents: Tensor, values: Tensor, width: int) -> tuple[Tensor, State]:
    """Returns features relative to references of their block, and the state of each block.

    Args:
        exponents: (heads, segments, positions, features), −∞ where a token is not real; overwritten by the features.
        values: (heads, segments, positions, head_dim + 1).
        width: Positions of a block.

    Returns:
        The features; sums (heads, segments, blocks, features, head_dim + 1) and references without the last axis.
    """
    blocks, values = in_blocks(exponents, width), in_blocks(values, width)
    references = blocks.amax(3).clamp_(min=LOG_ZERO)
    features = blocks.sub_(references.unsqueeze(3)).exp_()
    sums = torch.bmm(features.flatten(0, 2).transpose(1, 2), values.flatten(0, 2))
    return exponents, State(sums.view(*references.shape, -1), references)


class FarStates:
    """The states of a span's blocks without what is near: a block reads the columns that are not its own neighbours.

    Columns are all that comes before the first near block, every block of the span and one on either side, and all that
    comes after. Of a span of B blocks, block r reads the columns up to r and from r + 4; and a row r = B would read
    what comes before the next span.
    """

    def __init__(self, before: State | None, blocks: State, after: State | None, *, is_causal: bool = False) -> None:
        """Merges columns.

        Args:
            before: The state before the blocks, (heads, segments, features, head_dim + 1); None if nothing is read of
                what comes before a block.
            blocks: The state of every block, those on either side of the span included.
            after: The state after the blocks; None if nothing is read of what comes after a block.
            is_causal: Whether no bit may depend on a column that is not read, whatever it holds.
        """
        none = torch.full_like(blocks.references[:, :, :1], LOG_ZERO)
        parts = (
            none if before is None else before.references.unsqueeze(2),
            blocks.references,
            none if after is None else after.references.unsqueeze(2),
        )
        self._before, self._blocks, self._after = before, blocks, after
        self._references = torch.cat(parts, 2)
        self._is_causal = is_causal
        num_columns = self._references.shape[2]
        rows, columns = torch.meshgrid(torch.arange(num_columns - 3), torch.arange(num_columns), indexing="ij")
        self._is_read = torch.zeros_like(rows, dtype=torch.bool)
        if before is not None:
            self._is_read |= columns <= rows
        if after is not None:
            self._is_read |= columns >= rows + 4
        self._is_read = self._is_read.to(none.device)
        self._largest = self._largest_that_is_read()
        self._shared = self._references.amax(2, keepdim=True)
        self._is_shared = not is_causal and self._may_share()
        self._columns = self._relative_columns() if self._is_shared else self._plain_columns()

    def of_blocks(self) -> State:
        """Returns the state that each block of the span reads (heads, segments, blocks, features, head_dim + 1)."""
        return self._merged(slice(0, -1))

    def carried(self) -> State:
        """Returns the state that is before the next span."""
        state = self._merged(slice(-1, None))
        return State(state.sums.squeeze(2), state.references.squeeze(2))

    def _largest_that_is_read(self) -> Tensor:
        """Returns the largest reference of all columns that a row reads (heads, segments, rows, features)."""
        num_rows = len(self._is_read)
        largest = torch.full_like(self._references[:, :, :num_rows], LOG_ZERO)
        if self._before is not None:
            largest = self._references.cummax(2).values[:, :, :num_rows]
        if self._after is not None:
            following = self._references.flip(2).cummax(2).values.flip(2)[:, :, 4:]
            largest = torch.maximum(largest, pad(following, (0, 0, 0, 1), value=LOG_ZERO))
        return largest

    def _may_share(self) -> bool:
        """Returns whether what every row reads stays in range relative to references that all columns share."""
        return bool(((self._largest >= self._shared - _MAX_FALL) | (self._largest <= LOG_ZERO)).all())

    def _relative_columns(self) -> Tensor:
        """Returns the sums of all columns relative to the shared references."""
        factors = torch.exp(self._references - self._shared).unsqueeze(-1)
        columns = self._blocks.sums.new_empty((*self._references.shape, self._blocks.sums.shape[-1]))
        torch.mul(self._blocks.sums, factors[:, :, 1:-1], out=columns[:, :, 1:-1])
        for place, outer in ((0, self._before), (-1, self._after)):
            columns[:, :, place] = 0.0 if outer is None else outer.sums * factors[:, :, place]
        return columns

    def _plain_columns(self) -> Tensor:
        """Returns the sums of all columns, each relative to its own references."""
        nothing = torch.zeros_like(self._blocks.sums[:, :, 0])
        outer = [nothing if state is None else state.sums for state in (self._before, self._after)]
        return torch.cat((outer[0].unsqueeze(2), self._blocks.sums, outer[1].unsqueeze(2)), 2)

    def _merged(self, rows: slice) -> State:
        largest, is_read = self._largest[:, :, rows], self._is_read[rows]
        if self._is_shared:
            lanes = self._columns.flatten(3).flatten(0, 1)
            sums = torch.bmm(is_read.to(lanes.dtype).expand(len(lanes), -1, -1), lanes)
            references = torch.where(largest <= LOG_ZERO, largest, self._shared)
            return State(sums.view(*largest.shape, -1), references)
        exponents = self._references.unsqueeze(2) - largest.unsqueeze(3)
        weights = exponents.masked_fill_(~is_read.unsqueeze(-1), -torch.inf).exp_()
        columns = self._columns.nan_to_num(0.0, 0.0, 0.0) if self._is_causal else self._columns
        sums = torch.einsum("hmrcf,hmcfx->hmrfx", weights, columns)
        if self._is_causal:
            # Zero times a value that is not finite would reach back to earlier tokens; it reaches the later ones only.
            sums += (self._columns - self._columns).cumsum(2)[:, :, : len(self._is_read)][:, :, rows]
        return State(sums, largest)


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
        return row.as_strided((num_windows, self._num_near * self._width, row.shape[-1]), row.stride())

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
