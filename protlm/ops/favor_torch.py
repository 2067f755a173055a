"""FAVOR in plain torch, chunk by chunk: hides how rows and packed segments are cut so that features stay small.

The keys of a segment are folded into a state of (features, head_dim), then every query reads it. For the `positive` map
this is exact attention twice, through the features as landmarks: the state holds, per feature, the average of v under
the weights φ(k) and the logarithm of their sum, each with its own running maximum, so that no stabiliser biases the
result. Short segments of one length class are padded into a block and handled together; a long one is cut along its
length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from protlm.ops.random_features import RELU_OFFSET

# Features of one chunk, all heads together: large enough for the matrix multiply, small enough for the cache.
_CHUNK_FEATURES = 1 << 20
_MIN_CHUNK_LENGTH = 64
# A segment joins a block only if it fills at least this share of the block's longest one.
_MIN_FILL = 0.75
# Stands for log 0 where a feature has seen no key: finite, so that differences of it are not NaN.
_LOG_ZERO = -1e30


def compute_dtype(q: Tensor) -> torch.dtype:
    """Returns the dtype of exponents, maxima and sums."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the output and the sums that `backward` needs.

    Returns:
        out, like v; context (segments, heads, features, head_dim); the key sums (segments, heads, features), for
        `positive` their logarithm; the query sums (batch, heads, length), likewise.
    """
    batch, heads, length, head_dim = q.shape
    features = _Features(q, projection, feature_map)
    segments = batch if cu_seqlens is None else len(cu_seqlens) - 1
    out = torch.zeros_like(v, memory_format=torch.contiguous_format)
    context = q.new_zeros((segments, heads, features.count, head_dim), dtype=features.dtype)
    key_sums = torch.zeros_like(context[..., 0])
    query_sums = q.new_zeros((batch, heads, length), dtype=features.dtype)
    for block in _blocks(q, token_mask, cu_seqlens, features.chunk_length):
        state, sums = features.fold_keys(block, k, v)
        for piece in block.pieces:
            piece_out, piece_sums = features.read_queries(piece.take(q, features.dtype), state, sums)
            piece.put(out, piece_out)
            piece.put(query_sums.unsqueeze(-1), piece_sums.unsqueeze(-1))
        context[block.segments], key_sums[block.segments] = state.transpose(0, 1), sums.transpose(0, 1)
    return out, context, key_sums, query_sums


def backward(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    context: Tensor,
    key_sums: Tensor,
    query_sums: Tensor,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; features are computed once more."""
    features = _Features(q, projection, feature_map)
    q_grad, k_grad, v_grad = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for block in _blocks(q, token_mask, cu_seqlens, features.chunk_length):
        state, sums = context[block.segments].transpose(0, 1), key_sums[block.segments].transpose(0, 1)
        state_grad = torch.zeros_like(torch.cat((state, sums.unsqueeze(-1)), -1))
        for piece in block.pieces:
            q_piece, out_piece = piece.take(q, features.dtype), piece.take(out, features.dtype)
            grad_piece = piece.take(out_grad, features.dtype, only_valid=True)
            piece_sums = piece.take(query_sums.unsqueeze(-1), features.dtype)
            piece.put(
                q_grad, features.pull_queries(q_piece, out_piece, grad_piece, state, sums, piece_sums, state_grad)
            )
        for piece in block.pieces:
            k_piece, v_piece = piece.take(k, features.dtype), piece.take(v, features.dtype)
            k_piece_grad, v_piece_grad = features.pull_keys(k_piece, v_piece, piece.valid, sums, state_grad)
            piece.put(k_grad, k_piece_grad)
            piece.put(v_grad, v_piece_grad)
    return q_grad, k_grad, v_grad


