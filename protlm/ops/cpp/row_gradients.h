// Gradients of attention of rows to blocks of keys, of bfloat16: what the backwards of exact attention and of both halves
// of FAVOR consist of.
//
// Weights are computed again from what the forward has told of their sums. Every row and key has a partner: the gradient of a weight is
// their product, plus a number of the row times one of the key. All sums are float32; a weight is rounded before anything
// reads it, so that sums over weights fit together, and the gradient of an exponent before it is multiplied.

#pragma once

#include "row_attention.h"

namespace PROTLM_NAMESPACE {

// Rows over which one product sums: reading and writing the sums is what takes time.
constexpr Index kStripeRows = 128;
// Of panels whose inner axis is a stripe: no power of two, which would put all panels in the same part of the cache.
constexpr Index kStripePanel = kStripeRows * kPanelColumns + kInnerStep;

// Of kUnitRows rows.
struct GradientRows {
    const Half *rows, *partners;  // [kUnitRows][inner]
    const float* exponents;       // added to those of the weights
    const float* factors;         // of the weights, or null
    const float* grads;           // the number of each that is multiplied by that of the key
};

// Of keys, a multiple of kUnitColumns.
struct GradientKeys {
    const Half *columns, *partners;  // both as columns
    const float *exponents, *grads;  // as of rows
    Index count;

    // The part of it from a multiple of kUnitColumns on.
    GradientKeys part(Index first, Index part_count, Index inner) const {
        return {columns + first * inner, partners + first * inner, exponents + first, grads + first, part_count};
    }
};

struct GradientScratch {
    float *scores, *products;  // [kUnitRows][kBlockKeys]

    template <class Take>
    explicit GradientScratch(Take&& take) : scores(take(kUnitRows * kBlockKeys)), products(take(kUnitRows * kBlockKeys)) {}
};

// The weights of two rows and 16 keys, rounded, and the gradients of their exponents, or of the scores of ReLU.
struct WeightPairs {
    __m512 weights[2], grads[2];
};

// Whose exponents the forward added to a score before it rounded the sum: among large numbers another order would give other
// weights.
enum class AddedFirst { kOfRow, kOfKey };

// What kUnitRows rows and at most kBlockKeys keys have together.
template <bool kExponential, AddedFirst kFirst>
struct RowGradients {
    const GradientScratch& scratch;
    const Index inner;
    const float scale;

    // Calls take(first of two rows, first of 16 keys, WeightPairs) for all of them; what a row does not see has weight 0.
    template <class Take>
    PROTLM_INLINE void compute(const GradientRows& rows, const GradientKeys& keys, const Band& band, Take&& take) const {
        const Index stride = inner * kPanelColumns;
        multiply<false>(rows.rows, inner, keys.columns, stride, inner, keys.count, scratch.scores, kBlockKeys);
        multiply<false>(rows.partners, inner, keys.partners, stride, inner, keys.count, scratch.products, kBlockKeys);
        if (band.hides(keys.count))
            for_each_pair<true>(rows, keys, band, take);
        else
            for_each_pair<false>(rows, keys, band, take);
    }

private:
    template <bool kHides, class Take>
    PROTLM_INLINE void for_each_pair(const GradientRows& rows, const GradientKeys& keys, const Band& band, Take&& take) const {
        const __m512 scales = _mm512_set1_ps(scale), zero = _mm512_setzero_ps(), offset = _mm512_set1_ps(kReluOffset);
        for (Index r = 0; r < kUnitRows; r += 2)
            for (Index i = 0; i < keys.count; i += 16) {
                WeightPairs pairs;
#pragma GCC unroll 2
                for (int n = 0; n < 2; ++n) {
                    const Index row = r + n, place = row * kBlockKeys + i;
                    const __m512 score = load16(scratch.scores + place);
                    const __m512 grad = _mm512_fmadd_ps(_mm512_set1_ps(rows.grads[row]), load16(keys.grads + i),
                                                        load16(scratch.products + place));
                    __m512& weight = pairs.weights[n];
                    if constexpr (kExponential) {
                        const __m512 of_row = _mm512_set1_ps(rows.exponents[row]), of_key = load16(keys.exponents + i);
                        constexpr bool kRowFirst = kFirst == AddedFirst::kOfRow;
                        const __m512 exponent = _mm512_fmadd_ps(score, scales, kRowFirst ? of_row : of_key);
                        weight = half_exp2(_mm512_add_ps(exponent, kRowFirst ? of_key : of_row));
                        if (rows.factors) weight = _mm512_mul_ps(weight, _mm512_set1_ps(rows.factors[row]));
                        if (kHides) weight = _mm512_maskz_mov_ps(band.lanes(row, i), weight);
                        weight = rounded(weight);
                        pairs.grads[n] = _mm512_mul_ps(weight, grad);
                    } else {
                        const __m512 scaled = _mm512_mul_ps(score, scales);
                        // The larger one is the second operand where either is NaN.
                        weight = rounded(_mm512_add_ps(_mm512_max_ps(zero, scaled), offset));
                        pairs.grads[n] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(scaled, zero, _CMP_NLE_UQ), grad);
                    }
                }
                take(r, i, pairs);
            }
    }
};

}  // namespace PROTLM_NAMESPACE
