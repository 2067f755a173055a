"""The gradients of keys and values through exact weights of the queries in reach, added to those of the far part."""

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
def near_key_gradients(
    q,
    k,
    v,
    out_grad,
    token_mask,
    units,
    query_sums,
    inner,
    far_k_grad,
    far_v_grad,
    k_grad,
    v_grad,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    out_grad_row,
    out_grad_head,
    out_grad_token,
    far_k_grad_row,
    far_k_grad_head,
    far_k_grad_token,
    far_v_grad_row,
    far_v_grad_head,
    far_v_grad_token,
    k_grad_row,
    k_grad_head,
    k_grad_token,
    v_grad_row,
    v_grad_head,
    v_grad_token,
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
    """One program takes one tile of keys of one head; writes zeros where a token is not real.

    `before` and `after` are those of the queries, which see a key from the other side.
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
        q += segment * q_row + head * q_head
        k += segment * k_row + head * k_head + at * k_token
        v += segment * v_row + head * v_head + at * v_token
        out_grad += segment * out_grad_row + head * out_grad_head
        query_sums += segment * sums_row + head * sums_head
        inner += segment * sums_row + head * sums_head
        keys = load_rows(k, steps[:, None] * k_token + dims[None, :], is_real, HEAD_DIM, DIM)
        values = load_rows(v, steps[:, None] * v_token + dims[None, :], is_real, HEAD_DIM, DIM)
        of_keys = tl.zeros([TILE_TOKENS, DIM], tl.float32)
        of_values = tl.zeros([TILE_TOKENS, DIM], tl.float32)
        first_query = tl.maximum(low, start - after)
        stop_query = tl.minimum(high, tl.minimum(start + TILE_TOKENS, stop) + before)
        for first in range(first_query, stop_query, TILE_OTHERS):
            is_query = others < stop_query - first
            query_at = first_query.to(tl.int64) + (first - first_query)
            is_query = load_is_real(token_mask + query_at, others, is_query, HAS_MASK)
            queries = load_rows(
                q + query_at * q_token, others[:, None] * q_token + dims[None, :], is_query, HEAD_DIM, DIM
            )
            pulled = load_rows(
                out_grad + query_at * out_grad_token, others[:, None] * out_grad_token + dims[None, :], is_query,
                HEAD_DIM, DIM,
            )  # fmt: skip
            sums = tl.load(query_sums + query_at + others, mask=is_query, other=0.0)
            inners = tl.load(inner + query_at + others, mask=is_query, other=0.0)
            visible = sees(start + steps, first + others, after, before) & is_query[None, :]
            weights = weights_of(scores(keys, queries, UPCAST) * factor - sums[None, :])
            weights = tl.where(visible, weights, 0.0)
            grads = tl.where(visible, weights * (scores(values, pulled, UPCAST) - inners[None, :]), 0.0)
            of_values = product(weights.to(pulled.dtype), pulled, of_values, UPCAST)
            of_keys = product(grads.to(queries.dtype), queries, of_keys, UPCAST)
        of_keys *= grad_factor
        if HAS_FAR:
            far_k_grad += segment * far_k_grad_row + head * far_k_grad_head + at * far_k_grad_token
            far_v_grad += segment * far_v_grad_row + head * far_v_grad_head + at * far_v_grad_token
            of_keys += load_rows(far_k_grad, steps[:, None] * far_k_grad_token + dims[None, :], is_in, HEAD_DIM, DIM)
            of_values += load_rows(far_v_grad, steps[:, None] * far_v_grad_token + dims[None, :], is_in, HEAD_DIM, DIM)
        of_keys = tl.where(is_real[:, None], of_keys, 0.0)
        of_values = tl.where(is_real[:, None], of_values, 0.0)
        k_grad += segment * k_grad_row + head * k_grad_head + at * k_grad_token
        v_grad += segment * v_grad_row + head * v_grad_head + at * v_grad_token
        store_rows(k_grad, steps[:, None] * k_grad_token + dims[None, :], of_keys, is_in, HEAD_DIM, DIM)
        store_rows(v_grad, steps[:, None] * v_grad_token + dims[None, :], of_values, is_in, HEAD_DIM, DIM)
