"""Exact softmax attention to near tokens: hides how packed rows are cut, so that time and memory are linear in length.

The tokens are one long row, cut into blocks of queries. A block reads a window of keys, its own tokens and those within
reach on either side, and a mask of (block, window) says which of them each query sees. Windows are overlapping views of
one copy of the keys; nothing of (length, length) is formed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from protlm.ops.blocks import read_bounds
from protlm.ops.inputs import AttentionInputs, in_one_dtype

_BLOCK = 64
"""Queries of a block: with few keys in reach, larger blocks compute more pairs that are masked, smaller ones make small
matrix products."""
_MOST_SCORES = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Scores that exist at a time: on a CPU they stay in its cache."""


def local_attention(
    q: Float[Tensor, "batch heads length head_dim"],
    k: Float[Tensor, "batch heads length head_dim"],
    v: Float[Tensor, "batch heads length head_dim"],
    *,
    window: int,
    token_mask: Bool[Tensor, "batch length"] | None = None,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "batch heads length head_dim"]:
    """Returns exact softmax attention of every token to the tokens at most `window` away, in its segment.

    The weights are softmax(q·k/√d) over these tokens. Scores and sums are float32, for float64 inputs float64, also
    under autocast. Gradients flow to q, k and v, once; the backward recomputes the scores.

    Cost per head: time O(length · window · head_dim), memory O(length · head_dim) and a bounded number of scores.

    Args:
        q: Queries, any strides.
        k: Keys.
        v: Values. Under autocast q, k and v may differ in dtype; the longest is then taken.
        window: Tokens on either side that a token sees, at least 1.
        token_mask: True at real tokens. Padding may hold any finite value: it changes no real output, gets no gradient,
            and its own output is zero.
        cu_seqlens: int32 bounds 0 = b₀ ≤ b₁ ≤ … = length of the segments packed into the row (batch = 1), with no
            attention across them. None makes each row one segment.
        causal: A token sees itself and earlier tokens alone.

    Returns:
        Shape and dtype of v. NaN in a real token propagates.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: An argument does not fit.
    """
    given = v
    q, k, v = in_one_dtype(q, k, v)
    # Checked like the inputs of a map that needs no projection.
    AttentionInputs(q, k, v, None, token_mask, cu_seqlens, None, "relu", causal).check()
    if window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    numbers = _segment_numbers(q, token_mask, cu_seqlens)
    reach = _Reach(window, 0 if causal else window)
    padding = None if token_mask is None else ~token_mask[:, None, :, None]
    rows = (_as_row(x if padding is None else x.masked_fill(padding, 0.0)) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        row: Tensor = _LocalAttention.apply(*rows, numbers, reach)  # type: ignore[no-untyped-call]
    out = row.unflatten(1, (q.shape[0], q.shape[2])).transpose(0, 1).to(given.dtype)
    return out if padding is None else out.masked_fill(padding, 0.0)


def _as_row(x: Tensor) -> Tensor:
    """Returns (heads, batch · length, head_dim), a view where the memory allows it."""
    return x.transpose(0, 1).flatten(1, 2)


def _segment_numbers(q: Tensor, token_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Returns the number of every token's segment, int32 (batch · length,); −1 for padding."""
    batch, _, length, _ = q.shape
    if cu_seqlens is None:
        numbers = torch.arange(batch, dtype=torch.int32, device=q.device).repeat_interleave(length)
    else:
        read_bounds(cu_seqlens, length)
        places = torch.arange(length, dtype=torch.int32, device=q.device)
        numbers = torch.searchsorted(cu_seqlens, places, right=True, out_int32=True)
    return numbers if token_mask is None else numbers.masked_fill(~token_mask.flatten(), -1)


@dataclass(frozen=True)
class _Reach:
    """How many tokens before and after itself a token sees."""

    before: int
    after: int

    @property
    def width(self) -> int:
        """Keys of the window of a block."""
        return _BLOCK + self.before + self.after

    def band(self, device: torch.device) -> Tensor:
        """Returns True where a query of a block reaches a key of its window (block, width)."""
        queries = torch.arange(_BLOCK, device=device).unsqueeze(1) + self.before
        distances = torch.arange(self.width, device=device) - queries
        return (distances >= -self.before) & (distances <= self.after)


@dataclass(frozen=True)
class _Blocks:
    """Neighbouring blocks of a row that are computed together."""

    start: int
    stop: int
    reach: _Reach

    @property
    def count(self) -> int:
        """Number of blocks; the last one may reach beyond the row."""
        return -((self.start - self.stop) // _BLOCK)

    def queries(self, x: Tensor, dtype: torch.dtype, fill: float = 0) -> Tensor:
        """Returns (heads, blocks, block, …) of x (heads, length, …)."""
        return self._copied(x, 0, 0, dtype, fill).unflatten(1, (self.count, _BLOCK))

    def windows(self, x: Tensor, dtype: torch.dtype, fill: float = 0) -> Tensor:
        """Returns (heads, blocks, width, …) of x (heads, length, …): overlapping views of one copy."""
        copied = self._copied(x, self.reach.before, self.reach.after, dtype, fill)
        heads, size, *rest = copied.shape
        step = copied.stride(1)
        return copied.as_strided(
            (heads, self.count, self.reach.width, *rest), (size * step, _BLOCK * step, *copied.stride()[1:])
        )

    def _copied(self, x: Tensor, before: int, after: int, dtype: torch.dtype, fill: float) -> Tensor:
        heads, length, *rest = x.shape
        first, size = self.start - before, self.count * _BLOCK + before + after
        copied = x.new_full((heads, size, *rest), fill, dtype=dtype)
        low, high = max(first, 0), min(first + size, length)
        copied[:, low - first : high - first] = x[:, low:high]
        return copied

    def hidden(self, numbers: Tensor, band: Tensor) -> Tensor:
        """Returns True where a query does not see a key (blocks, block, width)."""
        # What lies beyond the row counts as padding. Padding sees padding, lest a row of weights has no sum.
        rows = numbers.unsqueeze(0)
        queries, keys = self.queries(rows, numbers.dtype, -1)[0], self.windows(rows, numbers.dtype, -1)[0]
        return (queries.unsqueeze(2) != keys.unsqueeze(1)) | ~band

    def put(self, out: Tensor, values: Tensor) -> None:
        """Writes (heads, blocks, block, …) to out (heads, length, …)."""
        out[:, self.start : self.stop] = values.flatten(1, 2)[:, : self.stop - self.start]

    def add_windows(self, sums: Tensor, values: Tensor) -> None:
        """Adds (heads, blocks, width, head_dim) to sums, which begin `reach.before` tokens before the row."""
        for offset in range(0, self.reach.width, _BLOCK):
            part = values[:, :, offset : offset + _BLOCK]
            first = self.start + offset
            target = sums[:, first : first + self.count * _BLOCK].unflatten(1, (self.count, _BLOCK))
            target[:, :, : part.shape[2]] += part


def _cut(x: Tensor, reach: _Reach) -> Iterator[_Blocks]:
    """Yields the blocks of a row x (heads, length, …), so many at a time that their scores are few."""
    heads, length = x.shape[:2]
    most = _MOST_SCORES.get(x.device.type, _MOST_SCORES["cuda"])
    tokens = max(1, most // (heads * reach.width * _BLOCK)) * _BLOCK
    for start in range(0, length, tokens):
        yield _Blocks(start, min(start + tokens, length), reach)


class _LocalAttention(torch.autograd.Function):
    """The attention of one row, (heads, length, head_dim), with a backward that recomputes the weights.

    With P the weights, g the gradient of the output and D = Σ g·out of each query: the gradient of the scores is
    P·(g·v − D), as in flash attention (arXiv 2205.14135).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, reach: _Reach) -> Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = _like_tokens(v)
        log_sums = q.new_empty(q.shape[:2], dtype=dtype)
        band = reach.band(q.device)
        for blocks in _cut(q, reach):
            scores = _scores(blocks, q, k, numbers, band, dtype)
            largest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(largest).exp_()
            totals = weights.sum(-1, keepdim=True)
            blocks.put(out, _product(weights, blocks.windows(v, dtype)).div_(totals))
            blocks.put(log_sums, totals.log_().add_(largest).squeeze(-1))
        ctx.save_for_backward(q, k, v, numbers, out, log_sums)
        ctx.reach = reach
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, numbers, out, log_sums = ctx.saved_tensors
        reach, dtype = ctx.reach, log_sums.dtype
        dots = (grad.to(dtype) * out).sum(-1)
        q_grad = _like_tokens(q)
        size = q.shape[1] + reach.width + _BLOCK
        k_sums, v_sums = (q.new_zeros((len(q), size, q.shape[2]), dtype=dtype) for _ in range(2))
        band = reach.band(q.device)
        for blocks in _cut(q, reach):
            weights = _scores(blocks, q, k, numbers, band, dtype)
            weights.sub_(blocks.queries(log_sums, dtype).unsqueeze(-1)).exp_()
            grads = blocks.queries(grad, dtype)
            keys, queries = blocks.windows(k, dtype), blocks.queries(q, dtype)
            score_grads = _product(grads, blocks.windows(v, dtype).mT)
            score_grads.sub_(blocks.queries(dots, dtype).unsqueeze(-1)).mul_(weights)
            blocks.put(q_grad, _product(score_grads, keys).mul_(_scale(q)))
            blocks.add_windows(k_sums, _product(score_grads.mT, queries).mul_(_scale(q)))
            blocks.add_windows(v_sums, _product(weights.mT, grads))
        tokens = slice(reach.before, reach.before + q.shape[1])
        return q_grad, k_sums[:, tokens].to(k.dtype), v_sums[:, tokens].to(v.dtype), None, None


def _scores(blocks: _Blocks, q: Tensor, k: Tensor, numbers: Tensor, band: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns q·k/√d (heads, blocks, block, width), −∞ where a query does not see a key."""
    scores = _product(blocks.queries(q, dtype).mul_(_scale(q)), blocks.windows(k, dtype).mT)
    return scores.masked_fill_(blocks.hidden(numbers, band), -torch.inf)


def _scale(q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a·b for each head and block; the overlapping windows of a head are multiplied without a copy."""
    out = a.new_empty((*a.shape[:3], b.shape[3]))
    for head in range(len(a)):
        torch.bmm(a[head], b[head], out=out[head])
    return out


def _like_tokens(x: Tensor) -> Tensor:
    """Returns an empty (heads, length, head_dim) whose memory has the heads of a token side by side."""
    heads, length, head_dim = x.shape
    return x.new_empty((length, heads, head_dim)).transpose(0, 1)
