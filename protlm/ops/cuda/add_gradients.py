"""Sums the contributions of the units of each segment to the gradient of its state, in their order."""

import triton
import triton.language as tl


@triton.jit
def add_gradients(
    unit_mean_grads,
    unit_sum_grads,
    first_units,
    mean_grads,
    sum_grads,
    sizes,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TILE_FEATURES: tl.constexpr,
):
    """One program adds one tile of features of one head of a segment.

    A gradient of a mean is a sum over the queries and may leave the range of float16: each row of mean_grads is written
    relative to its largest number, which is stored in `sizes`.
    """
    BLOCKS: tl.constexpr = PADDED // TILE_FEATURES
    place = tl.program_id(0).to(tl.int64) // BLOCKS
    segment, head = place // HEADS, place % HEADS
    features = tl.program_id(0) % BLOCKS * TILE_FEATURES + tl.arange(0, TILE_FEATURES)
    offsets = features[:, None] * DIM + tl.arange(0, DIM)[None, :]
    of_sums = tl.zeros([TILE_FEATURES], tl.float32)
    of_means = tl.zeros([TILE_FEATURES, DIM], tl.float32)
    for unit in range(tl.load(first_units + segment), tl.load(first_units + segment + 1)):
        source = unit * HEADS + head
        of_sums += tl.load(unit_sum_grads + source * PADDED + features)
        of_means += tl.load(unit_mean_grads + source * (PADDED * DIM) + offsets)
    size = tl.max(tl.abs(of_means), 1)
    size = tl.where(size == 0, 1.0, size)
    of_means = of_means / size[:, None]
    tl.store(mean_grads + place * (PADDED * DIM) + offsets, of_means.to(mean_grads.dtype.element_ty))
    tl.store(sum_grads + place * PADDED + features, of_sums)
    tl.store(sizes + place * PADDED + features, size)
