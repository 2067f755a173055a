"""Backward for a short segment in one kernel: its state, and then the gradient of the state, stay on the chip."""

import triton
import triton.language as tl

from protlm.ops.cuda.device_code import (
    LOG_ZERO,
    along_centre,
    centred,
    half_squares,
    load_is_real,
    load_rows,
    load_unit,
    product,
    query_weights,
    relu_features,
    relu_gradient,
    scale_of,
    scores,
    store_rows,
    weights_of,
)


@triton.jit
def product_of_features(weights, rows, TILE_TOKENS: tl.constexpr, DIM: tl.constexpr, UPCAST: tl.constexpr):
    """Returns weightsᵀ·rows, (tokens, head_dim): computed with the longer side first, which tensor cores need."""
    if TILE_TOKENS < DIM:
        zeros = tl.zeros([DIM, TILE_TOKENS], tl.float32)
        return tl.trans(product(tl.trans(rows), weights.to(rows.dtype), zeros, UPCAST))
    return product(tl.trans(weights.to(rows.dtype)), rows, tl.zeros([TILE_TOKENS, DIM], tl.float32), UPCAST)


@triton.jit
def short_backward(
    q,
    k,
    v,
    out,
    out_grad,
    token_mask,
    projection,
    scales,
    constants,
    units,
    means,
    references,
    query_sums,
    q_grad,
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
    out_row,
    out_head,
    out_token,
    out_grad_row,
    out_grad_head,
    out_grad_token,
    q_grad_row,
    q_grad_head,
    q_grad_token,
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
    PADDED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    IS_EXPONENTIAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_CONSTANTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program takes one head of a segment, of any length; writes zeros where a token is not real."""
    place = tl.program_id(0).to(tl.int64)
    segment, start, stop = load_unit(units, place // HEADS)
    head = place % HEADS
    features = tl.arange(0, PADDED)
    dims = tl.arange(0, DIM)
    steps = tl.arange(0, TILE_TOKENS)
    scale = scale_of(scales, segment, head, HEADS, HAS_SCALES)
    factor *= scale
    state_offsets = features[:, None] * DIM + dims[None, :]
    rows = tl.load(projection + head * projection_head + state_offsets)
    centre = tl.load(means + place * (PADDED * DIM) + dims).to(tl.float32)
    state = centred(tl.load(means + place * (PADDED * DIM) + state_offsets), centre, rows.dtype, IS_EXPONENTIAL)
    sums_of_keys = tl.load(references + place * PADDED + features)
    bias = sums_of_keys
    if HAS_CONSTANTS:
        bias += tl.load(constants + place * PADDED + features)
    if not IS_EXPONENTIAL:
        largest = tl.max(bias, 0)
        bias /= tl.where(largest == 0, 1.0, largest)
    at = start.to(tl.int64)
    q += segment * q_row + head * q_head + at * q_token
    k += segment * k_row + head * k_head + at * k_token
    v += segment * v_row + head * v_head + at * v_token
    out += segment * out_row + head * out_head + at * out_token
    out_grad += segment * out_grad_row + head * out_grad_head + at * out_grad_token
    q_grad += segment * q_grad_row + head * q_grad_head + at * q_grad_token
    k_grad += segment * k_grad_row + head * k_grad_head + at * k_grad_token
    v_grad += segment * v_grad_row + head * v_grad_head + at * v_grad_token
    token_mask += segment * mask_row + at
    query_sums += segment * sums_row + head * sums_head + at
    of_sums = tl.zeros([PADDED], tl.float32)
    of_means = tl.zeros([PADDED, DIM], tl.float32)
    for first in range(0, stop - start, TILE_TOKENS):
        is_in = steps < stop - start - first
        tokens = first + steps
        is_real = load_is_real(token_mask, tokens, is_in, HAS_MASK)
        queries = load_rows(q, tokens[:, None] * q_token + dims[None, :], is_in, HEAD_DIM, DIM)
        outputs = load_rows(out, tokens[:, None] * out_token + dims[None, :], is_in, HEAD_DIM, DIM)
        pulled = load_rows(out_grad, tokens[:, None] * out_grad_token + dims[None, :], is_real, HEAD_DIM, DIM)
        inners = tl.sum(pulled.to(tl.float32) * outputs.to(tl.float32), 1)
        sums = tl.load(query_sums + tokens, mask=is_in, other=float("inf"))
        exponents = scores(rows, queries, UPCAST) * factor
        weights, shares = query_weights(exponents, bias, sums, is_real, IS_EXPONENTIAL, HAS_MASK)
        of_sums += tl.sum(weights * inners[None, :], 1)
        of_means = product(weights.to(pulled.dtype), pulled, of_means, UPCAST)
        if not IS_EXPONENTIAL:
            inners -= along_centre(pulled, centre)
        grads = (scores(state, pulled, UPCAST) - inners[None, :]) * shares
        of_queries = product_of_features(grads, rows, TILE_TOKENS, DIM, UPCAST) * (grad_factor * scale)
        of_queries = tl.where(is_real[:, None], of_queries, 0.0)
        store_rows(q_grad, tokens[:, None] * q_grad_token + dims[None, :], of_queries, is_in, HEAD_DIM, DIM)
    size = tl.max(tl.abs(of_means), 1)
    size = tl.where(size == 0, 1.0, size)
    of_means /= size[:, None]
    centre = tl.sum(tl.where((features == 0)[:, None], of_means, 0.0), 0)
    state_grad = centred(of_means, centre, rows.dtype, IS_EXPONENTIAL)
    if IS_EXPONENTIAL:
        # A feature without a key, or of the padding, has no weight.
        bias = tl.where(sums_of_keys == LOG_ZERO, float("inf"), sums_of_keys)
    else:
        inverse_sums = tl.where(sums_of_keys == 0, 0.0, 1.0 / tl.where(sums_of_keys == 0, 1.0, sums_of_keys))
    for first in range(0, stop - start, TILE_TOKENS):
        is_in = steps < stop - start - first
        tokens = first + steps
        is_real = load_is_real(token_mask, tokens, is_in, HAS_MASK)
        keys = load_rows(k, tokens[:, None] * k_token + dims[None, :], is_in, HEAD_DIM, DIM)
        values = load_rows(v, tokens[:, None] * v_token + dims[None, :], is_in, HEAD_DIM, DIM)
        exponents = scores(rows, keys, UPCAST) * factor
        grads = scores(state_grad, values, UPCAST)
        if not IS_EXPONENTIAL:
            grads += along_centre(values, centre)[None, :]
        grads = grads * size[:, None] - of_sums[:, None]
        if IS_EXPONENTIAL:
            weights = weights_of(exponents - half_squares(keys, is_in, norm_factor)[None, :] - bias[:, None])
            grads *= weights
            exponent_sums = tl.sum(grads, 0)
        else:
            weights = relu_features(exponents) * inverse_sums[:, None]
            grads = relu_gradient(exponents, grads * inverse_sums[:, None])
        weights *= size[:, None]
        of_values = product_of_features(weights, state_grad, TILE_TOKENS, DIM, UPCAST)
        if not IS_EXPONENTIAL:
            of_values += tl.sum(weights, 0)[:, None] * centre[None, :]
        of_keys = product_of_features(grads, rows, TILE_TOKENS, DIM, UPCAST) * (grad_factor * scale)
        if IS_EXPONENTIAL:
            of_keys -= keys.to(tl.float32) * (exponent_sums * norm_grad_factor)[:, None]
        of_keys = tl.where(is_real[:, None], of_keys, 0.0)
        of_values = tl.where(is_real[:, None], of_values, 0.0)
        store_rows(k_grad, tokens[:, None] * k_grad_token + dims[None, :], of_keys, is_in, HEAD_DIM, DIM)
        store_rows(v_grad, tokens[:, None] * v_grad_token + dims[None, :], of_values, is_in, HEAD_DIM, DIM)
