"""Merges the states of the units of each segment, in their order: by log-sum-exp, or by sums for `relu`."""

import triton
import triton.language as tl

from protlm.ops.cuda.device_code import LOG_ZERO, finished


@triton.jit
def merge_states(
    unit_means,
    unit_references,
    first_units,
    means,
    references,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TILE_FEATURES: tl.constexpr,
    IS_EXPONENTIAL: tl.constexpr,
):
    """One program merges one tile of features of one head of a segment; a segment without units gets an empty state."""
    BLOCKS: tl.constexpr = PADDED // TILE_FEATURES
    place = tl.program_id(0).to(tl.int64) // BLOCKS
    segment, head = place // HEADS, place % HEADS
    features = tl.program_id(0) % BLOCKS * TILE_FEATURES + tl.arange(0, TILE_FEATURES)
    offsets = features[:, None] * DIM + tl.arange(0, DIM)[None, :]
    largest = tl.full([TILE_FEATURES], LOG_ZERO, tl.float32)
    sums = tl.zeros([TILE_FEATURES], tl.float32)
    context = tl.zeros([TILE_FEATURES, DIM], tl.float32)
    for unit in range(tl.load(first_units + segment), tl.load(first_units + segment + 1)):
        source = unit * HEADS + head
        weights = tl.load(unit_references + source * PADDED + features)
        if IS_EXPONENTIAL:
            risen = tl.maximum(largest, weights)
            weights = tl.math.exp2(weights - risen)
            shrink = tl.math.exp2(largest - risen)
            largest = risen
            sums *= shrink
            context *= shrink[:, None]
        sums += weights
        context += tl.load(unit_means + source * (PADDED * DIM) + offsets) * weights[:, None]
    merged, sums = finished(largest, sums, context, sums == 0, IS_EXPONENTIAL)
    tl.store(means + place * (PADDED * DIM) + offsets, merged.to(means.dtype.element_ty))
    tl.store(references + place * PADDED + features, sums)
