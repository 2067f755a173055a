"""The gradient of the queries through exact weights of the tokens in reach, added to that of the far part."""

import triton
import triton.language as tl

from protlm.ops.cuda.device_code import (
    load_is_real,
    load_reach,
    load_rows,
    product,
    scores,
    sees,
    store_rows,
    weights_of,
)


@triton.jit
def near_query_gradients(
    q,
    k,
    v,
    out,
    out_grad,
    token_mask,
    units,
    query_sums,
    inner,
    far_grad,
    q_grad,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    out_row,
    out_head,
    out_token,
    out_grad_row,
    out_grad_head,
    out_grad_token,
    far_grad_row,
    far_grad_head,
    far_grad_token,
    q_grad_row,
    q_grad_head,
    q_grad_token,
    mask_row,
    sums_row,
    sums_head,
    before,
    after,
    factor,
    grad_factor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_OTHERS: tl.constexpr,
    TILES: tl.constexpr,
    HAS_FAR: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program takes one tile of queries of one head; writes zeros where a token is not real.

    Without a far part it also writes `inner`, the inner product of each output with its gradient; else it reads it.
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
        out_grad += segment * out_grad_row + head * out_grad_head + at * out_grad_token
        at_sums = segment * sums_row + head * sums_head + at
        queries = load_rows(q, steps[:, None] * q_token + dims[None, :], is_in, HEAD_DIM, DIM)
        pulled = load_rows(out_grad, steps[:, None] * out_grad_token + dims[None, :], is_real, HEAD_DIM, DIM)
        sums = tl.load(query_sums + at_sums + steps, mask=is_in, other=0.0)
        if HAS_FAR:
            inners = tl.load(inner + at_sums + steps, mask=is_in, other=0.0)
        else:
            out += segment * out_row + head * out_head + at * out_token
            outputs = load_rows(out, steps[:, None] * out_token + dims[None, :], is_in, HEAD_DIM, DIM)
            inners = tl.sum(pulled.to(tl.float32) * outputs.to(tl.float32), 1)
            tl.store(inner + at_sums + steps, inners, mask=is_in)
        total = tl.zeros([TILE_TOKENS, DIM], tl.float32)
        first_key = tl.maximum(low, start - before)
        stop_key = tl.minimum(high, tl.minimum(start + TILE_TOKENS, stop) + after)
        for first in range(first_key, stop_key, TILE_OTHERS):
            is_key = others < stop_key - first
            key_at = first_key.to(tl.int64) + (first - first_key)
            is_key = load_is_real(token_mask + key_at, others, is_key, HAS_MASK)
            keys = load_rows(k + key_at * k_token, others[:, None] * k_token + dims[None, :], is_key, HEAD_DIM, DIM)
            values = load_rows(v + key_at * v_token, others[:, None] * v_token + dims[None, :], is_key, HEAD_DIM, DIM)
            visible = sees(start + steps, first + others, before, after) & is_key[None, :]
            weights = weights_of(scores(queries, keys, UPCAST) * factor - sums[:, None])
            grads = tl.where(visible, weights * (scores(pulled, values, UPCAST) - inners[:, None]), 0.0)
            total = product(grads.to(keys.dtype), keys, total, UPCAST)
        total *= grad_factor
        if HAS_FAR:
            far_grad += segment * far_grad_row + head * far_grad_head + at * far_grad_token
            total += load_rows(far_grad, steps[:, None] * far_grad_token + dims[None, :], is_in, HEAD_DIM, DIM)
        total = tl.where(is_real[:, None], total, 0.0)
        q_grad += segment * q_grad_row + head * q_grad_head + at * q_grad_token
        store_rows(q_grad, steps[:, None] * q_grad_token + dims[None, :], total, is_in, HEAD_DIM, DIM)
