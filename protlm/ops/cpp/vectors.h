// Vectors of PROTLM_LANES floats, in the vector extensions of GCC and clang: the same code for every machine.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#define PROTLM_INLINE inline __attribute__((always_inline))

namespace PROTLM_NAMESPACE {

constexpr int kLanes = PROTLM_LANES;
// Columns of a tile of a matrix product: two vectors.
constexpr int kPanel = 2 * kLanes;

typedef float Vec __attribute__((vector_size(4 * PROTLM_LANES)));
typedef float LooseVec __attribute__((vector_size(4 * PROTLM_LANES), aligned(4), may_alias));
typedef std::uint32_t Bits __attribute__((vector_size(4 * PROTLM_LANES)));
typedef std::int32_t Ints __attribute__((vector_size(4 * PROTLM_LANES)));

PROTLM_INLINE Vec load(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }
PROTLM_INLINE void store(float* to, Vec x) { *reinterpret_cast<LooseVec*>(to) = x; }
PROTLM_INLINE Vec all(float x) { return x - Vec{}; }
// The second argument where either is NaN. (Compilers turn the plain form into a comparison and a blend.)
PROTLM_INLINE Vec larger(Vec a, Vec b) {
#if PROTLM_LANES == 16 && defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif PROTLM_LANES == 8 && defined(__AVX__)
    return _mm256_max_ps(a, b);
#elif PROTLM_LANES == 4 && defined(__SSE__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

PROTLM_INLINE float sum_of(Vec x) {
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += x[i];
    return sum;
}

PROTLM_INLINE bool any(Ints x) {
#if PROTLM_LANES == 16 && defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif PROTLM_LANES == 8 && defined(__AVX__)
    return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
    std::int32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= x[i];
    return bits != 0;
#endif
}

// NaN if a lane is.
PROTLM_INLINE float largest_of(Vec x) {
#if PROTLM_LANES == 16 && defined(__AVX512F__)
    return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) ? NAN : _mm512_reduce_max_ps(x);
#else
    float largest = x[0];
    for (int i = 1; i < kLanes; ++i) largest = x[i] > largest || x[i] != x[i] ? x[i] : largest;
    return largest;
#endif
}

PROTLM_INLINE bool all_of(Ints x) {
    std::int32_t bits = -1;
    for (int i = 0; i < kLanes; ++i) bits &= x[i];
    return bits != 0;
}

// exp2 of smaller exponents is that of this one: negligible beside the largest weight, and far above the denormals.
constexpr float kSmallestExponent = -100.0f;

// 2^x to a relative 1.5e-7, for x up to 127; 2^kSmallestExponent for smaller x; NaN for the NaN of arithmetic. For larger
// x any number, which is no fault: features are computed before their largest exponent is known, and again if need be.
PROTLM_INLINE Vec exp2(Vec x) {
    x = larger(all(kSmallestExponent), x);
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits.
    const Vec shifted = x + 12582912.0f;
    const Vec f = x - (shifted - 12582912.0f);
    // The minimax polynomial of 2^f on [-1/2, 1/2].
    Vec p = all(0.0013264727f);
    p = p * f + 0.009671513f;
    p = p * f + 0.055507336f;
    p = p * f + 0.24022242f;
    p = p * f + 0.693147f;
    p = p * f + 1.0f;
    // Unsigned, since signed numbers may not overflow.
    return (Vec)((Bits)p + ((Bits)shifted << 23));
}

inline float dot(const float* a, const float* b, std::int64_t count) {
    Vec sums = {};
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) sums = load(a + i) * load(b + i) + sums;
    float sum = sum_of(sums);
    for (; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

}  // namespace PROTLM_NAMESPACE
