"""The gradient of the queries, and the inner product of each output with its gradient."""

import triton
import triton.language as tl

from protlm.ops.cuda.device_code import (
    along_centre,
    biases_of,
    centred,
    half_squares,
    load_is_real,
    load_rows,
    load_unit,
    product,
    relu_gradient,
    scale_of,
    scores,
    store_rows,
    weights_of,
)


@triton.jit
def query_gradients(
    q,
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
    sums_grad,
    q_grad,
    inner,
    q_row,
    q_head,
    q_token,
    out_row,
    out_head,
    out_token,
    out_grad_row,
    out_grad_head,
    out_grad_token,
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
    HAS_CONSTANTS: tl.constexpr,
    HAS_SUMS_GRAD: tl.constexpr,
    IS_ABSOLUTE: tl.constexpr,
    PER_UNIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program takes one tile of queries of one head; writes zeros where a token is not real.

    With IS_ABSOLUTE `query_sums` are logarithms of absolute normalisers: ‖q‖² has a gradient, and so may they.
    """
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
        q += segment * q_row + head * q_head + first_token * q_token
        out += segment * out_row + head * out_head + first_token * out_token
        out_grad += segment * out_grad_row + head * out_grad_head + first_token * out_grad_token
        queries = load_rows(q, steps[:, None] * q_token + dims[None, :], is_in, HEAD_DIM, DIM)
        outputs = load_rows(out, steps[:, None] * out_token + dims[None, :], is_in, HEAD_DIM, DIM)
        pulled = load_rows(out_grad, steps[:, None] * out_grad_token + dims[None, :], is_real, HEAD_DIM, DIM)
        inners = tl.sum(pulled.to(tl.float32) * outputs.to(tl.float32), 1)
        at = segment * sums_row + head * sums_head + first_token
        if HAS_SUMS_GRAD:
            inners -= tl.load(sums_grad + at + steps, mask=is_real, other=0.0)
        tl.store(inner + at + steps, inners, mask=is_in)
        sums = tl.load(query_sums + at + steps, mask=is_in, other=1.0)
        if IS_ABSOLUTE:
            sums += half_squares(queries, is_in, norm_factor)
            exponent_sums = tl.zeros([TILE_TOKENS], tl.float32)
        scale = scale_of(scales, segment, head, HEADS, HAS_SCALES)
        factor *= scale
        projection += head * projection_head
        state = unit if PER_UNIT else segment
        means += (state * HEADS + head) * (PADDED * DIM)
        if not IS_EXPONENTIAL:
            sums = tl.where(sums == 0, 0.0, 1.0 / tl.where(sums == 0, 1.0, sums))
        centre = tl.load(means + dims).to(tl.float32)
        if not IS_EXPONENTIAL:
            inners -= along_centre(pulled, centre)
        total = tl.zeros([TILE_TOKENS, DIM], tl.float32)
        for first in range(0, PADDED, TILE_FEATURES):
            features = first + tl.arange(0, TILE_FEATURES)
            offsets = features[:, None] * DIM + dims[None, :]
            rows = tl.load(projection + offsets)
            values = centred(tl.load(means + offsets), centre, pulled.dtype, IS_EXPONENTIAL)
            bias = biases_of(references, constants, state, segment, head, features, HEADS, PADDED, HAS_CONSTANTS)
            exponents = scores(queries, rows, UPCAST) * factor
            grads = scores(pulled, values, UPCAST) - inners[:, None]
            if IS_EXPONENTIAL:
                grads *= weights_of(exponents + bias[None, :] - sums[:, None])
                if IS_ABSOLUTE:
                    exponent_sums += tl.sum(grads, 1)
            else:
                grads = relu_gradient(exponents, bias[None, :] * sums[:, None] * grads)
            total = product(grads.to(rows.dtype), rows, total, UPCAST)
        total *= grad_factor * scale
        if IS_ABSOLUTE:
            total -= queries.to(tl.float32) * (exponent_sums * norm_grad_factor)[:, None]
        total = tl.where(is_real[:, None], total, 0.0)
        q_grad += segment * q_grad_row + head * q_grad_head + first_token * q_grad_token
        store_rows(q_grad, steps[:, None] * q_grad_token + dims[None, :], total, is_in, HEAD_DIM, DIM)
