// Matrix products in tiles that stay in registers, and the memory layout of their operands.
//
// Products are rows of `a`, an element at a time, times columns of `b`, a panel of kPanel at a time. Every element of a
// result is a chain of multiply-adds in the order of the inner axis (a sum of chains where that is long), whatever tile
// it falls in: results of a row do not depend on its neighbours.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace PROTLM_NAMESPACE {

using Index = std::int64_t;

// Rows of a tile: with two vectors each they fill the registers of AVX2 and cover the latency of the multiply-adds.
constexpr int kRows = 6;

constexpr Index round_up(Index x, Index step) { return (x + step - 1) / step * step; }

// Element (row, panel p, j) is at row * row_stride + p * panel_stride + j * column_stride; the inner axis is (p, j).
struct Operand {
    const float* data;
    Index row_stride, column_stride;
    Index panel_size, num_panels = 1, panel_stride = 0;

    Operand from_row(Index row) const {
        Operand moved = *this;
        moved.data += row * row_stride;
        return moved;
    }
};

// `rows` contiguous rows of `size` elements.
PROTLM_INLINE Operand row_major(const float* data, Index size) { return {data, size, 1, size}; }

// Panels [inner / kPanel][rows][kPanel], as an earlier product wrote them.
PROTLM_INLINE Operand from_panels(const float* data, Index rows, Index inner) {
    return {data, kPanel, 1, kPanel, inner / kPanel, rows * kPanel};
}

template <int R>
PROTLM_INLINE void multiply(Vec (&c)[R][2], const Operand& a, const float* b) {
    for (Index p = 0; p < a.num_panels; ++p) {
        const float* element = a.data + p * a.panel_stride;
        for (Index j = 0; j < a.panel_size; ++j) {
            const Vec b0 = load(b), b1 = load(b + kLanes);
            b += kPanel;
#pragma GCC unroll 6
            for (int i = 0; i < R; ++i) {
                const Vec x = all(element[i * a.row_stride]);
                c[i][0] += x * b0;
                c[i][1] += x * b1;
            }
            element += a.column_stride;
        }
    }
}

// Panels of the inner axis in one chain: rounding grows with the length of a chain.
constexpr Index kLongestChain = 512 / kPanel;

// The product over a long inner axis, in blocks.
template <int R>
__attribute__((noinline)) void multiply_in_blocks(Vec (&c)[R][2], const Operand& a, const float* b) {
    for (Index p = 0; p < a.num_panels; p += kLongestChain) {
        Operand block = a;
        block.data += p * a.panel_stride;
        block.num_panels = a.num_panels - p < kLongestChain ? a.num_panels - p : kLongestChain;
        Vec sums[R][2] = {};
        multiply<R>(sums, block, b + p * a.panel_size * kPanel);
        for (int i = 0; i < R; ++i) c[i][0] += sums[i][0], c[i][1] += sums[i][1];
    }
}

// The first product of a tile, whose sums are zero.
template <int R>
PROTLM_INLINE void multiply_first(Vec (&c)[R][2], const Operand& a, const float* b) {
    if (a.num_panels <= kLongestChain) return multiply<R>(c, a, b);
    // A variable of its own, so that c need not have an address.
    Vec sums[R][2] = {};
    multiply_in_blocks<R>(sums, a, b);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) c[i][0] = sums[i][0], c[i][1] = sums[i][1];
}

// Calls visit(first row, number of rows as a constant) for tiles of nearly equal size.
template <class Visit>
PROTLM_INLINE void for_each_tile(Index rows, Visit&& visit) {
    if (rows <= 0) return;
    const Index tiles = (rows + kRows - 1) / kRows, size = rows / tiles, larger_ones = rows % tiles;
    Index first = 0;
    for (Index i = 0; i < tiles; ++i) {
        switch (size + (i < larger_ones)) {
            case 6: visit(first, std::integral_constant<int, 6>{}); break;
            case 5: visit(first, std::integral_constant<int, 5>{}); break;
            case 4: visit(first, std::integral_constant<int, 4>{}); break;
            case 3: visit(first, std::integral_constant<int, 3>{}); break;
            case 2: visit(first, std::integral_constant<int, 2>{}); break;
            default: visit(first, std::integral_constant<int, 1>{});
        }
        first += size + (i < larger_ones);
    }
}

// Calls take(row, left vector, right vector) with each row of a * b, for one panel of b.
template <class Take>
PROTLM_INLINE void product(Index rows, const Operand& a, const float* b, Take&& take) {
    for_each_tile(rows, [&](Index first, auto size) __attribute__((always_inline)) {
        constexpr int R = decltype(size)::value;
        Vec c[R][2] = {};
        multiply_first<R>(c, a.from_row(first), b);
#pragma GCC unroll 6
        for (int i = 0; i < R; ++i) take(first + i, c[i][0], c[i][1]);
    });
}

