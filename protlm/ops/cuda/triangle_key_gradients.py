"""The gradients of keys and values through causal FAVOR inside a unit, added to those through the later units."""

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
def triangle_key_gradients(
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
    projection_head,
    factor,
    norm_factor,
    grad_factor,
    norm_grad_factor,
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
    """One program takes one tile of keys of one head; writes zeros where a token is not real.

    All later tiles of queries see every key of the tile: features are relative to the largest ones of these keys.
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
        q += segment * q_row + head * q_head
        k += segment * k_row + head * k_head + at * k_token
        v += segment * v_row + head * v_head + at * v_token
        out_grad += segment * out_grad_row + head * out_grad_head
        query_sums += segment * sums_row + head * sums_head
        inner += segment * sums_row + head * sums_head
        scale = scale_of(scales, segment, head, HEADS, HAS_SCALES)
        factor *= scale
        projection += head * projection_head
        constants += (segment * HEADS + head) * PADDED
        keys = load_rows(k, steps[:, None] * k_token + dims[None, :], is_real, HEAD_DIM, DIM)
        values = load_rows(v, steps[:, None] * v_token + dims[None, :], is_real, HEAD_DIM, DIM)
        squares = half_squares(keys, is_real, norm_factor)
        exponent_sums = tl.zeros([TILE_TOKENS], tl.float32)
        of_keys = tl.zeros([TILE_TOKENS, DIM], tl.float32)
        of_values = tl.zeros([TILE_TOKENS, DIM], tl.float32)
        for first in range(start + TILE_TOKENS, stop, TILE_OTHERS):
            query_at = at + (first - start)
            is_query = load_is_real(token_mask + query_at, others, others < stop - first, HAS_MASK)
            queries = load_rows(
                q + query_at * q_token, others[:, None] * q_token + dims[None, :], is_query, HEAD_DIM, DIM
            )
            pulled = load_rows(
                out_grad + query_at * out_grad_token, others[:, None] * out_grad_token + dims[None, :], is_query,
                HEAD_DIM, DIM,
            )  # fmt: skip
            sums = tl.load(query_sums + query_at + others, mask=is_query, other=0.0)
            inners = tl.load(inner + query_at + others, mask=is_query, other=0.0)
            pulls = tl.where(is_query[None, :], scores(values, pulled, UPCAST) - inners[None, :], 0.0)
            if not IS_EXPONENTIAL:
                sums = tl.where(sums == 0, 0.0, 1.0 / tl.where(sums == 0, 1.0, sums))
            products = tl.zeros([TILE_TOKENS, TILE_OTHERS], tl.float32)
            for feature in range(0, PADDED, TILE_FEATURES):
                features = feature + tl.arange(0, TILE_FEATURES)
                is_counted = is_query[:, None] & (features < FEATURES)[None, :]
                rows = tl.load(projection + features[:, None] * DIM + dims[None, :])
                exponents = scores(keys, rows, UPCAST) * factor
                key_features, reference = key_features_of(exponents, squares, is_real, IS_EXPONENTIAL)
                query_exponents = scores(queries, rows, UPCAST) * factor
                if IS_EXPONENTIAL:
                    if HAS_CONSTANTS:
                        reference += tl.load(constants + features)
                    query_features = weights_of(query_exponents + reference[None, :] - sums[:, None])
                else:
                    query_features = relu_features(query_exponents) * sums[:, None]
                query_features = tl.where(is_counted, query_features, 0.0).to(keys.dtype)
                products = product(key_features.to(keys.dtype), tl.trans(query_features), products, UPCAST)
                zeros = tl.zeros([TILE_TOKENS, TILE_FEATURES], tl.float32)
                grads = product(pulls.to(keys.dtype), query_features, zeros, UPCAST)
                if IS_EXPONENTIAL:
                    grads *= key_features
                    exponent_sums += tl.sum(grads, 1)
                else:
                    grads = relu_gradient(exponents, grads)
                of_keys = product(grads.to(rows.dtype), rows, of_keys, UPCAST)
            of_values = product(products.to(pulled.dtype), pulled, of_values, UPCAST)
        q += at * q_token
        out_grad += at * out_grad_token
        queries = load_rows(q, steps[:, None] * q_token + dims[None, :], is_real, HEAD_DIM, DIM)
        pulled = load_rows(out_grad, steps[:, None] * out_grad_token + dims[None, :], is_real, HEAD_DIM, DIM)
        sums = tl.load(query_sums + at + steps, mask=is_real, other=0.0)
        inners = tl.load(inner + at + steps, mask=is_real, other=0.0)
        if not IS_EXPONENTIAL:
            sums = tl.where(sums == 0, 0.0, 1.0 / tl.where(sums == 0, 1.0, sums))
        # Keys × queries.
        visible = sees(steps, steps, 0, TILE_TOKENS) & is_real[None, :] & is_real[:, None]
        pulls = tl.where(visible, scores(values, pulled, UPCAST) - inners[None, :], 0.0)
        products = tl.zeros([TILE_TOKENS, TILE_TOKENS], tl.float32)
        for feature in range(0, PADDED, TILE_FEATURES):
            features = feature + tl.arange(0, TILE_FEATURES)
            is_feature = features < FEATURES
            rows = tl.load(projection + features[:, None] * DIM + dims[None, :])
            exponents = scores(keys, rows, UPCAST) * factor
            query_exponents = scores(queries, rows, UPCAST) * factor
            if IS_EXPONENTIAL:
                if HAS_CONSTANTS:
                    query_exponents += tl.load(constants + features)[None, :]
                query_exponents = tl.where(is_feature[None, :], query_exponents - sums[:, None], float("-inf"))
                pairs = weights_of((exponents - squares[:, None])[:, None, :] + query_exponents[None, :, :])
                pairs = tl.where(visible[:, :, None], pairs, 0.0)
                products += tl.sum(pairs, 2)
                grads = tl.sum(pairs * pulls[:, :, None], 1)
                exponent_sums += tl.sum(grads, 1)
            else:
                query_features = tl.where(is_feature[None, :], relu_features(query_exponents) * sums[:, None], 0.0)
                query_features = query_features.to(keys.dtype)
                products = product(relu_features(exponents).to(keys.dtype), tl.trans(query_features), products, UPCAST)
                zeros = tl.zeros([TILE_TOKENS, TILE_FEATURES], tl.float32)
                grads = relu_gradient(exponents, product(pulls.to(keys.dtype), query_features, zeros, UPCAST))
            of_keys = product(grads.to(rows.dtype), rows, of_keys, UPCAST)
        weights = tl.where(visible, products, 0.0)
        of_values = product(weights.to(pulled.dtype), pulled, of_values, UPCAST)
        of_keys *= grad_factor * scale
        if IS_EXPONENTIAL:
            of_keys -= keys.to(tl.float32) * (exponent_sums * norm_grad_factor)[:, None]
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
