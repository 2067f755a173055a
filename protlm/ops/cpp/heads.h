// Queries and keys before attention, in one pass: a convolution along the segment, the length that the head gives its
// vectors, and the rotation by their position; and the gradients of the last two.
//
// With y = R·s·x/‖x‖ and g the gradient of y, the gradient of x is Rᵀ(g − y·(y·g)/s²)·s/‖x‖, and that of s is (y·g)/s
// summed over tokens: y is enough.

#pragma once

#include <cmath>

#include <omp.h>

#include "call.h"
#include "workspace.h"

namespace PROTLM_NAMESPACE {

// Tokens of a block; the sums of a block are added in their order, whatever the number of threads.
constexpr Index kHeadsTokens = 64;  // heads_cpp._BLOCK_TOKENS
constexpr Index kLargestHead = 512;  // heads_cpp._LARGEST_HEAD
constexpr float kSmallestNorm = 1e-12f;  // qk_norm._SMALLEST_NORM

PROTLM_INLINE float from_memory(float x) { return x; }
PROTLM_INLINE float from_memory(std::uint16_t x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
PROTLM_INLINE void to_memory(float x, float& to) { to = x; }
// To the nearest bfloat16, to the even one of two.
PROTLM_INLINE void to_memory(float x, std::uint16_t& to) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t even = bits + 0x7fff + ((bits >> 16) & 1);
    to = static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : even >> 16);
}

// The work on a call whose heads have kDim numbers, any number for 0.
template <class T, int kDim>
struct HeadsWork {
    const HeadsCall& call;
    const Index dim = kDim ? kDim : call.head_dim, half = dim / 2;

    const T* in_at(Index token, Index head) const { return static_cast<const T*>(call.x) + token * call.x_stride + head * dim; }
    T* out_at(Index token, Index head) const { return static_cast<T*>(call.out) + token * call.out_stride + head * dim; }

    void load(Index token, Index head, float* y) const {
        const T* const x = in_at(token, head);
        if (!call.width) {
            for (Index c = 0; c < dim; ++c) y[c] = from_memory(x[c]);
            return;
        }
        const float* weight = call.weight - call.first_offset * call.weight_stride + head * dim;
        for (Index c = 0; c < dim; ++c) y[c] = from_memory(x[c]) * weight[c];
        weight += call.first_offset * call.weight_stride;
        for (Index i = 0; i < call.width; ++i, weight += call.weight_stride) {
            const Index offset = call.first_offset + i, place = call.positions[token] + offset;
            if (!offset || place < 0 || place >= call.segment_lengths[token]) continue;
            const T* const other = in_at(token + offset, head);
            for (Index c = 0; c < dim; ++c) y[c] += from_memory(other[c]) * weight[c];
        }
    }

    // Writes y, times a factor, rotated by the angles of the token, or back by them for a sign of −1.
    void store_rotated(Index token, const float* y, float factor, float sign, T* out) const {
        if (!call.cosines) {
            for (Index c = 0; c < dim; ++c) to_memory(y[c] * factor, out[c]);
            return;
        }
        const float *const cosines = call.cosines + token * call.angles_stride, *const sines = call.sines + token * call.angles_stride;
        for (Index c = 0; c < half; ++c) {
            const float first = y[c] * factor, second = y[c + half] * factor, sine = sines[c] * sign;
            to_memory(first * cosines[c] - second * sine, out[c]);
            to_memory(second * cosines[c] + first * sine, out[c + half]);
        }
    }

    PROTLM_INLINE static float inner(const float* a, const float* b, Index count) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (Index c = 0; c < count; ++c) sum += a[c] * b[c];
        return sum;
    }

    void forward(Index token, Index head) const {
        float y[kDim ? kDim : kLargestHead];
        load(token, head, y);
        float factor = 1.0f;
        if (call.lengths) {
            const float norm = std::sqrt(inner(y, y, dim));
            if (call.norms) call.norms[token * call.heads + head] = norm;
            // A NaN stays.
            factor = call.lengths[head] / (norm < kSmallestNorm ? kSmallestNorm : norm);
        }
        store_rotated(token, y, factor, 1.0f, out_at(token, head));
    }

    // Returns the gradient of the length.
    float backward(Index token, Index head) const {
        float y[kDim ? kDim : kLargestHead], grad[kDim ? kDim : kLargestHead];
        const T* const grads = static_cast<const T*>(call.grad) + token * call.grad_stride + head * dim;
        for (Index c = 0; c < dim; ++c) grad[c] = from_memory(grads[c]);
        float factor = 1.0f, of_length = 0.0f;
        if (call.lengths) {
            const T* const out = out_at(token, head);
            for (Index c = 0; c < dim; ++c) y[c] = from_memory(out[c]);
            const float length = call.lengths[head], norm = call.norms[token * call.heads + head], product = inner(y, grad, dim);
            of_length = product / length;
            // Vectors below the smallest norm were only multiplied by a constant.
            const float share = norm < kSmallestNorm ? 0.0f : of_length / length;
            for (Index c = 0; c < dim; ++c) grad[c] -= y[c] * share;
            factor = length / (norm < kSmallestNorm ? kSmallestNorm : norm);
        }
        store_rotated(token, grad, factor, -1.0f, static_cast<T*>(call.x_grad) + token * call.x_stride + head * dim);
        return of_length;
    }

    void run(bool is_backward) const {
        const Index blocks = (call.tokens + kHeadsTokens - 1) / kHeadsTokens;
#pragma omp parallel for num_threads(static_cast<int>(call.num_threads)) schedule(static)
        for (Index block = 0; block < blocks; ++block) {
            const Index first = block * kHeadsTokens, last = first + kHeadsTokens < call.tokens ? first + kHeadsTokens : call.tokens;
            float* const sums = is_backward && call.lengths ? call.length_grads + block * call.heads : nullptr;
            for (Index token = first; token < last; ++token)
                for (Index head = 0; head < call.heads; ++head) {
                    if (!is_backward)
                        forward(token, head);
                    else if (const float of_length = backward(token, head); sums)
                        sums[head] = (token == first ? 0.0f : sums[head]) + of_length;
                }
        }
    }
};

template <class T>
void run_heads_of(const HeadsCall& call, bool is_backward) {
    switch (call.head_dim) {
        case 16: return HeadsWork<T, 16>{call}.run(is_backward);
        case 24: return HeadsWork<T, 24>{call}.run(is_backward);
        case 32: return HeadsWork<T, 32>{call}.run(is_backward);
        case 64: return HeadsWork<T, 64>{call}.run(is_backward);
        default: return HeadsWork<T, 0>{call}.run(is_backward);
    }
}

inline void run_prepare(const HeadsCall& call, bool is_backward) {
    if (call.is_half) return run_heads_of<std::uint16_t>(call, is_backward);
    run_heads_of<float>(call, is_backward);
}

}  // namespace PROTLM_NAMESPACE