// The same for a * b + c * d, where c is a triangle: left(first row, rows) and right(first row) return the operands c and
// d of a tile.
template <class Left, class Right, class Take>
PROTLM_INLINE void product_with_triangle(Index rows, const Operand& a, const float* b, Left&& left, Right&& right,
                                         Take&& take) {
    for_each_tile(rows, [&](Index first, auto size) __attribute__((always_inline)) {
        constexpr int R = decltype(size)::value;
        Vec c[R][2] = {};
        multiply_first<R>(c, a.from_row(first), b);
        multiply<R>(c, left(first, R), right(first));
#pragma GCC unroll 6
        for (int i = 0; i < R; ++i) take(first + i, c[i][0], c[i][1]);
    });
}

struct Factors {
    Operand a;
    const float* b;
};

// The same for the sum of several products.
template <class Take>
PROTLM_INLINE void sum_of_products(Index rows, const Factors* factors, int count, Take&& take) {
    for_each_tile(rows, [&](Index first, auto size) __attribute__((always_inline)) {
        constexpr int R = decltype(size)::value;
        Vec c[R][2] = {};
        for (int i = 0; i < count; ++i) {
            if (factors[i].a.num_panels <= kLongestChain) {
                multiply<R>(c, factors[i].a.from_row(first), factors[i].b);
                continue;
            }
            // A variable of its own, so that c need not have an address.
            Vec sums[R][2] = {};
            multiply_in_blocks<R>(sums, factors[i].a.from_row(first), factors[i].b);
            for (int j = 0; j < R; ++j) c[j][0] += sums[j][0], c[j][1] += sums[j][1];
        }
#pragma GCC unroll 6
        for (int i = 0; i < R; ++i) take(first + i, c[i][0], c[i][1]);
    });
}

// Adds a * b to `sums`, rows of one panel.
PROTLM_INLINE void add_product(Index rows, const Operand& a, const float* b, float* sums) {
    for_each_tile(rows, [&](Index first, auto size) __attribute__((always_inline)) {
        constexpr int R = decltype(size)::value;
        float* to = sums + first * kPanel;
        Vec c[R][2];
#pragma GCC unroll 6
        for (int i = 0; i < R; ++i) c[i][0] = load(to + i * kPanel), c[i][1] = load(to + i * kPanel + kLanes);
        multiply<R>(c, a.from_row(first), b);
#pragma GCC unroll 6
        for (int i = 0; i < R; ++i) store(to + i * kPanel, c[i][0]), store(to + i * kPanel + kLanes, c[i][1]);
    });
}

// The first `count` lanes, at most kLanes, followed by zeros; memory after them is not read.
PROTLM_INLINE Vec load_columns(const float* from, Index count) {
    if (count >= kLanes) return load(from);
    float columns[kLanes] = {};
    for (Index i = 0; i < count; ++i) columns[i] = from[i];
    return load(columns);
}

// Writes `count` columns of a panel; memory after them may belong to something else.
PROTLM_INLINE void store_columns(float* to, Index count, Vec left, Vec right) {
    if (count >= kPanel) {
        store(to, left);
        store(to + kLanes, right);
        return;
    }
    float columns[kPanel];
    store(columns, left);
    store(columns + kLanes, right);
    std::memcpy(to, columns, sizeof(float) * count);
}

// Contiguous rows to panels [columns / kPanel][rows][kPanel]; the last panel is filled up with zeros.
inline void pack(const float* from, Index rows, Index columns, float* panels) {
    for (Index first = 0; first < columns; first += kPanel)
        for (Index row = 0; row < rows; ++row, panels += kPanel) {
            const float* const x = from + row * columns + first;
            store(panels, load_columns(x, columns - first));
            store(panels + kLanes, load_columns(x + kLanes, columns - first - kLanes));
        }
}

// The transpose of contiguous rows to panels [rows / kPanel][columns][kPanel]; the last panel is filled up with zeros.
inline void pack_transposed(const float* from, Index rows, Index columns, float* panels) {
    for (Index first = 0; first < rows; first += kPanel)
        for (Index column = 0; column < columns; ++column, panels += kPanel)
            for (Index i = 0; i < kPanel; ++i) panels[i] = first + i < rows ? from[(first + i) * columns + column] : 0.0f;
}

// The transpose of panels [columns / kPanel][rows][kPanel] to panels [rows / kPanel][columns][kPanel], of padded sizes.
inline void transpose_panels(const float* from, Index rows, Index columns, float* panels) {
    for (Index first = 0; first < rows; first += kPanel)
        for (Index column = 0; column < columns; ++column, panels += kPanel) {
            const float* x = from + (column / kPanel * rows + first) * kPanel + column % kPanel;
            for (Index i = 0; i < kPanel; ++i) panels[i] = x[i * kPanel];
        }
}

}  // namespace PROTLM_NAMESPACE
