// Attention of rows to blocks of keys: what exact attention and both halves of FAVOR consist of.
//
// A row keeps a reference, its sum of weights relative to 2^reference, and its weighted sum of values; where a later
// exponent is far above the reference, both sums shrink. All sums are float32; weights of bfloat16 are rounded before they
// are summed and multiplied. ReLU features are weights without an exponent.

#pragma once

#include "matrix_units.h"

namespace PROTLM_NAMESPACE {

// Keys whose weights are computed together: with those of kUnitRows rows they stay in the first-level cache.
constexpr Index kBlockKeys = 128;
// Added to the exponent of what only fills a panel up.
constexpr float kNoKey = -3.0e38f;
// The most by which an exponent may exceed the reference of its row.
constexpr float kLargestRise = 24.0f;

// What rows have summed.
struct RowSums {
    float *references;  // [rows]
    float *totals;      // [rows][16], in parts
    float *values;      // [rows][columns]

    RowSums at(Index row, Index columns) const {
        return {references + row, totals + row * kPanelColumns, values + row * columns};
    }
    void clear(Index rows, Index columns) const {
        for (Index r = 0; r < rows; ++r) references[r] = -INFINITY;
        std::memset(totals, 0, sizeof(float) * rows * kPanelColumns);
        std::memset(values, 0, sizeof(float) * rows * columns);
    }
    float total(Index row) const { return _mm512_reduce_add_ps(load16(totals + row * kPanelColumns)); }
    // Floats of one row.
    static constexpr Index floats(Index columns) { return columns + kPanelColumns + 1; }
    static RowSums in(float* memory, Index rows, Index columns) {
        float* const totals = memory + rows * columns;
        return {totals + rows * kPanelColumns, totals, memory};
    }
};

// Keys as columns and values as the inner axis of the two products; `count` is a multiple of kUnitColumns.
template <class T>
struct PackedKeys {
    const T *columns, *values;
    Index values_stride;   // of panels
    const float* biases;   // added to exponents
    const T* weights;      // of ReLU features in the totals
    Index count;

    // The part of it from a multiple of kUnitColumns on.
    PackedKeys part(Index first, Index part_count, Index inner) const {
        return {columns + first * inner, values + first * kPanelColumns, values_stride, biases + first, weights + first, part_count};
    }
};

// Which keys of a block each row sees: row r those from r + first to before r + last.
struct Band {
    Index first, last;

    static Band whole(Index count) { return {-kUnitRows, count}; }
    bool hides(Index count) const { return first + kUnitRows - 1 > 0 || last < count; }
    __mmask16 lanes(Index row, Index key) const { return lanes_below(row + last - key) & ~lanes_below(row + first - key); }
};

// Takes memory for elements from that of a thread; `take` returns so many floats.
template <class T, class Take>
T* take_elements(Take&& take, Index count) {
    return reinterpret_cast<T*>(take(round_up(count, 2) * static_cast<Index>(sizeof(T)) / static_cast<Index>(sizeof(float))));
}

// The scratch memory of a thread, laid out from an address on, and how many floats it takes. Its constructor is given the
// sizes of the call and `take`, and its last member is `end`.
template <class Scratch, class Sizes>
Scratch scratch_at(float* memory, const Sizes& sizes) {
    return Scratch(sizes, [&memory](Index count) {
        float* const taken = memory;
        memory += round_up(count, 16);
        return taken;
    });
}
template <class Scratch, class Sizes>
Index scratch_floats(const Sizes& sizes) {
    return scratch_at<Scratch>(nullptr, sizes).end - static_cast<float*>(nullptr);
}

template <class T>
struct RowScratch {
    float* scores;  // [kUnitRows][kBlockKeys]
    T* weights;     // likewise; those of float32 in place of the scores

    template <class Take>
    explicit RowScratch(Take&& take) : scores(take(kUnitRows * kBlockKeys)) {
        weights = is_half<T> ? take_elements<T>(take, kUnitRows * kBlockKeys) : reinterpret_cast<T*>(scores);
    }
};

// Makes the largest of some exponents the reference of a row, where it is far above it.
inline void raise_reference(const RowSums& sums, Index row, Index columns, __m512 exponents) {
    float& reference = sums.references[row];
    const float largest = _mm512_reduce_max_ps(exponents);
    if (!(largest > reference + kLargestRise)) return;
    const __m512 shrink = float_exp2(_mm512_set1_ps(reference - largest));
    reference = largest;
    float *const totals = sums.totals + row * kPanelColumns, *const values = sums.values + row * columns;
    store16(totals, _mm512_mul_ps(load16(totals), shrink));
    for (Index c = 0; c < columns; c += 16) store16(values + c, _mm512_mul_ps(load16(values + c), shrink));
}

// Attention of kUnitRows rows at a time to at most kBlockKeys keys.
template <class T, bool kExponential>
struct RowAttention {
    const RowScratch<T>& scratch;
    const Index inner, columns;
    const float scale;

