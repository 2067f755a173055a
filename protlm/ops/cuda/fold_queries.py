"""Folds the queries of a unit into a state, which keys read as queries read that of the keys.

Its values are the gradients of the outputs, and their inner products with the outputs: a mean of both for each feature.
"""

import triton
import triton.language as tl

from protlm.ops.cuda.device_code import (
    LOG_ZERO,
    finished,
    half_squares,
    load_is_real,
    load_rows,
    load_unit,
    product,
    relu_features,
    risen_weights,
    scale_of,
    scores,
)


@triton.jit
def fold_queries(
    q,
    out_grad,
    token_mask,
    projection,
    scales,
    constants,
    units,
    query_sums,
    inner,
    means,
    references,
    inners,
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
    norm_factor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    TILE_FEATURES: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    IS_EXPONENTIAL: tl.constexpr,
    IS_ABSOLUTE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_CONSTANTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program folds one unit into one tile of features of one head.

    The weight of a query is its feature divided by its normaliser. Writes means (units, heads, PADDED, DIM),
    references (units, heads, PADDED): log2 of the sum of weights, for `relu` the sum, and inners of the same shape.
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
        at = start.to(tl.int64)
        q += segment * q_row + head * q_head + at * q_token
        out_grad += segment * out_grad_row + head * out_grad_head + at * out_grad_token
        token_mask += segment * mask_row + at
        query_sums += segment * sums_row + head * sums_head + at
        inner += segment * sums_row + head * sums_head + at
        q_offsets = steps[:, None] * q_token + dims[None, :]
        out_grad_offsets = steps[:, None] * out_grad_token + dims[None, :]
        if HAS_CONSTANTS:
            bias = tl.load(constants + (segment * HEADS + head) * PADDED + features)
        largest = tl.full([TILE_FEATURES], LOG_ZERO, tl.float32)
        sums = tl.zeros([TILE_FEATURES], tl.float32)
        of_inners = tl.zeros([TILE_FEATURES], tl.float32)
        context = tl.zeros([TILE_FEATURES, DIM], tl.float32)
        for first in range(start, stop, TILE_TOKENS):
            is_in = steps < stop - first
            is_real = load_is_real(token_mask, steps, is_in, HAS_MASK)
            queries = load_rows(q, q_offsets, is_in, HEAD_DIM, DIM)
            pulled = load_rows(out_grad, out_grad_offsets, is_real, HEAD_DIM, DIM)
            normalisers = tl.load(query_sums + steps, mask=is_in, other=0.0)
            inners_of_tile = tl.load(inner + steps, mask=is_in, other=0.0)
            exponents = scores(rows, queries, UPCAST) * factor
            if IS_EXPONENTIAL:
                if HAS_CONSTANTS:
                    exponents += bias[:, None]
                if IS_ABSOLUTE:
                    normalisers += half_squares(queries, is_in, norm_factor)
                exponents = tl.where(is_real[None, :], exponents - normalisers[None, :], float("-inf"))
                largest, weights, shrink = risen_weights(exponents, largest)
                sums *= shrink
                of_inners *= shrink
                context *= shrink[:, None]
            else:
                is_counted = is_real & (normalisers != 0)
                inverse = tl.where(is_counted, 1.0 / tl.where(is_counted, normalisers, 1.0), 0.0)
                weights = tl.where(is_real[None, :], relu_features(exponents) * inverse[None, :], 0.0)
            sums += tl.sum(weights, 1)
            of_inners += tl.sum(weights * inners_of_tile[None, :], 1)
            context = product(weights.to(pulled.dtype), pulled, context, UPCAST)
            q += TILE_TOKENS * q_token
            out_grad += TILE_TOKENS * out_grad_token
            token_mask += TILE_TOKENS
            query_sums += TILE_TOKENS
            inner += TILE_TOKENS
        is_empty = (sums == 0) | (features >= FEATURES)
        of_inners = tl.where(is_empty, 0.0, of_inners / tl.where(is_empty, 1.0, sums))
        state, sums = finished(largest, sums, context, is_empty, IS_EXPONENTIAL)
        tl.store(means + place * (PADDED * DIM) + features[:, None] * DIM + dims[None, :], state)
        tl.store(references + place * PADDED + features, sums)
        tl.store(inners + place * PADDED + features, of_inners)
