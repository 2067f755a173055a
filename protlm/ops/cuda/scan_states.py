"""For every unit of a segment the state of the units before it, after it, or both: prefix and suffix sums of states.

States are merged by log-sum-exp in the order of the units, for `relu` by sums. The units next to it may be left out.
"""

import triton
import triton.language as tl

from protlm.ops.cuda.device_code import LOG_ZERO, finished


@triton.jit
def scan_states(
    unit_means,
    unit_references,
    unit_inners,
    first_units,
    means,
    references,
    inners,
    sizes,
    size,
    log_size,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TILE_FEATURES: tl.constexpr,
    IS_EXPONENTIAL: tl.constexpr,
    GAP: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    OF_QUERIES: tl.constexpr,
):
    """One program takes one tile of features of one head of a segment.

    A unit's state is of the units at least GAP + 1 before it (HAS_BEFORE), or after it (HAS_AFTER), or of both.

    With OF_QUERIES `inners` are merged like the means, and the results are written as `key_gradients` reads them: what
    is 2^references·means is then size·2^-references·means with `size` a bound of 2^references, which keeps weights
    below 1; for `relu` the sizes take the sums.
    """
    BLOCKS: tl.constexpr = PADDED // TILE_FEATURES
    place = tl.program_id(0).to(tl.int64) // BLOCKS
    segment, head = place // HEADS, place % HEADS
    features = tl.program_id(0) % BLOCKS * TILE_FEATURES + tl.arange(0, TILE_FEATURES)
    offsets = features[:, None] * DIM + tl.arange(0, DIM)[None, :]
    first = tl.load(first_units + segment).to(tl.int64)
    stop = tl.load(first_units + segment + 1).to(tl.int64)
    count = (stop - first).to(tl.int32)
    for is_suffix in tl.static_range(0, 2):
        if HAS_AFTER if is_suffix else HAS_BEFORE:
            largest = tl.full([TILE_FEATURES], LOG_ZERO, tl.float32)
            sums = tl.zeros([TILE_FEATURES], tl.float32)
            inner = tl.zeros([TILE_FEATURES], tl.float32)
            context = tl.zeros([TILE_FEATURES, DIM], tl.float32)
            for step in range(0, count):
                unit = stop - 1 - step if is_suffix else first + step
                # What this unit is the first one to see.
                seen = unit + GAP + 1 if is_suffix else unit - GAP - 1
                is_there = (seen >= first) & (seen < stop)
                source = seen * HEADS + head
                empty = LOG_ZERO if IS_EXPONENTIAL else 0.0
                weights = tl.load(unit_references + source * PADDED + features, mask=is_there, other=empty)
                values = tl.load(unit_means + source * (PADDED * DIM) + offsets, mask=is_there, other=0.0)
                if OF_QUERIES:
                    seen_inner = tl.load(unit_inners + source * PADDED + features, mask=is_there, other=0.0)
                largest, sums, inner, context = _merged(
                    largest, sums, inner, context, weights, values, seen_inner if OF_QUERIES else inner,
                    IS_EXPONENTIAL, OF_QUERIES,
                )  # fmt: skip
                target = unit * HEADS + head
                all_largest, all_sums, all_inner, all_context = largest, sums, inner, context
                if is_suffix and HAS_BEFORE:
                    # What the first pass wrote, in its own form.
                    weights = tl.load(references + target * PADDED + features)
                    values = tl.load(means + target * (PADDED * DIM) + offsets).to(tl.float32)
                    if OF_QUERIES:
                        seen_inner = tl.load(inners + target * PADDED + features)
                    # No thread writes what another has still to read.
                    tl.debug_barrier()
                    all_largest, all_sums, all_inner, all_context = _merged(
                        largest, sums, inner, context, weights, values, seen_inner if OF_QUERIES else inner,
                        IS_EXPONENTIAL, OF_QUERIES,
                    )  # fmt: skip
                divisors = tl.where(all_sums == 0, 1.0, all_sums)
                merged, reference = finished(all_largest, all_sums, all_context, all_sums == 0, IS_EXPONENTIAL)
                if OF_QUERIES:
                    merged_inner = tl.where(all_sums == 0, 0.0, all_inner / divisors)
                    if is_suffix or not HAS_AFTER:
                        scale = tl.full([TILE_FEATURES], 1.0, tl.float32)
                        if IS_EXPONENTIAL:
                            reference, scale = log_size - reference, scale * size
                        else:
                            reference, scale = scale, reference
                        merged_inner *= scale
                        tl.store(sizes + target * PADDED + features, scale)
                    tl.store(inners + target * PADDED + features, merged_inner)
                tl.store(means + target * (PADDED * DIM) + offsets, merged.to(means.dtype.element_ty))
                tl.store(references + target * PADDED + features, reference)
            # The second pass reads what other threads of the program have written.
            tl.debug_barrier()


@triton.jit
def _merged(
    largest, sums, inner, context, weights, values, seen_inner,
    IS_EXPONENTIAL: tl.constexpr, HAS_INNERS: tl.constexpr,
):  # fmt: skip
    """Returns a state with the state of another unit, whose references are `weights`."""
    if IS_EXPONENTIAL:
        risen = tl.maximum(largest, weights)
        weights = tl.math.exp2(weights - risen)
        shrink = tl.math.exp2(largest - risen)
        largest = risen
        sums *= shrink
        context *= shrink[:, None]
        if HAS_INNERS:
            inner *= shrink
    if HAS_INNERS:
        inner += seen_inner * weights
    return largest, sums + weights, inner, context + values * weights[:, None]
