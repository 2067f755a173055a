"""Forward for a short segment in one kernel: its state stays on the chip between its keys and its queries."""

import triton
import triton.language as tl

from protlm.ops.cuda.device_code import (
    LOG_ZERO,
    centred,
    finished,
    fold_tile,
    load_is_real,
    load_rows,
    load_unit,
    product,
    relu_features,
    scale_of,
    scores,
    store_rows,
)


@triton.jit
def short_forward(
    q,
    k,
    v,
    token_mask,
    projection,
    scales,
    constants,
    units,
    means,
    references,
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
    TILE_TOKENS: tl.constexpr,
    IS_EXPONENTIAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_CONSTANTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program takes one head of a segment, of any length; writes the results of `fold_keys` and `read_state`."""
    place = tl.program_id(0).to(tl.int64)
    segment, start, stop = load_unit(units, place // HEADS)
    head = place % HEADS
    features = tl.arange(0, PADDED)
    dims = tl.arange(0, DIM)
    steps = tl.arange(0, TILE_TOKENS)
    factor *= scale_of(scales, segment, head, HEADS, HAS_SCALES)
    state_offsets = features[:, None] * DIM + dims[None, :]
    rows = tl.load(projection + head * projection_head + state_offsets)
    at = start.to(tl.int64)
    q += segment * q_row + head * q_head + at * q_token
    k += segment * k_row + head * k_head + at * k_token
    v += segment * v_row + head * v_head + at * v_token
    out += segment * out_row + head * out_head + at * out_token
    token_mask += segment * mask_row + at
    query_sums += segment * sums_row + head * sums_head + at
    largest = tl.full([PADDED], LOG_ZERO, tl.float32)
    sums = tl.zeros([PADDED], tl.float32)
    context = tl.zeros([PADDED, DIM], tl.float32)
    for first in range(0, stop - start, TILE_TOKENS):
        is_in = steps < stop - start - first
        tokens = first + steps
        keys = load_rows(k, tokens[:, None] * k_token + dims[None, :], is_in, HEAD_DIM, DIM)
        values = load_rows(v, tokens[:, None] * v_token + dims[None, :], is_in, HEAD_DIM, DIM)
        is_real = load_is_real(token_mask, tokens, is_in, HAS_MASK)
        largest, sums, context = fold_tile(
            rows, keys, values, is_real, largest, sums, context, factor, norm_factor,
            IS_EXPONENTIAL, HAS_MASK, UPCAST,
        )  # fmt: skip
    is_empty = (sums == 0) | (features >= FEATURES)
    state, bias = finished(largest, sums, context, is_empty, IS_EXPONENTIAL)
    tl.store(means + place * (PADDED * DIM) + state_offsets, state.to(means.dtype.element_ty))
    centre = tl.sum(tl.where((features == 0)[:, None], state, 0.0), 0)
    state = centred(state, centre, out.dtype.element_ty, IS_EXPONENTIAL)
    tl.store(references + place * PADDED + features, bias)
    if HAS_CONSTANTS:
        bias += tl.load(constants + place * PADDED + features)
    if not IS_EXPONENTIAL:
        total_of_largest = tl.max(bias, 0)
        bias /= tl.where(total_of_largest == 0, 1.0, total_of_largest)
    for first in range(0, stop - start, TILE_TOKENS):
        is_in = steps < stop - start - first
        tokens = first + steps
        is_real = load_is_real(token_mask, tokens, is_in, HAS_MASK)
        queries = load_rows(q, tokens[:, None] * q_token + dims[None, :], is_in, HEAD_DIM, DIM)
        exponents = scores(queries, rows, UPCAST) * factor
        if IS_EXPONENTIAL:
            exponents += bias[None, :]
            offset = tl.max(exponents, 1)
            weights = tl.math.exp2(exponents - offset[:, None])
        else:
            weights = relu_features(exponents) * bias[None, :]
        total = tl.sum(weights, 1)
        outputs = product(weights.to(state.dtype), state, tl.zeros([TILE_TOKENS, DIM], tl.float32), UPCAST)
        # Without a key the sum of `relu` is 0, and so is the number that it divides.
        outputs /= tl.where(total == 0, 1.0, total)[:, None]
        if not IS_EXPONENTIAL:
            outputs += centre[None, :]
        outputs = tl.where(is_real[:, None], outputs, 0.0)
        store_rows(out, tokens[:, None] * out_token + dims[None, :], outputs, is_in, HEAD_DIM, DIM)
        if IS_EXPONENTIAL:
            total = offset + tl.math.log2(total)
        tl.store(query_sums + tokens, total, mask=is_in)
