"""Folds the keys of a unit into a state: for each feature the mean of v under the key features, and their sum.

This is attention from the projection to the keys, with one running maximum for each feature.
"""

import triton
import triton.language as tl

from protlm.ops.cuda.device_code import (
    LOG_ZERO,
    finished,
    fold_tile,
    load_is_real,
    load_rows,
    load_unit,
    scale_of,
)


@triton.jit
def fold_keys(
    k,
    v,
    token_mask,
    projection,
    scales,
    units,
    means,
    references,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    mask_row,
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
    HAS_MASK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program folds one unit into one tile of features of one head.

    Writes means (units, heads, PADDED, DIM) and references (units, heads, PADDED): log2 Σ φ(k), for `relu` Σ φ(k).
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
        k += segment * k_row + head * k_head + start.to(tl.int64) * k_token
        v += segment * v_row + head * v_head + start.to(tl.int64) * v_token
        token_mask += segment * mask_row + start
        k_offsets = steps[:, None] * k_token + dims[None, :]
        v_offsets = steps[:, None] * v_token + dims[None, :]
        largest = tl.full([TILE_FEATURES], LOG_ZERO, tl.float32)
        sums = tl.zeros([TILE_FEATURES], tl.float32)
        context = tl.zeros([TILE_FEATURES, DIM], tl.float32)
        for first in range(start, stop, TILE_TOKENS):
            is_in = steps < stop - first
            keys = load_rows(k, k_offsets, is_in, HEAD_DIM, DIM)
            values = load_rows(v, v_offsets, is_in, HEAD_DIM, DIM)
            is_real = load_is_real(token_mask, steps, is_in, HAS_MASK)
            largest, sums, context = fold_tile(
                rows, keys, values, is_real, largest, sums, context, factor, norm_factor,
                IS_EXPONENTIAL, HAS_MASK, UPCAST,
            )  # fmt: skip
            k += TILE_TOKENS * k_token
            v += TILE_TOKENS * v_token
            token_mask += TILE_TOKENS
        is_empty = (sums == 0) | (features >= FEATURES)
        state, sums = finished(largest, sums, context, is_empty, IS_EXPONENTIAL)
        offsets = place * (PADDED * DIM) + features[:, None] * DIM + dims[None, :]
        tl.store(means + offsets, state.to(means.dtype.element_ty))
        tl.store(references + place * PADDED + features, sums)
