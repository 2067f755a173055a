"""Functions that several kernels use on the device: products, access to the tokens of a unit, folding of keys."""

import triton
import triton.language as tl

LOG_ZERO = tl.constexpr(-1.0e30)
"""Stands for log 0: finite, so that a difference of two is not NaN."""

RELU_OFFSET = tl.constexpr(1e-3)
"""As in protlm.ops.feature_maps."""


@triton.jit
def product(a, b, total, UPCAST: tl.constexpr):
    """Returns a·b + total, summed in float32; of float32 as three products of tf32, which lose the last two bits.

    The interpreter would multiply the bit patterns of bfloat16; with UPCAST it multiplies numbers, whose products
    float32 holds exactly.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def scores(a, b, UPCAST: tl.constexpr):
    """Returns a·bᵀ."""
    return product(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], tl.float32), UPCAST)


@triton.jit
def load_unit(units, unit):
    """Returns the segment of a unit, its first position and the position after its last."""
    segment = tl.load(units + 3 * unit).to(tl.int64)
    return segment, tl.load(units + 3 * unit + 1), tl.load(units + 3 * unit + 2)


@triton.jit
def load_reach(units, unit):
    """Returns the same of a unit that has a reach, with the first position in it and the position after its last."""
    segment = tl.load(units + 5 * unit).to(tl.int64)
    start, stop = tl.load(units + 5 * unit + 1), tl.load(units + 5 * unit + 2)
    return segment, start, stop, tl.load(units + 5 * unit + 3), tl.load(units + 5 * unit + 4)


@triton.jit
def load_rows(pointer, offsets, is_in, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Returns the vectors of some tokens: zeros where `is_in` is false and beyond head_dim."""
    if HEAD_DIM == DIM:
        return tl.load(pointer + offsets, mask=is_in[:, None], other=0.0)
    return tl.load(pointer + offsets, mask=is_in[:, None] & (tl.arange(0, DIM) < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, offsets, values, is_in, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Writes the vectors of the tokens that `is_in` names."""
    values = values.to(pointer.dtype.element_ty)
    if HEAD_DIM == DIM:
        tl.store(pointer + offsets, values, mask=is_in[:, None])
    else:
        tl.store(pointer + offsets, values, mask=is_in[:, None] & (tl.arange(0, DIM) < HEAD_DIM)[None, :])


@triton.jit
def load_is_real(token_mask, place, is_in, HAS_MASK: tl.constexpr):
    """Returns True for the tokens that `is_in` names and that are real."""
    if HAS_MASK:
        return is_in & (tl.load(token_mask + place, mask=is_in, other=0) != 0)
    return is_in


@triton.jit
def scale_of(scales, segment, head, HEADS: tl.constexpr, HAS_SCALES: tl.constexpr):
    """Returns the factor of ω·x in a segment and head: √(1−4A) of `oprf`, else 1."""
    if HAS_SCALES:
        return tl.load(scales + segment * HEADS + head)
    return 1.0


@triton.jit
def biases_of(
    references, constants, state, segment, head, features,
    HEADS: tl.constexpr, PADDED: tl.constexpr, HAS_CONSTANTS: tl.constexpr,
):  # fmt: skip
    """Returns the references of a state for queries: with the constants of their segment."""
    bias = tl.load(references + (state * HEADS + head) * PADDED + features)
    if HAS_CONSTANTS:
        bias += tl.load(constants + (segment * HEADS + head) * PADDED + features)
    return bias


@triton.jit
def centred(rows, centre, dtype: tl.constexpr, IS_EXPONENTIAL: tl.constexpr):
    """Returns the rows of a state in a dtype, of `relu` without their centre.

    The means of `relu` are much alike: rounded as they are, the differences between them would be lost.
    """
    if IS_EXPONENTIAL:
        return rows.to(dtype)
    return (rows - centre[None, :]).to(dtype)


@triton.jit
def along_centre(vectors, centre):
    """Returns the inner product of each vector with the centre that was taken off."""
    return tl.sum(vectors.to(tl.float32) * centre[None, :], 1)


@triton.jit
def relu_features(scores):
    """Returns max(score, 0) + 1e-3, and NaN for NaN."""
    return tl.maximum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL) + RELU_OFFSET


@triton.jit
def relu_gradient(scores, grads):
    """Returns the gradient of scores from that of their features; it passes through a score of NaN."""
    return tl.where(scores <= 0, 0.0, grads)


@triton.jit
def weights_of(exponents):
    """Returns 2^exponents of shares of a sum, at most 1, which rounding of large exponents could exceed."""
    return tl.math.exp2(tl.minimum(exponents, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def query_weights(exponents, bias, sums, is_real, IS_EXPONENTIAL: tl.constexpr, HAS_MASK: tl.constexpr):
    """Returns the weights of each feature's mean for the queries (features, tokens), and the factor of its gradient.

    Both are zero where a token is not real: exponents of padding may be infinite.
    """
    if IS_EXPONENTIAL:
        weights = weights_of(exponents + bias[:, None] - sums[None, :])
        if HAS_MASK:
            weights = tl.where(is_real[None, :], weights, 0.0)
        return weights, weights
    is_counted = is_real & (sums != 0)
    shares = bias[:, None] * tl.where(is_counted, 1.0 / tl.where(is_counted, sums, 1.0), 0.0)[None, :]
    weights = relu_features(exponents) * shares
    if HAS_MASK:
        weights = tl.where(is_real[None, :], weights, 0.0)
    return weights, relu_gradient(exponents, shares)


@triton.jit
def sees(positions, others, before, after):
    """Returns whether a token sees another one, which is at most `before` ahead of it and `after` behind it."""
    distances = others[None, :] - positions[:, None]
    return (distances <= after) & (distances >= -before)


@triton.jit
def without_bad_values(values):
    """Returns values with zeros in the place of NaN and infinities."""
    return tl.where(values - values == 0, values, 0.0)


@triton.jit
def add_bad_values(total, values, visible):
    """Returns the sums of tokens (tokens, head_dim), NaN for those to which a value that is not finite is visible."""
    is_bad = tl.max(tl.where(values - values == 0, 0, 1), 1) > 0
    return tl.where((tl.max((visible & is_bad[None, :]).to(tl.int32), 1) > 0)[:, None], float("nan"), total)


@triton.jit
def half_squares(k, is_real, norm_factor):
    """Returns ‖k‖² as in the exponent, and infinity where a token is not real."""
    wide = k.to(tl.float32)
    return tl.where(is_real, tl.sum(wide * wide, 1) * norm_factor, float("inf"))


@triton.jit
def risen_weights(exponents, largest):
    """Returns the largest exponent of each row so far, the weights relative to it, and the factor of earlier sums."""
    risen = tl.maximum(largest, tl.max(exponents, 1))
    return risen, tl.math.exp2(exponents - risen[:, None]), tl.math.exp2(largest - risen)


@triton.jit
def key_features_of(exponents, squares, is_real, IS_EXPONENTIAL: tl.constexpr):
    """Returns the features of some keys (keys, features), zero where they are not real, and their references.

    The references, of each feature, are the largest exponents; zeros for `relu`.
    """
    if IS_EXPONENTIAL:
        exponents = tl.where(is_real[:, None], exponents - squares[:, None], float("-inf"))
        reference = tl.maximum(tl.max(exponents, 0), LOG_ZERO)
        return tl.math.exp2(exponents - reference[None, :]), reference
    return tl.where(is_real[:, None], relu_features(exponents), 0.0), tl.zeros([exponents.shape[1]], tl.float32)


@triton.jit
def fold_tile(
    rows, keys, values, is_real, largest, sums, context, factor, norm_factor,
    IS_EXPONENTIAL: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to a state; returns the largest exponent, the sum and the context of each feature."""
    exponents = scores(rows, keys, UPCAST) * factor
    if IS_EXPONENTIAL:
        exponents -= half_squares(keys, is_real, norm_factor)[None, :]
        if HAS_MASK:
            # Scores of padding may be infinite too.
            exponents = tl.where(is_real[None, :], exponents, float("-inf"))
        largest, key_features, shrink = risen_weights(exponents, largest)
        sums *= shrink
        context *= shrink[:, None]
    else:
        key_features = tl.where(is_real[None, :], relu_features(exponents), 0.0)
    sums += tl.sum(key_features, 1)
    return largest, sums, product(key_features.to(values.dtype), values, context, UPCAST)


@triton.jit
def finished(largest, sums, context, is_empty, IS_EXPONENTIAL: tl.constexpr):
    """Returns the means and references of a state: log2 Σ φ(k), for `relu` Σ φ(k)."""
    divisors = tl.where(is_empty, 1.0, sums)
    means = tl.where(is_empty[:, None], 0.0, context / divisors[:, None])
    if IS_EXPONENTIAL:
        return means, tl.where(is_empty, LOG_ZERO, largest + tl.math.log2(divisors))
    return means, tl.where(is_empty, 0.0, sums)
