"""The output of causal FAVOR for the queries of a unit: the tokens of the unit, merged with the state of earlier units.

Keys of the unit that stand before a tile of queries are seen by all of them: their features are relative to their own
largest ones. Between the tokens of the tile itself every pair is computed by itself, as one reference for several
queries could come from a token that some of them do not see.
"""

import triton
import triton.language as tl

from protlm.ops.cuda.device_code import (
    LOG_ZERO,
    add_bad_values,
    half_squares,
    key_features_of,
    load_is_real,
    load_rows,
    load_unit,
    product,
    relu_features,
    risen_weights,
    scale_of,
    scores,
    sees,
    store_rows,
    without_bad_values,
)


@triton.jit
def triangle_forward(
    q,
    k,
    v,
    token_mask,
    projection,
    scales,
    constants,
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
    TILE_OTHERS: tl.constexpr,
    TILES: tl.constexpr,
    IS_EXPONENTIAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_CONSTANTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program takes one tile of queries of one head.

    `far` and `far_sums` are those of `read_state` with the state of the units before. Writes out, zero where a token is
    not real, and query_sums: log2 Σ φ(q)·φ(k), for `relu` the sum.
    """
    place = tl.program_id(0).to(tl.int64) // TILES
    unit, head = place // HEADS, place % HEADS
    segment, begin, stop = load_unit(units, unit)
    start = begin + tl.program_id(0) % TILES * TILE_TOKENS
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
        far += segment * far_row + head * far_head + at * far_token
        at_sums = segment * sums_row + head * sums_head + at
        factor *= scale_of(scales, segment, head, HEADS, HAS_SCALES)
        projection += head * projection_head
        constants += (segment * HEADS + head) * PADDED
        queries = load_rows(q, steps[:, None] * q_token + dims[None, :], is_in, HEAD_DIM, DIM)
        total = load_rows(far, steps[:, None] * far_token + dims[None, :], is_in, HEAD_DIM, DIM)
        sums = tl.load(far_sums + at_sums + steps, mask=is_in, other=0.0)
        if IS_EXPONENTIAL:
            largest = sums
            sums = tl.full([TILE_TOKENS], 1.0, tl.float32)
        else:
            largest = tl.full([TILE_TOKENS], LOG_ZERO, tl.float32)
            total *= sums[:, None]
        for first in range(begin, start, TILE_OTHERS):
            key_at = begin.to(tl.int64) + (first - begin)
            is_key = load_is_real(token_mask + key_at, others, others < start - first, HAS_MASK)
            keys = load_rows(k + key_at * k_token, others[:, None] * k_token + dims[None, :], is_key, HEAD_DIM, DIM)
            values = load_rows(v + key_at * v_token, others[:, None] * v_token + dims[None, :], is_key, HEAD_DIM, DIM)
            offset = tl.full([TILE_TOKENS], LOG_ZERO, tl.float32)
            products = tl.zeros([TILE_TOKENS, TILE_OTHERS], tl.float32)
            squares = half_squares(keys, is_key, norm_factor)
            for feature in range(0, PADDED, TILE_FEATURES):
                features = feature + tl.arange(0, TILE_FEATURES)
                rows = tl.load(projection + features[:, None] * DIM + dims[None, :])
                key_features, reference = key_features_of(
                    scores(keys, rows, UPCAST) * factor, squares, is_key, IS_EXPONENTIAL
                )
                exponents = scores(queries, rows, UPCAST) * factor
                if IS_EXPONENTIAL:
                    if HAS_CONSTANTS:
                        reference += tl.load(constants + features)
                    exponents = tl.where((features < FEATURES)[None, :], exponents + reference[None, :], float("-inf"))
                    offset, query_features, shrink = risen_weights(exponents, offset)
                    products *= shrink[:, None]
                else:
                    query_features = tl.where((features < FEATURES)[None, :], relu_features(exponents), 0.0)
                key_features = tl.trans(key_features.to(keys.dtype))
                products = product(query_features.to(keys.dtype), key_features, products, UPCAST)
            if IS_EXPONENTIAL:
                risen = tl.maximum(largest, offset)
                shrink = tl.math.exp2(largest - risen)
                products *= tl.math.exp2(offset - risen)[:, None]
                largest = risen
                sums *= shrink
                total *= shrink[:, None]
            sums += tl.sum(products, 1)
            total = product(products.to(values.dtype), values, total, UPCAST)
        k += at * k_token
        v += at * v_token
        keys = load_rows(k, steps[:, None] * k_token + dims[None, :], is_real, HEAD_DIM, DIM)
        values = load_rows(v, steps[:, None] * v_token + dims[None, :], is_real, HEAD_DIM, DIM)
        visible = sees(steps, steps, TILE_TOKENS, 0) & is_real[None, :]
        offsets = tl.full([TILE_TOKENS, TILE_TOKENS], LOG_ZERO, tl.float32)
        products = tl.zeros([TILE_TOKENS, TILE_TOKENS], tl.float32)
        squares = half_squares(keys, is_real, norm_factor)
        for feature in range(0, PADDED, TILE_FEATURES):
            features = feature + tl.arange(0, TILE_FEATURES)
            rows = tl.load(projection + features[:, None] * DIM + dims[None, :])
            exponents = scores(queries, rows, UPCAST) * factor
            key_exponents = scores(keys, rows, UPCAST) * factor
            if IS_EXPONENTIAL:
                if HAS_CONSTANTS:
                    exponents += tl.load(constants + features)[None, :]
                exponents = tl.where((features < FEATURES)[None, :], exponents, float("-inf"))
                pairs = exponents[:, None, :] + (key_exponents - squares[:, None])[None, :, :]
                risen = tl.maximum(offsets, tl.max(pairs, 2))
                shrink = tl.math.exp2(offsets - risen)
                products = products * shrink + tl.sum(tl.math.exp2(pairs - risen[:, :, None]), 2)
                offsets = risen
            else:
                query_features = tl.where((features < FEATURES)[None, :], relu_features(exponents), 0.0)
                key_features = tl.trans(relu_features(key_exponents).to(keys.dtype))
                products = product(query_features.to(keys.dtype), key_features, products, UPCAST)
        if IS_EXPONENTIAL:
            exponents = offsets + tl.math.log2(tl.where(products == 0, 1.0, products))
            exponents = tl.where(visible, exponents, float("-inf"))
            largest, weights, shrink = risen_weights(exponents, largest)
            sums *= shrink
            total *= shrink[:, None]
        else:
            weights = tl.where(visible, products, 0.0)
        sums += tl.sum(weights, 1)
        # Zero times a later value must be zero, whatever that is.
        total = add_bad_values(total, values, visible)
        total = product(weights.to(values.dtype), without_bad_values(values), total, UPCAST)
        divisors = tl.where(sums == 0, 1.0, sums)
        total = tl.where(is_real[:, None], total / divisors[:, None], 0.0)
        out += segment * out_row + head * out_head + at * out_token
        store_rows(out, steps[:, None] * out_token + dims[None, :], total, is_in, HEAD_DIM, DIM)
        if IS_EXPONENTIAL:
            sums = largest + tl.math.log2(divisors)
        tl.store(query_sums + at_sums + steps, sums, mask=is_in)
