// Products summed in float32: of float32, and where PROTLM_BFLOAT16 is 1 of bfloat16, on AMX where PROTLM_AMX is 1, else on
// the dot products of AVX512-BF16.
//
// The left factor is kUnitRows rows, the right one panels as packing512.h makes them. No element of a result depends on
// its neighbours.

#pragma once

#include "packing512.h"

namespace PROTLM_NAMESPACE {

constexpr Index kUnitRows = 32;
// Columns of a result that are computed together.
constexpr Index kUnitColumns = 2 * kPanelColumns;

// What one step along the inner axis multiplies and adds in vectors.
template <class T>
struct VectorStep;

template <>
struct VectorStep<float> {
    using Vector = __m512;
    static constexpr Index kElements = 1;
    PROTLM_INLINE static Vector left(const float* element) { return _mm512_set1_ps(*element); }
    PROTLM_INLINE static Vector right(const float* panel) { return load16(panel); }
    PROTLM_INLINE static __m512 add(__m512 sums, Vector left, Vector right) { return _mm512_fmadd_ps(left, right, sums); }
};

#if PROTLM_BFLOAT16
template <>
struct VectorStep<Half> {
    using Vector = __m512bh;
    static constexpr Index kElements = 2;
    PROTLM_INLINE static Vector left(const Half* elements) {
        std::int32_t pair;
        std::memcpy(&pair, elements, sizeof pair);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    PROTLM_INLINE static Vector right(const Half* panel) { return (__m512bh)_mm512_loadu_si512(panel); }
    PROTLM_INLINE static __m512 add(__m512 sums, Vector left, Vector right) { return _mm512_dpbf16_ps(sums, left, right); }
};
#endif

// Writes, or adds, to kUnitRows rows [stride] the product of rows [row_stride] and one or two panels of columns.
template <bool kTwo, bool kAdds, class T>
inline void multiply_panels(const T* rows, Index row_stride, const T* panel, Index panel_stride, Index inner, float* to,
                            Index stride) {
    using Step = VectorStep<T>;
    // With two panels their sums cover the latency of the multiply-adds.
    constexpr int kChainRows = 8, kPanels = kTwo ? 2 : 1;
    for (Index first = 0; first < kUnitRows; first += kChainRows, rows += kChainRows * row_stride, to += kChainRows * stride) {
        __m512 sums[kChainRows][kPanels];
#pragma GCC unroll 8
        for (int r = 0; r < kChainRows; ++r)
            for (int p = 0; p < kPanels; ++p)
                sums[r][p] = kAdds ? load16(to + r * stride + p * kPanelColumns) : _mm512_setzero_ps();
        for (Index i = 0; i < inner; i += Step::kElements) {
            typename Step::Vector right[kPanels];
            for (int p = 0; p < kPanels; ++p) right[p] = Step::right(panel + p * panel_stride + i * kPanelColumns);
#pragma GCC unroll 8
            for (int r = 0; r < kChainRows; ++r) {
                const typename Step::Vector left = Step::left(rows + r * row_stride + i);
                for (int p = 0; p < kPanels; ++p) sums[r][p] = Step::add(sums[r][p], left, right[p]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kChainRows; ++r)
            for (int p = 0; p < kPanels; ++p) store16(to + r * stride + p * kPanelColumns, sums[r][p]);
    }
}

#if PROTLM_AMX

// The tiles of a thread: each 16 rows of 64 bytes. Whoever used the unit before finds its own configuration again.
class Units {
public:
    Units() {
        asm volatile("sttilecfg %0" : "=m"(before_));
        Configuration own{};
        own.palette = 1;
        for (int i = 0; i < 8; ++i) own.row_bytes[i] = 64, own.rows[i] = 16;
        asm volatile("ldtilecfg %0" ::"m"(own));
    }
    ~Units() { asm volatile("ldtilecfg %0" ::"m"(before_)); }
    Units(const Units&) = delete;

private:
    struct Configuration {
        std::uint8_t palette, start_row, reserved[14];
        std::uint16_t row_bytes[16];
        std::uint8_t rows[16];
    };
    Configuration before_;
};

// Not the compiler's own, which do not say that they read memory.
template <int kTile>
PROTLM_INLINE void tile_load(const void* from, Index stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
PROTLM_INLINE void tile_store(void* to, Index stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
PROTLM_INLINE void tile_clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kSum, int kLeft, int kRight>
PROTLM_INLINE void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

// The same by tiles, which the compiler prefers for bfloat16 to the form for any type.
template <bool kTwo, bool kAdds>
inline void multiply_panels(const Half* rows, Index row_stride, const Half* panel, Index panel_stride, Index inner, float* to,
                            Index stride) {
    constexpr Index kHalfRows = kUnitRows / 2;
    const Index bytes = stride * sizeof(float);
    float* const lower = to + kHalfRows * stride;
    if (kAdds) {
        tile_load<0>(to, bytes), tile_load<1>(lower, bytes);
        if (kTwo) tile_load<2>(to + kPanelColumns, bytes), tile_load<3>(lower + kPanelColumns, bytes);
    } else {
        tile_clear<0>(), tile_clear<1>();
        if (kTwo) tile_clear<2>(), tile_clear<3>();
    }
    for (Index i = 0; i < inner; i += kInnerStep) {
        tile_load<4>(rows + i, row_stride * sizeof(Half));
        tile_load<5>(rows + i + kHalfRows * row_stride, row_stride * sizeof(Half));
        tile_load<6>(panel + i * kPanelColumns, 64);
        tile_multiply<0, 4, 6>(), tile_multiply<1, 5, 6>();
        if (!kTwo) continue;
        tile_load<7>(panel + panel_stride + i * kPanelColumns, 64);
        tile_multiply<2, 4, 7>(), tile_multiply<3, 5, 7>();
    }
    tile_store<0>(to, bytes), tile_store<1>(lower, bytes);
    if (kTwo) tile_store<2>(to + kPanelColumns, bytes), tile_store<3>(lower + kPanelColumns, bytes);
}

// The product of short rows, whose tiles stay where they are for all columns: loading tiles is what takes time.
template <int kSteps>
inline void multiply_short(const Half* rows, Index row_stride, const Half* panels, Index panel_stride, Index columns, float* to,
                           Index stride) {
    constexpr Index kHalfRows = kUnitRows / 2;
    const Index row_bytes = row_stride * sizeof(Half), bytes = stride * sizeof(float);
    tile_load<2>(rows, row_bytes), tile_load<3>(rows + kHalfRows * row_stride, row_bytes);
    if (kSteps == 2) {
        tile_load<4>(rows + kInnerStep, row_bytes);
        tile_load<5>(rows + kInnerStep + kHalfRows * row_stride, row_bytes);
    }
    for (Index c = 0; c < columns; c += kPanelColumns, panels += panel_stride) {
        tile_clear<0>(), tile_clear<1>();
        tile_load<6>(panels, 64);
        tile_multiply<0, 2, 6>(), tile_multiply<1, 3, 6>();
        if (kSteps == 2) {
            tile_load<7>(panels + kInnerStep * kPanelColumns, 64);
            tile_multiply<0, 4, 7>(), tile_multiply<1, 5, 7>();
        }
        tile_store<0>(to + c, bytes), tile_store<1>(to + c + kHalfRows * stride, bytes);
    }
}

#else

// Nothing to prepare; with a constructor a variable of it is not unused.
class Units {
public:
    Units() {}
};

#endif

// Writes, or adds, to kUnitRows rows [stride] the product of rows [row_stride] and `columns` columns.
template <bool kAdds, class T>
inline void multiply(const T* rows, Index row_stride, const T* panels, Index panel_stride, Index inner, Index columns,
                     float* to, Index stride) {
#if PROTLM_AMX
    if constexpr (is_half<T> && !kAdds) {
        if (inner == kInnerStep) return multiply_short<1>(rows, row_stride, panels, panel_stride, columns, to, stride);
        if (inner == 2 * kInnerStep) return multiply_short<2>(rows, row_stride, panels, panel_stride, columns, to, stride);
    }
#endif
    Index c = 0;
    for (; c + kUnitColumns <= columns; c += kUnitColumns, panels += 2 * panel_stride)
        multiply_panels<true, kAdds>(rows, row_stride, panels, panel_stride, inner, to + c, stride);
    if (c < columns) multiply_panels<false, kAdds>(rows, row_stride, panels, panel_stride, inner, to + c, stride);
}

}  // namespace PROTLM_NAMESPACE
