// Numbers of float32 and of bfloat16 in memory, and the two forms in which products read them. For x86 with AVX-512.
//
// The left factor of a product lies in rows, the right one in panels of kPanelColumns columns. Units of bfloat16 take two
// neighbouring elements of the inner axis at a time: in their panels the two stand side by side, and the inner axis is
// filled up with zeros.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <immintrin.h>

#include "workspace.h"

namespace PROTLM_NAMESPACE {

// The bits of a bfloat16.
using Half = std::uint16_t;

constexpr Index kPanelColumns = 16;  // floats of a vector
constexpr Index kInnerStep = 32;     // bfloat16 of a vector

template <class T>
constexpr bool is_half = std::is_same<T, Half>::value;

constexpr Index at_most(Index limit, Index count) { return count < limit ? count : limit; }
constexpr Index round_up_columns(Index dim) { return round_up(dim, kPanelColumns); }
// The inner axis of a product.
template <class T>
constexpr Index round_up_inner(Index dim) {
    return is_half<T> ? round_up(dim, kInnerStep) : dim;
}

// A token of a tensor: strides count elements.
template <class T>
PROTLM_INLINE T* element_at(const FavorTensor& tensor, Index row, Index head, Index token) {
    return reinterpret_cast<T*>(tensor.data) + row * tensor.batch_stride + head * tensor.head_stride + token * tensor.token_stride;
}

PROTLM_INLINE __m512 load16(const float* from) { return _mm512_loadu_ps(from); }
PROTLM_INLINE void store16(float* to, __m512 x) { _mm512_storeu_ps(to, x); }

PROTLM_INLINE __mmask16 lanes_below(Index count) { return count <= 0 ? 0 : count >= 16 ? 0xffff : (1u << count) - 1; }

// Writes 32 weights and returns the sum of what was written, in parts: rounded weights that are divided by their own sum
// sum to one.
PROTLM_INLINE __m512 store_weights(float* to, __m512 left, __m512 right) {
    store16(to, left), store16(to + 16, right);
    return _mm512_add_ps(left, right);
}

// Writes `count` numbers and no more.
inline void store_columns(float* to, const float* from, Index count) {
    for (Index i = 0; i < count; i += 16) _mm512_mask_storeu_ps(to + i, lanes_below(count - i), load16(from + i));
}

// 2^x to a relative 1.5e-7, for x up to 127; 2^kSmallestExponent for smaller x; NaN stays NaN.
PROTLM_INLINE __m512 float_exp2(__m512 x) {
    // The second operand where either is NaN.
    x = _mm512_max_ps(_mm512_set1_ps(kSmallestExponent), x);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, whole);
    // The minimax polynomial of 2^f on [-1/2, 1/2].
    __m512 p = _mm512_set1_ps(0.0013264727f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.009671513f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.055507336f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24022242f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693147f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

// Transposes 16 rows of 16 words of 32 bits, a float or two bfloat16; strides count elements.
template <class T>
inline void transpose_words(const T* from, Index stride, T* to) {
    constexpr Index row = 64 / sizeof(T);
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4g + c] holds, in its quarter k, word 4k + c of the rows 4g ... 4g + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i low_even = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), low_odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        const __m512i high_even = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88), high_odd = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        _mm512_storeu_si512(to + (0 + c) * row, _mm512_shuffle_i32x4(low_even, high_even, 0x88));
        _mm512_storeu_si512(to + (8 + c) * row, _mm512_shuffle_i32x4(low_even, high_even, 0xdd));
        _mm512_storeu_si512(to + (4 + c) * row, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
        _mm512_storeu_si512(to + (12 + c) * row, _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
    }
}

// Rows [count][inner] as columns: panels [count / kPanelColumns][inner][kPanelColumns].
inline void pack_as_columns(const float* rows, Index count, Index inner, float* panels) {
    for (Index i = 0; i < count; i += kPanelColumns) {
        Index c = 0;
        for (; c + 16 <= inner; c += 16, panels += 16 * kPanelColumns) transpose_words(rows + i * inner + c, inner, panels);
        for (; c < inner; ++c, panels += kPanelColumns)
            for (Index lane = 0; lane < kPanelColumns; ++lane) panels[lane] = rows[(i + lane) * inner + c];
    }
}

// Rows [count][stride], of which the first `columns` count, as the inner axis: panels
// [columns / kPanelColumns][count][kPanelColumns], filled up with zeros.
inline void pack_as_inner(const float* rows, Index stride, Index count, Index columns, float* panels) {
    for (Index c = 0; c < columns; c += kPanelColumns)
        for (Index i = 0; i < count; ++i, panels += kPanelColumns)
            store16(panels, _mm512_maskz_loadu_ps(lanes_below(stride - c), rows + i * stride + c));
}

// Copies a vector.
PROTLM_INLINE void copy_row(const float* from, Index dim, Index, float* to) {
    for (Index c = 0; c < dim; c += 16)
        _mm512_mask_storeu_ps(to + c, lanes_below(dim - c), _mm512_maskz_loadu_ps(lanes_below(dim - c), from + c));
}

#if PROTLM_BFLOAT16

PROTLM_INLINE __m512 store_weights(Half* to, __m512 left, __m512 right) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(right, left);
    __m512i both;
    std::memcpy(&both, &rounded, sizeof both);
    _mm512_storeu_si512(to, both);
    const __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)), even = _mm512_slli_epi32(both, 16);
    return _mm512_add_ps(_mm512_castsi512_ps(odd), _mm512_castsi512_ps(even));
}

