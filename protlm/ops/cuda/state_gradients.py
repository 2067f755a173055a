"""The contribution of a unit's queries to the gradient of the state: Σ over queries of weights ⊗ [out_grad, inner]."""

import triton
import triton.language as tl

from protlm.ops.cuda.device_code import (
    biases_of,
    load_is_real,
    load_rows,
    load_unit,
    product,
    query_weights,
    scale_of,
    scores,
)


@triton.jit
def state_gradients(
    q,
    out_grad,
    token_mask,
    projection,
    scales,
    constants,
    units,
    references,
    query_sums,
    inner,
    mean_grads,
    sum_grads,
    q_row,
    q_head,
    q_token,
    out_grad_row,
    out_grad_head,
    out_grad_token,
    mask_row,
    sums_row,
    sums_head,
    projection_head,
    factor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TILE_FEATURES: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    IS_EXPONENTIAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_CONSTANTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program takes one unit and one tile of features of one head.

    Writes mean_grads (units, heads, PADDED, DIM) and sum_grads (units, heads, PADDED) in float32.
    """
    BLOCKS: tl.constexpr = PADDED // TILE_FEATURES
    place = tl.program_id(0).to(tl.int64) // BLOCKS
    unit, head = place // HEADS, place % HEADS
    segment, start, stop = load_unit(units, unit)
    if start < stop:
        features = tl.program_id(0) % BLOCKS * TILE_FEATURES + tl.arange(0, TILE_FEATURES)
        dims = tl.arange(0, DIM)
        steps = tl.arange(0, TILE_TOKENS)
        factor *= scale_of(scales, segment, head, HEADS, HAS_SCALES)
        rows = tl.load(projection + head * projection_head + features[:, None] * DIM + dims[None, :])
        bias = biases_of(references, constants, segment, segment, head, features, HEADS, PADDED, HAS_CONSTANTS)
        at = start.to(tl.int64)
        q += segment * q_row + head * q_head + at * q_token
        out_grad += segment * out_grad_row + head * out_grad_head + at * out_grad_token
        token_mask += segment * mask_row + at
        query_sums += segment * sums_row + head * sums_head + at
        inner += segment * sums_row + head * sums_head + at
        q_offsets = steps[:, None] * q_token + dims[None, :]
        out_grad_offsets = steps[:, None] * out_grad_token + dims[None, :]
        of_sums = tl.zeros([TILE_FEATURES], tl.float32)
        of_means = tl.zeros([TILE_FEATURES, DIM], tl.float32)
        for first in range(start, stop, TILE_TOKENS):
            is_in = steps < stop - first
            is_real = load_is_real(token_mask, steps, is_in, HAS_MASK)
            queries = load_rows(q, q_offsets, is_in, HEAD_DIM, DIM)
            pulled = load_rows(out_grad, out_grad_offsets, is_real, HEAD_DIM, DIM)
            sums = tl.load(query_sums + steps, mask=is_in, other=float("inf"))
            inners = tl.load(inner + steps, mask=is_in, other=0.0)
            exponents = scores(rows, queries, UPCAST) * factor
            weights, _ = query_weights(exponents, bias, sums, is_real, IS_EXPONENTIAL, HAS_MASK)
            of_sums += tl.sum(weights * inners[None, :], 1)
            of_means = product(weights.to(pulled.dtype), pulled, of_means, UPCAST)
            q += TILE_TOKENS * q_token
            out_grad += TILE_TOKENS * out_grad_token
            token_mask += TILE_TOKENS
            query_sums += TILE_TOKENS
            inner += TILE_TOKENS
        tl.store(mean_grads + place * (PADDED * DIM) + features[:, None] * DIM + dims[None, :], of_means)
        tl.store(sum_grads + place * PADDED + features, of_sums)