    // Adds keys to the sums of rows [kUnitRows][inner].
    void add(const T* rows, const PackedKeys<T>& block, const Band& band, const RowSums& sums) const {
        multiply<false>(rows, inner, block.columns, inner * kPanelColumns, inner, block.count, scratch.scores, kBlockKeys);
        if constexpr (!kExponential)
            for (Index r = 0; r < kUnitRows; ++r) relu_weights(block, sums, r);
        else if (band.hides(block.count))
            for (Index r = 0; r < kUnitRows; ++r) exponential_weights<true>(block, band, sums, r);
        else
            for (Index r = 0; r < kUnitRows; ++r) exponential_weights<false>(block, band, sums, r);
        multiply<true>(scratch.weights, kBlockKeys, block.values, block.values_stride, block.count, columns, sums.values, columns);
    }

    PROTLM_INLINE static __m512 exponential(__m512 x) {
#if PROTLM_BFLOAT16
        if (is_half<T>) return half_exp2(x);
#endif
        return float_exp2(x);
    }

    // Turns the scores of a row into weights.
    template <bool kHides>
    PROTLM_INLINE void exponential_weights(const PackedKeys<T>& block, const Band& band, const RowSums& sums, Index row) const {
        float *const scores = scratch.scores + row * kBlockKeys, *const totals = sums.totals + row * kPanelColumns;
        T* const weights = scratch.weights + row * kBlockKeys;
        const __m512 scales = _mm512_set1_ps(scale);
        __m512 largest = _mm512_set1_ps(-INFINITY);
        for (Index i = 0; i < block.count; i += 16) {
            const __m512 x = _mm512_fmadd_ps(load16(scores + i), scales, load16(block.biases + i));
            store16(scores + i, x);
            largest = kHides ? _mm512_mask_max_ps(largest, band.lanes(row, i), largest, x) : _mm512_max_ps(largest, x);
        }
        const __m512 limit = _mm512_set1_ps(sums.references[row] + kLargestRise);
        if (__builtin_expect(_mm512_cmp_ps_mask(largest, limit, _CMP_NLE_UQ) != 0, 0))
            raise_reference(sums, row, columns, largest);
        const __m512 reference = _mm512_set1_ps(sums.references[row]);
        __m512 total = load16(totals);
        for (Index i = 0; i < block.count; i += 32) {
            __m512 left = exponential(_mm512_sub_ps(load16(scores + i), reference));
            __m512 right = exponential(_mm512_sub_ps(load16(scores + i + 16), reference));
            if (kHides) {
                left = _mm512_maskz_mov_ps(band.lanes(row, i), left);
                right = _mm512_maskz_mov_ps(band.lanes(row, i + 16), right);
            }
            total = _mm512_add_ps(total, store_weights(weights + i, left, right));
        }
        store16(totals, total);
    }

    // Those of bfloat16 alone.
    PROTLM_INLINE void relu_weights(const PackedKeys<T>& block, const RowSums& sums, Index row) const {
        const float* const scores = scratch.scores + row * kBlockKeys;
        float* const totals = sums.totals + row * kPanelColumns;
        T* const weights = scratch.weights + row * kBlockKeys;
        const __m512 scales = _mm512_set1_ps(scale), offset = _mm512_set1_ps(kReluOffset), zero = _mm512_setzero_ps();
        const auto feature = [&](Index i) __attribute__((always_inline)) {
            // The larger one is the second operand where either is NaN.
            return _mm512_add_ps(_mm512_max_ps(zero, _mm512_mul_ps(load16(scores + i), scales)), offset);
        };
        __m512 total = load16(totals);
        for (Index i = 0; i < block.count; i += 32) {
            store_weights(weights + i, feature(i), feature(i + 16));
            total = add_products(total, weights + i, block.weights + i);
        }
        store16(totals, total);
    }
};

}  // namespace PROTLM_NAMESPACE
