"""The gradients of keys and values from the gradient of the state."""

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
    relu_features,
    relu_gradient,
    scale_of,
    scores,
    store_rows,
    weights_of,
)


@triton.jit
def key_gradients(
    k,
    v,
    token_mask,
    projection,
    scales,
    units,
    references,
    mean_grads,
    sum_grads,
    sizes,
    k_grad,
    v_grad,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    k_grad_row,
    k_grad_head,
    k_grad_token,
    v_grad_row,
    v_grad_head,
    v_grad_token,
    mask_row,
    projection_head,
    factor,
    norm_factor,
    grad_factor,
    norm_grad_factor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TILE_FEATURES: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    IS_EXPONENTIAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PER_UNIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program takes one tile of keys of one head; writes zeros where a token is not real."""
    place = tl.program_id(0).to(tl.int64) // TILES
    unit, head = place // HEADS, place % HEADS
    segment, start, stop = load_unit(units, unit)
    start += tl.program_id(0) % TILES * TILE_TOKENS
    if start < stop:
        steps = tl.arange(0, TILE_TOKENS)
        dims = tl.arange(0, DIM)
        is_in = steps < stop - start
        first_token = start.to(tl.int64)
        is_real = load_is_real(token_mask + segment * mask_row + first_token, steps, is_in, HAS_MASK)
        k += segment * k_row + head * k_head + first_token * k_token
        v += segment * v_row + head * v_head + first_token * v_token
        keys = load_rows(k, steps[:, None] * k_token + dims[None, :], is_in, HEAD_DIM, DIM)
        values = load_rows(v, steps[:, None] * v_token + dims[None, :], is_in, HEAD_DIM, DIM)
        scale = scale_of(scales, segment, head, HEADS, HAS_SCALES)
        factor *= scale
        projection += head * projection_head
        at = (unit if PER_UNIT else segment) * HEADS + head
        mean_grads += at * (PADDED * DIM)
        references += at * PADDED
        sum_grads += at * PADDED
        sizes += at * PADDED
        if IS_EXPONENTIAL:
            squares = half_squares(keys, is_in, norm_factor)
        centre = tl.load(mean_grads + dims).to(tl.float32)
        if not IS_EXPONENTIAL:
            along = along_centre(values, centre)
        exponent_sums = tl.zeros([TILE_TOKENS], tl.float32)
        of_keys = tl.zeros([TILE_TOKENS, DIM], tl.float32)
        of_values = tl.zeros([TILE_TOKENS, DIM], tl.float32)
        for first in range(0, PADDED, TILE_FEATURES):
            features = first + tl.arange(0, TILE_FEATURES)
            offsets = features[:, None] * DIM + dims[None, :]
            rows = tl.load(projection + offsets)
            pulled = centred(tl.load(mean_grads + offsets), centre, values.dtype, IS_EXPONENTIAL)
            bias = tl.load(references + features)
            size = tl.load(sizes + features)
            exponents = scores(keys, rows, UPCAST) * factor
            grads = scores(values, pulled, UPCAST)
            if not IS_EXPONENTIAL:
                grads += along[:, None]
            grads = grads * size[None, :] - tl.load(sum_grads + features)[None, :]
            if IS_EXPONENTIAL:
                # A feature without a key, or of the padding, has no weight.
                bias = tl.where(bias == LOG_ZERO, float("inf"), bias)
                weights = weights_of(exponents - squares[:, None] - bias[None, :])
                grads *= weights
                exponent_sums += tl.sum(grads, 1)
            else:
                inverse = tl.where(bias == 0, 0.0, 1.0 / tl.where(bias == 0, 1.0, bias))
                weights = relu_features(exponents) * inverse[None, :]
                grads = relu_gradient(exponents, grads * inverse[None, :])
            weights *= size[None, :]
            of_values = product(weights.to(pulled.dtype), pulled, of_values, UPCAST)
            if not IS_EXPONENTIAL:
                of_values += tl.sum(weights, 1)[:, None] * centre[None, :]
            of_keys = product(grads.to(rows.dtype), rows, of_keys, UPCAST)
        of_keys *= grad_factor * scale
        if IS_EXPONENTIAL:
            of_keys -= keys.to(tl.float32) * (exponent_sums * norm_grad_factor)[:, None]
        of_keys = tl.where(is_real[:, None], of_keys, 0.0)
        of_values = tl.where(is_real[:, None], of_values, 0.0)
        k_grad += segment * k_grad_row + head * k_grad_head + first_token * k_grad_token
        v_grad += segment * v_grad_row + head * v_grad_head + first_token * v_grad_token
        store_rows(k_grad, steps[:, None] * k_grad_token + dims[None, :], of_keys, is_in, HEAD_DIM, DIM)
        store_rows(v_grad, steps[:, None] * v_grad_token + dims[None, :], of_values, is_in, HEAD_DIM, DIM)
