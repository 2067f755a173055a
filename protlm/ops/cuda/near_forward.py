"""Exact attention to the tokens in reach of a unit, merged with a far part, if one was computed before.

Scores stay on the chip, as in flash attention (arXiv 2205.14135).
"""

import triton
import triton.language as tl

from protlm.ops.cuda.device_code import (
    LOG_ZERO,
    add_bad_values,
    half_squares,
    load_is_real,
    load_reach,
    load_rows,
    product,
    risen_weights,
    scores,
    sees,
    store_rows,
    without_bad_values,
)


@triton.jit
def near_forward(
    q,
    k,
    v,
    token_mask,
    units,
    far,
    far_sums,
    out,
    query_sums,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    far_row,
    far_head,
    far_token,
    out_row,
    out_head,
    out_token,
    mask_row,
    sums_row,
    sums_head,
    before,
    after,
    factor,
    norm_factor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_OTHERS: tl.constexpr,
    TILES: tl.constexpr,
    HAS_FAR: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program takes one tile of queries of one head, and all keys in reach, `before` to `after` a query.

    `far` and `far_sums` are those of `read_state` with the constants of absolute weights. Writes out, zero where a
    token is not real, and query_sums: log2 of the absolute normaliser.
    """
    place = tl.program_id(0).to(tl.int64) // TILES
    unit, head = place // HEADS, place % HEADS
    segment, start, stop, low, high = load_reach(units, unit)
    start += tl.program_id(0) % TILES * TILE_TOKENS
    if start < stop:
        steps = tl.arange(0, TILE_TOKENS)
        others = tl.arange(0, TILE_OTHERS)
        dims = tl.arange(0, DIM)
        is_in = steps < stop - start
        at = start.to(tl.int64)
        token_mask += segment * mask_row
        is_real = load_is_real(token_mask + at, steps, is_in, HAS_MASK)
        q += segment * q_row + head * q_head + at * q_token
        k += segment * k_row + head * k_head
        v += segment * v_row + head * v_head
        at_sums = segment * sums_row + head * sums_head + at
        queries = load_rows(q, steps[:, None] * q_token + dims[None, :], is_in, HEAD_DIM, DIM)
        if HAS_FAR:
            far += segment * far_row + head * far_head + at * far_token
            total = load_rows(far, steps[:, None] * far_token + dims[None, :], is_in, HEAD_DIM, DIM)
            largest = tl.load(far_sums + at_sums + steps, mask=is_in, other=0.0)
            largest -= tl.where(is_in, half_squares(queries, is_in, norm_factor), 0.0)
            sums = tl.full([TILE_TOKENS], 1.0, tl.float32)
        else:
            total = tl.zeros([TILE_TOKENS, DIM], tl.float32)
            largest = tl.full([TILE_TOKENS], LOG_ZERO, tl.float32)
            sums = tl.zeros([TILE_TOKENS], tl.float32)
        first_key = tl.maximum(low, start - before)
        stop_key = tl.minimum(high, tl.minimum(start + TILE_TOKENS, stop) + after)
        for first in range(first_key, stop_key, TILE_OTHERS):
            is_key = others < stop_key - first
            key_at = first_key.to(tl.int64) + (first - first_key)
            is_key = load_is_real(token_mask + key_at, others, is_key, HAS_MASK)
            keys = load_rows(k + key_at * k_token, others[:, None] * k_token + dims[None, :], is_key, HEAD_DIM, DIM)
            values = load_rows(v + key_at * v_token, others[:, None] * v_token + dims[None, :], is_key, HEAD_DIM, DIM)
            visible = sees(start + steps, first + others, before, after) & is_key[None, :]
            exponents = tl.where(visible, scores(queries, keys, UPCAST) * factor, float("-inf"))
            largest, weights, shrink = risen_weights(exponents, largest)
            sums = sums * shrink + tl.sum(weights, 1)
            total *= shrink[:, None]
            if IS_CAUSAL:
                # Zero times a later value must be zero, whatever that is.
                total = add_bad_values(total, values, visible)
                values = without_bad_values(values)
            total = product(weights.to(values.dtype), values, total, UPCAST)
        divisors = tl.where(sums == 0, 1.0, sums)
        total = tl.where(is_real[:, None], total / divisors[:, None], 0.0)
        out += segment * out_row + head * out_head + at * out_token
        store_rows(out, steps[:, None] * out_token + dims[None, :], total, is_in, HEAD_DIM, DIM)
        tl.store(query_sums + at_sums + steps, largest + tl.math.log2(divisors), mask=is_in)
