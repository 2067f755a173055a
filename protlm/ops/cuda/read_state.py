"""Reads the state of a segment with its queries: the output, and the renormaliser of each query.

This is attention from the queries to the projection: the values are the means of the state, the bias its logarithms.
"""

import triton
import triton.language as tl

from protlm.ops.cuda.device_code import (
    biases_of,
    centred,
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
def read_state(
    q,
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
    out_row,
    out_head,
    out_token,
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
    TILES: tl.constexpr,
    IS_EXPONENTIAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_CONSTANTS: tl.constexpr,
    PER_UNIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program reads with one tile of queries of one head the state of its segment, or with PER_UNIT of its unit.

    `references` are those of `Call.query_references`, with PER_UNIT those of `scan_states`. Writes out, zero where a
    token is not real, and query_sums: log2 Σ φ(q)·φ(k), for `relu` the sum.
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
        queries = load_rows(q, steps[:, None] * q_token + dims[None, :], is_in, HEAD_DIM, DIM)
        factor *= scale_of(scales, segment, head, HEADS, HAS_SCALES)
        projection += head * projection_head
        state = unit if PER_UNIT else segment
        means += (state * HEADS + head) * (PADDED * DIM)
        largest = tl.full([TILE_TOKENS], float("-inf"), tl.float32)
        sums = tl.zeros([TILE_TOKENS], tl.float32)
        total = tl.zeros([TILE_TOKENS, DIM], tl.float32)
        centre = tl.load(means + dims).to(tl.float32)
        for first in range(0, PADDED, TILE_FEATURES):
            features = first + tl.arange(0, TILE_FEATURES)
            offsets = features[:, None] * DIM + dims[None, :]
            rows = tl.load(projection + offsets)
            bias = biases_of(references, constants, state, segment, head, features, HEADS, PADDED, HAS_CONSTANTS)
            exponents = scores(queries, rows, UPCAST) * factor
            if IS_EXPONENTIAL:
                exponents += bias[None, :]
                risen = tl.maximum(largest, tl.max(exponents, 1))
                weights = tl.math.exp2(exponents - risen[:, None])
                shrink = tl.math.exp2(largest - risen)
                largest = risen
                sums *= shrink
                total *= shrink[:, None]
            else:
                weights = relu_features(exponents) * bias[None, :]
            sums += tl.sum(weights, 1)
            values = centred(tl.load(means + offsets), centre, queries.dtype, IS_EXPONENTIAL)
            total = product(weights.to(values.dtype), values, total, UPCAST)
        # Without a key the sum of `relu` is 0, and so is the number that it divides.
        total /= tl.where(sums == 0, 1.0, sums)[:, None]
        if not IS_EXPONENTIAL:
            total += centre[None, :]
        total = tl.where(is_real[:, None], total, 0.0)
        out += segment * out_row + head * out_head + first_token * out_token
        store_rows(out, steps[:, None] * out_token + dims[None, :], total, is_in, HEAD_DIM, DIM)
        if IS_EXPONENTIAL:
            sums = largest + tl.math.log2(sums)
        tl.store(query_sums + segment * sums_row + head * sums_head + first_token + steps, sums, mask=is_in)
