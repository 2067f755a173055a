"""Exact attention to near tokens in plain torch, on any device: how rows are cut so that the cost is linear.

The tokens are one long row, cut into blocks of queries. A block reads a window of keys, its own tokens and those within
reach on either side, and a mask of (block, window) says which of them each query sees. Windows are overlapping views of
one copy of the keys; nothing of (length, length) is formed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from protlm.ops.inputs import LocalInputs

_BLOCK = 64
"""Queries of a block: with few keys in reach, larger blocks compute more pairs that are masked, smaller ones make small
matrix products."""
_MOST_SCORES = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Scores that exist at a time: on a CPU they stay in its cache."""


def forward(inputs: LocalInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output, and for the backward the largest score of each query and the sum of its weights.

    Both are (heads, batch · length). Of a large score their sum as logarithms would keep only the score.
    """
    reach = _Reach(inputs.before, inputs.after)
    q, k, v = (_as_row(x, inputs) for x in (inputs.q, inputs.k, inputs.v))
    numbers = inputs.segment_numbers()
    v, is_bad = _without_bad(v)
    out = _like_tokens(v)
    dtype = inputs.compute_dtype
    maxima, sums = (q.new_empty(q.shape[:2], dtype=dtype) for _ in range(2))
    band = reach.band(q.device)
    for blocks in _cut(q, reach):
        hidden = blocks.hidden(numbers, band)
        scores = _scores(blocks, q, k, hidden, dtype)
        largest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(largest).exp_()
        totals = weights.sum(-1, keepdim=True)
        result = _product(weights, blocks.windows(v, dtype))
        if is_bad is not None:
            # Not through weights of zero, which would carry it to tokens that do not see it.
            reached = (~hidden & blocks.windows(is_bad, torch.bool).unsqueeze(2)).any(-1)
            result.masked_fill_(reached.unsqueeze(-1), torch.nan)
        blocks.put(out, result.div_(totals))
        blocks.put(maxima, largest.squeeze(-1))
        blocks.put(sums, totals.squeeze(-1))
    return _as_batch(out, inputs), maxima, sums


def backward(
    inputs: LocalInputs, out_grad: Tensor, out: Tensor, maxima: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; the weights are computed again.

    With P the weights, g the gradient of the output and D = Σ g·out of each query, the gradient of the scores is
    P·(g·v − D), as in flash attention (arXiv 2205.14135).
    """
    reach, dtype = _Reach(inputs.before, inputs.after), inputs.compute_dtype
    q, k, v, grad, out = (_as_row(x, inputs) for x in (inputs.q, inputs.k, inputs.v, out_grad, out))
    numbers = inputs.segment_numbers()
    dots = (grad.to(dtype) * out).sum(-1)
    q_grad = _like_tokens(q)
    size = q.shape[1] + reach.width + _BLOCK
    k_sums, v_sums = (q.new_zeros((len(q), size, q.shape[2]), dtype=dtype) for _ in range(2))
    band = reach.band(q.device)
    for blocks in _cut(q, reach):
        weights = _scores(blocks, q, k, blocks.hidden(numbers, band), dtype)
        weights.sub_(blocks.queries(maxima, dtype).unsqueeze(-1)).exp_()
        weights.div_(blocks.queries(sums, dtype, 1.0).unsqueeze(-1))
        grads, queries = blocks.queries(grad, dtype), blocks.queries(q, dtype)
        score_grads = _product(grads, blocks.windows(v, dtype).mT)
        score_grads.sub_(blocks.queries(dots, dtype).unsqueeze(-1)).mul_(weights)
        blocks.put(q_grad, _product(score_grads, blocks.windows(k, dtype)).mul_(_scale(q)))
        blocks.add_windows(k_sums, _product(score_grads.mT, queries).mul_(_scale(q)))
        blocks.add_windows(v_sums, _product(weights.mT, grads))
    tokens = slice(reach.before, reach.before + q.shape[1])
    k_grad, v_grad = k_sums[:, tokens].to(k.dtype), v_sums[:, tokens].to(v.dtype)
    return _as_batch(q_grad, inputs), _as_batch(k_grad, inputs), _as_batch(v_grad, inputs)


def _as_row(x: Tensor, inputs: LocalInputs) -> Tensor:
    """Returns (heads, batch · length, head_dim), zero at padding; a view where the memory allows it."""
    if inputs.token_mask is not None:
        x = x.masked_fill(~inputs.token_mask[:, None, :, None], 0.0)
    return x.transpose(0, 1).flatten(1, 2)


def _as_batch(x: Tensor, inputs: LocalInputs) -> Tensor:
    """Returns (batch, heads, length, head_dim), zero at padding."""
    batch = x.view(len(x), inputs.q.shape[0], inputs.q.shape[2], x.shape[2]).transpose(0, 1)
    return batch if inputs.token_mask is None else batch.masked_fill(~inputs.token_mask[:, None, :, None], 0.0)


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
        return self._copied(x, 0, 0, dtype, fill).view(len(x), self.count, _BLOCK, *x.shape[2:])

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
            target = sums[:, first : first + self.count * _BLOCK].view(len(sums), self.count, _BLOCK, sums.shape[2])
            target[:, :, : part.shape[2]] += part


def _cut(x: Tensor, reach: _Reach) -> Iterator[_Blocks]:
    """Yields the blocks of a row x (heads, length, …), so many at a time that their scores are few."""
    heads, length = x.shape[:2]
    most = _MOST_SCORES.get(x.device.type, _MOST_SCORES["cuda"])
    tokens = max(1, most // (heads * reach.width * _BLOCK)) * _BLOCK
    for start in range(0, length, tokens):
        yield _Blocks(start, min(start + tokens, length), reach)


def _without_bad(v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns the values, zeros for tokens that hold NaN or infinities, and a mask of these tokens (heads, length).

    The mask is None if there are no such tokens.
    """
    is_bad = ~v.isfinite().all(-1)
    # Not on a GPU, where the host would have to wait for the answer.
    if v.device.type == "cpu" and not bool(is_bad.any()):
        return v, None
    return v.masked_fill(is_bad.unsqueeze(-1), 0.0), is_bad


def _scores(blocks: _Blocks, q: Tensor, k: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns q·k/√d (heads, blocks, block, width), −∞ where a query does not see a key."""
    scores = _product(blocks.queries(q, dtype).mul_(_scale(q)), blocks.windows(k, dtype).mT)
    return scores.masked_fill_(hidden, -torch.inf)


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
