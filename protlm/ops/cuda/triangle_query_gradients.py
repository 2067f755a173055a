"""The gradient of queries through causal FAVOR inside a unit, added to that through the state of the units before."""

import triton
import triton.language as tl

from protlm.ops.cuda.device_code import (
    half_squares,
    key_features_of,
    load_is_real,
    load_rows,
    load_unit,
    product,
    relu_features,
    relu_gradient,
    scale_of,
    scores,
    sees,
    store_rows,
    weights_of,
)


@triton.jit
def triangle_query_gradients(
    q,
    k,
    v,
    out_grad,
    token_mask,
    projection,
    scales,
    constants,
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
    projection_head,
    factor,
    norm_factor,
    grad_factor,
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
    """One program takes one tile of queries of one head; writes zeros where a token is not real."""
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
        out_grad += segment * out_grad_row + head * out_grad_head + at * out_grad_token
        far_grad += segment * far_grad_row + head * far_grad_head + at * far_grad_token
        at_sums = segment * sums_row + head * sums_head + at
        scale = scale_of(scales, segment, head, HEADS, HAS_SCALES)
        factor *= scale
        projection += head * projection_head
        constants += (segment * HEADS + head) * PADDED
        queries = load_rows(q, steps[:, None] * q_token + dims[None, :], is_in, HEAD_DIM, DIM)
        pulled = load_rows(out_grad, steps[:, None] * out_grad_token + dims[None, :], is_real, HEAD_DIM, DIM)
        inners = tl.load(inner + at_sums + steps, mask=is_in, other=0.0)
        sums = tl.load(query_sums + at_sums + steps, mask=is_in, other=0.0)
        if not IS_EXPONENTIAL:
            sums = tl.where(sums == 0, 0.0, 1.0 / tl.where(sums == 0, 1.0, sums))
        total = tl.zeros([TILE_TOKENS, DIM], tl.float32)
        for first in range(begin, start, TILE_OTHERS):
            key_at = begin.to(tl.int64) + (first - begin)
            is_key = load_is_real(token_mask + key_at, others, others < start - first, HAS_MASK)
            keys = load_rows(k + key_at * k_token, others[:, None] * k_token + dims[None, :], is_key, HEAD_DIM, DIM)
            values = load_rows(v + key_at * v_token, others[:, None] * v_token + dims[None, :], is_key, HEAD_DIM, DIM)
            pulls = tl.where(is_key[None, :], scores(pulled, values, UPCAST) - inners[:, None], 0.0)
            squares = half_squares(keys, is_key, norm_factor)
            for feature in range(0, PADDED, TILE_FEATURES):
                features = feature + tl.arange(0, TILE_FEATURES)
                rows = tl.load(projection + features[:, None] * DIM + dims[None, :])
                key_features, reference = key_features_of(
                    scores(keys, rows, UPCAST) * factor, squares, is_key, IS_EXPONENTIAL
                )
                exponents = scores(queries, rows, UPCAST) * factor
                zeros = tl.zeros([TILE_TOKENS, TILE_FEATURES], tl.float32)
                grads = product(pulls.to(keys.dtype), key_features.to(keys.dtype), zeros, UPCAST)
                if IS_EXPONENTIAL:
                    if HAS_CONSTANTS:
                        reference += tl.load(constants + features)
                    grads *= weights_of(exponents + reference[None, :] - sums[:, None])
                else:
                    grads = relu_gradient(exponents, grads * sums[:, None])
                grads = tl.where((features < FEATURES)[None, :], grads, 0.0)
                total = product(grads.to(rows.dtype), rows, total, UPCAST)
        k += at * k_token
        v += at * v_token
        keys = load_rows(k, steps[:, None] * k_token + dims[None, :], is_real, HEAD_DIM, DIM)
        values = load_rows(v, steps[:, None] * v_token + dims[None, :], is_real, HEAD_DIM, DIM)
        visible = sees(steps, steps, TILE_TOKENS, 0) & is_real[None, :]
        pulls = tl.where(visible, scores(pulled, values, UPCAST) - inners[:, None], 0.0)
        squares = half_squares(keys, is_real, norm_factor)
        for feature in range(0, PADDED, TILE_FEATURES):
            features = feature + tl.arange(0, TILE_FEATURES)
            rows = tl.load(projection + features[:, None] * DIM + dims[None, :])
            exponents = scores(queries, rows, UPCAST) * factor
            key_exponents = scores(keys, rows, UPCAST) * factor
            if IS_EXPONENTIAL:
                if HAS_CONSTANTS:
                    exponents += tl.load(constants + features)[None, :]
                exponents -= sums[:, None]
                pairs = weights_of(exponents[:, None, :] + (key_exponents - squares[:, None])[None, :, :])
                grads = tl.sum(tl.where(visible[:, :, None], pairs * pulls[:, :, None], 0.0), 1)
            else:
                zeros = tl.zeros([TILE_TOKENS, TILE_FEATURES], tl.float32)
                key_features = relu_features(key_exponents)
                grads = product(pulls.to(keys.dtype), key_features.to(keys.dtype), zeros, UPCAST)
                grads = relu_gradient(exponents, grads * sums[:, None])
            grads = tl.where((features < FEATURES)[None, :], grads, 0.0)
            total = product(grads.to(rows.dtype), rows, total, UPCAST)
        total *= grad_factor * scale
        total += load_rows(far_grad, steps[:, None] * far_grad_token + dims[None, :], is_in, HEAD_DIM, DIM)
        total = tl.where(is_real[:, None], total, 0.0)
        q_grad += segment * q_grad_row + head * q_grad_head + at * q_grad_token
        store_rows(q_grad, steps[:, None] * q_grad_token + dims[None, :], total, is_in, HEAD_DIM, DIM)