// Adds the products of 32 numbers, in parts.
PROTLM_INLINE __m512 add_products(__m512 sums, const Half* a, const Half* b) {
    __m512bh left, right;
    std::memcpy(&left, a, sizeof left), std::memcpy(&right, b, sizeof right);
    return _mm512_dpbf16_ps(sums, left, right);
}

// 16 numbers of a row as float32, and float32 as such numbers.
PROTLM_INLINE __m512 widened(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }
PROTLM_INLINE __m512 widened(const Half* from) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
PROTLM_INLINE __m256i halves_of(__m512 x) {
    const __m256bh narrow = _mm512_cvtneps_pbh(x);
    return reinterpret_cast<const __m256i&>(narrow);
}
PROTLM_INLINE __m512 rounded(__m512 x) { return widened(halves_of(x)); }

// As store_columns, of numbers that are rounded; before that they are multiplied by a factor.
inline void store_scaled(Half* to, const float* from, float factor, Index count) {
    for (Index i = 0; i < count; i += 16) {
        const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes_below(count - i), from + i), _mm512_set1_ps(factor));
        _mm256_mask_storeu_epi16(to + i, lanes_below(count - i), halves_of(scaled));
    }
}
inline void store_columns(Half* to, const float* from, Index count) { store_scaled(to, from, 1.0f, count); }

// 2^x to a relative 8e-5, which the rounding to bfloat16 hides, for x up to 127; 2^kSmallestExponent for smaller x; NaN stays NaN.
PROTLM_INLINE __m512 half_exp2(__m512 x) {
    // The second operand where either is NaN.
    x = _mm512_max_ps(_mm512_set1_ps(kSmallestExponent), x);
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    // The minimax polynomial of 2^f on [0, 1).
    __m512 p = _mm512_set1_ps(0.078024514f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.22606717f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69583356f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999252f));
    return _mm512_scalef_ps(p, x);
}

// As for float32: panels [count / kPanelColumns][inner / 2][kPanelColumns][2].
inline void pack_as_columns(const Half* rows, Index count, Index inner, Half* panels) {
    for (Index i = 0; i < count; i += kPanelColumns)
        for (Index c = 0; c < inner; c += kInnerStep)
            transpose_words(rows + i * inner + c, inner, panels + i * inner + c * kPanelColumns);
}

PROTLM_INLINE __m512i interleaved(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// As for float32: panels [columns / kPanelColumns][count / 2][kPanelColumns][2].
inline void pack_as_inner(const Half* rows, Index stride, Index count, Index columns, Half* panels) {
    for (Index c = 0; c < columns; c += kPanelColumns)
        for (Index i = 0; i < count; i += 2, panels += 2 * kPanelColumns) {
            const Half* const x = rows + i * stride + c;
            _mm512_storeu_si512(panels, interleaved(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)),
                                                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + stride))));
        }
}

// The same of numbers that are rounded on the way.
inline void pack_rounded_as_inner(const float* rows, Index stride, Index count, Index columns, Half* panels) {
    for (Index c = 0; c < columns; c += kPanelColumns)
        for (Index i = 0; i < count; i += 2, panels += 2 * kPanelColumns) {
            const float* const x = rows + i * stride + c;
            _mm512_storeu_si512(panels, interleaved(halves_of(load16(x)), halves_of(load16(x + stride))));
        }
}

// Writes 16 numbers of a row, and those of two rows as two neighbours of the inner axis.
PROTLM_INLINE void store_row(Half* to, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves_of(x)); }
PROTLM_INLINE void store_pair(Half* to, const __m512 (&x)[2]) {
    _mm512_storeu_si512(to, interleaved(halves_of(x[0]), halves_of(x[1])));
}

// Rows [count][inner], a multiple of kInnerStep of them, as their columns: [inner][stride].
inline void transpose_rows(const Half* rows, Index count, Index inner, Half* to, Index stride) {
    for (Index i = 0; i < count; i += kInnerStep)
        for (Index c = 0; c < inner; c += kPanelColumns) {
            Half pairs[kPanelColumns * kInnerStep], turned[kPanelColumns * kInnerStep];
            pack_as_inner(rows + i * inner + c, inner, kInnerStep, kPanelColumns, pairs);
            transpose_words(pairs, kInnerStep, turned);
            for (Index r = 0; r < kPanelColumns; ++r)
                std::memcpy(to + (c + r) * stride + i, turned + r * kInnerStep, sizeof(Half) * kInnerStep);
        }
}

// a·b of rows whose length is a multiple of kInnerStep.
inline float product_of(const Half* a, const Half* b, Index count) {
    __m512 sums = _mm512_setzero_ps();
    for (Index i = 0; i < count; i += kInnerStep) sums = add_products(sums, a + i, b + i);
    return _mm512_reduce_add_ps(sums);
}

// Copies a vector, filled up with zeros to `inner`.
PROTLM_INLINE void copy_row(const Half* from, Index dim, Index inner, Half* to) {
    for (Index c = 0; c < inner; c += kInnerStep) {
        const __mmask32 mask = dim - c < kInnerStep ? (1u << (dim - c)) - 1 : 0xffffffff;
        _mm512_storeu_si512(to + c, _mm512_maskz_loadu_epi16(mask, from + c));
    }
}

// ‖x‖² of a row whose length is a multiple of kInnerStep.
inline float square_of(const Half* x, Index count) {
    __m512 sums = _mm512_setzero_ps();
    for (Index i = 0; i < count; i += kInnerStep) {
        const __m512i both = _mm512_loadu_si512(x + i);
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        sums = _mm512_fmadd_ps(odd, odd, _mm512_fmadd_ps(even, even, sums));
    }
    return _mm512_reduce_add_ps(sums);
}

#endif

}  // namespace PROTLM_NAMESPACE