@dataclass(frozen=True)
class _Piece:
    """A stretch of positions of one or more segments, seen as (heads, segments, positions, …).

    Attributes:
        rows: Rows of the batch, where the piece is a rectangle of it.
        positions: Positions of that rectangle.
        index: Positions (segments · positions) in a packed row, where it is none; beyond the end of a segment its last
            position again.
        valid: (segments, positions), True at real tokens; None where all are real.
        has_padding: Whether the caller's own padding, of unknown content, is among the positions.
    """

    rows: slice
    positions: slice
    index: Tensor | None
    valid: Tensor | None
    has_padding: bool

    def take(self, tensor: Tensor, dtype: torch.dtype, *, only_valid: bool = False) -> Tensor:
        """Returns (heads, segments, positions, …) from (batch, heads, length, …), the caller's padding as zeros.

        With only_valid, positions beyond the end of a segment are zeros too.
        """
        if self.index is None:
            taken = tensor[self.rows, :, self.positions].transpose(0, 1).to(dtype)
        else:
            assert self.valid is not None
            flat = tensor[0].transpose(0, 1).index_select(0, self.index)
            taken = flat.view(*self.valid.shape, *flat.shape[1:]).movedim(2, 0).to(dtype)
        if self.valid is None or not (self.has_padding or only_valid):
            return taken
        return taken.masked_fill(~self.valid[..., None], 0.0)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Writes (heads, segments, positions, …) back to (batch, heads, length, …), real tokens only."""
        if self.index is None:
            if self.valid is not None:
                values = values.masked_fill(~self.valid[..., None], 0.0)
            tensor[self.rows, :, self.positions] = values.transpose(0, 1)
            return
        assert self.valid is not None
        real = self.valid.flatten().nonzero().squeeze(1)
        flat = values.movedim(0, 2).flatten(0, 1).index_select(0, real).to(tensor.dtype)
        tensor[0].transpose(0, 1).index_copy_(0, self.index.index_select(0, real), flat)


@dataclass(frozen=True)
class _Block:
    """Segments that are handled together, and the pieces that their positions are cut into."""

    segments: Tensor
    pieces: tuple[_Piece, ...]


def _blocks(q: Tensor, token_mask: Tensor | None, cu_seqlens: Tensor | None, chunk_length: int) -> Iterator[_Block]:
    batch, _, length, _ = q.shape
    if cu_seqlens is not None:
        yield from _packed_blocks(token_mask, _bounds(cu_seqlens, length), chunk_length, q.device)
        return
    if length == 0:
        return
    rows_per_block = max(1, chunk_length // length)
    for first in range(0, batch, rows_per_block):
        rows = slice(first, min(first + rows_per_block, batch))
        pieces = _rectangles(rows, 0, length, token_mask, chunk_length)
        yield _Block(torch.arange(rows.start, rows.stop, device=q.device), pieces)


def _rectangles(rows: slice, start: int, stop: int, mask: Tensor | None, chunk_length: int) -> tuple[_Piece, ...]:
    step = chunk_length if rows.stop - rows.start == 1 else stop - start
    cuts = (slice(first, min(first + step, stop)) for first in range(start, stop, step))
    if mask is None:
        return tuple(_Piece(rows, cut, None, None, has_padding=False) for cut in cuts)
    return tuple(_Piece(rows, cut, None, mask[rows, cut], has_padding=True) for cut in cuts)


def _bounds(cu_seqlens: Tensor, length: int) -> list[int]:
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(start > stop for start, stop in pairwise(bounds)):
        raise ValueError(f"cu_seqlens: expected bounds that rise from 0 to the length {length}, got {bounds[:8]}…")
    return bounds


def _packed_blocks(
    token_mask: Tensor | None, bounds: list[int], chunk_length: int, device: torch.device
) -> Iterator[_Block]:
    by_length = sorted(range(len(bounds) - 1), key=lambda i: bounds[i + 1] - bounds[i], reverse=True)
    waiting = [i for i in by_length if bounds[i + 1] > bounds[i]]
    first = 0
    while first < len(waiting):
        longest = bounds[waiting[first] + 1] - bounds[waiting[first]]
        last = first + 1
        while (
            last < len(waiting)
            and (last + 1 - first) * longest <= chunk_length
            and bounds[waiting[last] + 1] - bounds[waiting[last]] >= _MIN_FILL * longest
        ):
            last += 1
        members = torch.tensor(waiting[first:last], device=device)
        if last - first == 1:
            start = bounds[waiting[first]]
            yield _Block(members, _rectangles(slice(0, 1), start, start + longest, token_mask, chunk_length))
        else:
            yield _Block(
                members, (_gathered([bounds[i : i + 2] for i in waiting[first:last]], longest, token_mask, device),)
            )
        first = last


def _gathered(segments: list[list[int]], longest: int, token_mask: Tensor | None, device: torch.device) -> _Piece:
    starts, stops = torch.tensor(segments, device=device).unsqueeze(-1).unbind(1)
    index = starts + torch.arange(longest, device=device)
    valid = index < stops
    index = torch.minimum(index, stops - 1).flatten()
    if token_mask is not None:
        valid = valid & token_mask[0][index].view(valid.shape)
    return _Piece(slice(0, 1), slice(0, 0), index, valid, has_padding=token_mask is not None)


class _Features:
    """The feature map on (heads, segments, positions, head_dim), with the buffers that its chunks share."""

    def __init__(self, q: Tensor, projection: Tensor | None, feature_map: str) -> None:
        _, heads, _, head_dim = q.shape
        self.dtype = compute_dtype(q)
        self.is_positive = feature_map == "positive"
        self.count = head_dim if projection is None else projection.shape[-2]
        self.chunk_length = max(_MIN_CHUNK_LENGTH, _CHUNK_FEATURES // (heads * self.count))
        self._rows = None
        if projection is not None:
            # Rounded once to the dtype of q, then used everywhere: all backends see the same rows.
            rows = projection.to(q.dtype).to(self.dtype) * head_dim**-0.25
            self._rows = rows.expand(heads, -1, -1)
        self._norm_scale = 0.5 * head_dim**-0.5
        self._buffers: dict[str, Tensor] = {}
        self._device = q.device

    def fold_keys(self, block: _Block, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the state (heads, segments, features, head_dim) and the key sums (heads, segments, features)."""
        heads, members, head_dim = k.shape[1], len(block.segments), k.shape[-1]
        state = torch.zeros((heads, members, self.count, head_dim), dtype=self.dtype, device=self._device)
        sums = torch.zeros_like(state[..., 0])
        maxima = torch.full_like(sums, _LOG_ZERO)
        for piece in block.pieces:
            k_piece, v_piece = piece.take(k, self.dtype), piece.take(v, self.dtype)
            k_features = (
                self._key_exponents(k_piece, piece.valid) if self.is_positive else self._relu(k_piece, piece.valid)
            )
            if self.is_positive:
                new_maxima = torch.maximum(maxima, k_features.amax(2))
                decay = torch.exp(maxima - new_maxima)
                maxima = new_maxima
                k_features.sub_(maxima.unsqueeze(2)).exp_()
                state.mul_(decay.unsqueeze(-1))
                sums.mul_(decay)
            state.flatten(0, 1).baddbmm_(k_features.flatten(0, 1).transpose(1, 2), v_piece.flatten(0, 1))
            sums.add_(k_features.sum(2))
        if not self.is_positive:
            return state, sums
        seen = sums > 0
        state.div_(torch.where(seen, sums, 1.0).unsqueeze(-1))
        # Where nothing was seen the sum is 0; a NaN compares as not seen and must stay.
        return state, torch.where(sums == 0, _LOG_ZERO, maxima + torch.log(sums))

    def read_queries(self, q: Tensor, state: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output (heads, segments, positions, head_dim) and the query sums (heads, segments, positions)."""
        if self.is_positive:
            weights = self._scores(q, "features").add_(sums.unsqueeze(2))
            maxima = weights.amax(-1, keepdim=True)
            totals = weights.sub_(maxima).exp_().sum(-1, keepdim=True)
            out = _matmul(weights, state).div_(totals)
            return out, maxima.add_(totals.log_()).squeeze(-1)
        q_features = self._relu(q, None)
        totals = _matmul(q_features, sums.unsqueeze(-1))
        # A segment without a real key has sums of zero, and then a zero numerator too.
        return _matmul(q_features, state).div_(torch.where(totals == 0, 1.0, totals)), totals.squeeze(-1)

    def pull_queries(
        self,
        q: Tensor,
        out: Tensor,
        out_grad: Tensor,
        state: Tensor,
        sums: Tensor,
        query_sums: Tensor,
        state_grad: Tensor,
    ) -> Tensor:
        """Returns the gradient of q, and adds that of the state to state_grad.

        The last column of state_grad is minus the gradient of the sums (`relu`), or the E of the backward of
        `positive`.
        """
        inner = (out_grad * out).sum(-1, keepdim=True)
        if self.is_positive:
            weights = self._scores(q, "features").add_(sums.unsqueeze(2)).sub_(query_sums).exp_()
            column = torch.full_like(sums, -1.0)
        else:
            weights = self._relu(q, None)
            divisor = torch.where(query_sums == 0, 1.0, query_sums)
            out_grad, inner = out_grad / divisor, inner / divisor
            column = -sums
        pulled = torch.cat((out_grad, inner), -1)
        landmarks = torch.cat((state, column.unsqueeze(-1)), -1)
        scores_grad = self._buffer("grads", weights.shape)
        torch.bmm(pulled.flatten(0, 1), landmarks.flatten(0, 1).transpose(1, 2), out=scores_grad.flatten(0, 1))
        state_grad.flatten(0, 1).baddbmm_(weights.flatten(0, 1).transpose(1, 2), pulled.flatten(0, 1))
        return self._project_back(self._through_map(scores_grad, weights))

    def pull_keys(
        self, k: Tensor, v: Tensor, valid: Tensor | None, sums: Tensor, state_grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradients of k and v."""
        if self.is_positive:
            weights = self._key_exponents(k, valid).sub_(sums.unsqueeze(2)).exp_()
        else:
            weights = self._relu(k, valid)
        v_grad = _matmul(weights, state_grad[..., :-1])
        scores_grad = self._buffer("grads", weights.shape)
        v_extended = torch.cat((v, torch.full_like(v[..., :1], -1.0)), -1)
        torch.bmm(v_extended.flatten(0, 1), state_grad.flatten(0, 1).transpose(1, 2), out=scores_grad.flatten(0, 1))
        self._through_map(scores_grad, weights)
        k_grad = self._project_back(scores_grad)
        if self.is_positive:
            k_grad.addcmul_(scores_grad.sum(-1, keepdim=True), k, value=-2 * self._norm_scale)
        return k_grad, v_grad

    def _through_map(self, features_grad: Tensor, features: Tensor) -> Tensor:
        """Turns the gradient of features into that of ω·x, in place."""
        if self.is_positive:
            return features_grad.mul_(features)
        return features_grad.mul_(features > RELU_OFFSET)

    def _key_exponents(self, k: Tensor, valid: Tensor | None) -> Tensor:
        exponents = self._scores(k, "features")
        exponents.sub_(k.square().sum(-1, keepdim=True).mul_(self._norm_scale))
        return exponents if valid is None else exponents.masked_fill_(~valid[..., None], -torch.inf)

    def _relu(self, x: Tensor, valid: Tensor | None) -> Tensor:
        features = self._scores(x, "features").clamp_(min=0).add_(RELU_OFFSET)
        return features if valid is None else features.masked_fill_(~valid[..., None], 0.0)

    def _scores(self, x: Tensor, name: str) -> Tensor:
        """Returns ω·x/d^¼ (heads, segments, positions, features) in a shared buffer; x itself without a projection."""
        heads, members, positions, head_dim = x.shape
        scores = self._buffer(name, torch.Size((heads, members, positions, self.count)))
        if self._rows is None:
            return scores.copy_(x)
        flat = x.reshape(heads, members * positions, head_dim)
        torch.bmm(flat, self._rows.transpose(1, 2), out=scores.flatten(1, 2))
        return scores

    def _project_back(self, scores_grad: Tensor) -> Tensor:
        if self._rows is None:
            return scores_grad.clone()
        return torch.bmm(scores_grad.flatten(1, 2), self._rows).view(*scores_grad.shape[:-1], -1)

    def _buffer(self, name: str, shape: torch.Size) -> Tensor:
        """Returns an uninitialised tensor that the next call with this name overwrites."""
        size = shape.numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=self.dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Returns a·b for two leading axes taken as one batch."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(*a.shape[:2], a.shape[2], b.shape[-1])
