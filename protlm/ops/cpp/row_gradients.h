// Gradients of attention of rows to blocks of keys, of bfloat16: what the backwards of exact attention and of both halves
// of FAVOR consist of.
//
// Weights are computed again from the logarithms of their sums, which are among the exponents. Every row and key has a
// partner: the gradient of a weight is their product, plus a number of the row times one of the key. All sums are float32;
// weights and gradients of exponents are rounded before they are multiplied.

#pragma once

#include "row_attention.h"

namespace PROTLM_NAMESPACE {

// Rows over which one product sums: reading and writing the sums is what takes time.
constexpr Index kStripeRows = 128;
// Of panels whose inner axis is a stripe: no power of two, which would put all panels in the same part of the cache.
constexpr Index kStripePanel = kStripeRows * kPanelColumns + kInnerStep;

// Of kUnitRows rows.
struct GradientRows {
    const Half *rows, *partners;       // [kUnitRows][inner]
    const float *exponents, *factors;  // added to exponents; of weights, or null
    const float* grads;
};

// Of at most kBlockKeys keys, a multiple of kUnitColumns.
struct GradientKeys {
    const Half *columns, *partners;  // both as columns
    const float *exponents, *grads;
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

// The weights of two rows and 16 keys, and the gradients of their exponents, or of the scores of ReLU.
struct WeightPairs {
    __m512 weights[2], grads[2];
};

// Writes 16 numbers of a row, and those of two rows as two neighbours of the inner axis.
PROTLM_INLINE void store_row(Half* to, __m512 x) {
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<const __m256i&>(rounded));
}
PROTLM_INLINE void store_pair(Half* to, const __m512 (&x)[2]) {
    const __m256bh even = _mm512_cvtneps_pbh(x[0]), odd = _mm512_cvtneps_pbh(x[1]);
    _mm512_storeu_si512(to, interleaved(reinterpret_cast<const __m256i&>(even), reinterpret_cast<const __m256i&>(odd)));
}

// 16 numbers of a row as float32.
PROTLM_INLINE __m512 widened(const Half* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Rows [count][inner], a multiple of 32 of them, as their columns: [inner][kStripeRows].
inline void transpose_rows(const Half* rows, Index count, Index inner, Half* to) {
    for (Index i = 0; i < count; i += 2 * kPanelColumns)
        for (Index c = 0; c < inner; c += kPanelColumns) {
            Half pairs[kPanelColumns * 2 * kPanelColumns], turned[kPanelColumns * 2 * kPanelColumns];
            pack_as_inner(rows + i * inner + c, inner, 2 * kPanelColumns, kPanelColumns, pairs);
            transpose_words(pairs, 2 * kPanelColumns, turned);
            for (Index r = 0; r < kPanelColumns; ++r)
                std::memcpy(to + (c + r) * kStripeRows + i, turned + r * 2 * kPanelColumns, sizeof(Half) * 2 * kPanelColumns);
        }
}

// a·b of rows whose length is a multiple of kInnerStep.
inline float product_of(const Half* a, const Half* b, Index count) {
    __m512 sums = _mm512_setzero_ps();
    for (Index i = 0; i < count; i += kInnerStep) sums = add_products(sums, a + i, b + i);
    return _mm512_reduce_add_ps(sums);
}

// What kUnitRows rows and a block of keys have together.
template <bool kExponential>
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
                        const __m512 exponents = _mm512_add_ps(load16(keys.exponents + i), _mm512_set1_ps(rows.exponents[row]));
                        weight = half_exp2(_mm512_fmadd_ps(score, scales, exponents));
                        if (rows.factors) weight = _mm512_mul_ps(weight, _mm512_set1_ps(rows.factors[row]));
                        if (kHides) weight = _mm512_maskz_mov_ps(band.lanes(row, i), weight);
                        pairs.grads[n] = _mm512_mul_ps(weight, grad);
                    } else {
                        const __m512 scaled = _mm512_mul_ps(score, scales);
                        // The larger one is the second operand where either is NaN.
                        weight = _mm512_add_ps(_mm512_max_ps(zero, scaled), offset);
                        pairs.grads[n] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(scaled, zero, _CMP_NLE_UQ), grad);
                    }
                }
                take(r, i, pairs);
            }
    }
};

}  // namespace PROTLM_NAMESPACE
