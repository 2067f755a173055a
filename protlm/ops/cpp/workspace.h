// The sizes of one call, and the layout of the caller's workspace.

#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "call.h"
#include "tiles.h"

namespace PROTLM_NAMESPACE {

// Tokens processed together: their features and the rows they are computed from stay in a core's second-level cache.
constexpr Index kLongestTile = 96, kTileFloats = 48 * 1024;
// The same for causal attention, whose cost within a stretch grows with the square of its length.
constexpr Index kLongestStretch = 64;
constexpr double kLog2E = 1.4426950408889634;
constexpr float kReluOffset = 1e-3f;  // feature_maps.RELU_OFFSET

struct Sizes {
    Index heads, head_dim, padded_dim, features, padded_features, tile, stretch, projections;

    explicit Sizes(const FavorCall& call)
        : heads(call.heads), head_dim(call.head_dim), padded_dim(round_up(head_dim, kPanel)),
          features(call.num_rows * (1 + call.mirror)), padded_features(round_up(features, kPanel)),
          projections(call.projection_head_stride ? heads : 1) {
        const Index fitting = kTileFloats / (padded_features + 2 * padded_dim) / kRows * kRows;
        tile = fitting < 2 * kRows ? 2 * kRows : fitting > kLongestTile ? kLongestTile : fitting;
        stretch = tile < kLongestStretch ? tile : kLongestStretch;
        if (call.is_causal) tile = padded_stretch();
    }

    Index padded_stretch() const { return round_up(stretch, kPanel); }
    Index state_floats() const { return padded_features * (padded_dim + 2); }
    Index projection_floats() const { return padded_features * (head_dim + padded_dim + 1) + 1; }
};

// Sums over keys, for one segment and head; for exponential maps relative to 2^references.
struct State {
    float *context;     // [padded_dim / kPanel][padded_features][kPanel]
    float *sums;        // [padded_features]
    float *references;  // [padded_features]

    State(float* memory, const Sizes& sizes)
        : context(memory), sums(memory + sizes.padded_features * sizes.padded_dim),
          references(sums + sizes.padded_features) {}
};

// The projection of one head, scaled.
struct Projection {
    float* columns;  // [padded_features / kPanel][head_dim][kPanel]: for scores; exponential ones are logarithms to base 2
    float* rows;     // [padded_dim / kPanel][padded_features][kPanel]: for gradients
    float* squares;  // ‖ω‖² of the rows as given
    float* longest;  // the largest norm of a column: scores are at most that times the norm of a vector

    Projection(float* memory, const Sizes& sizes)
        : columns(memory), rows(memory + sizes.padded_features * sizes.head_dim),
          squares(rows + sizes.padded_features * sizes.padded_dim), longest(squares + sizes.padded_features) {}
};

// The memory of one thread.
struct Scratch {
    float *state, *gradient, *other_context, *query_references, *state_weights;
    float *features[2];             // [padded_features / kPanel][tile][kPanel]
    float *rows[2], *panels;        // [tile][head_dim], [padded_dim / kPanel][tile][kPanel]
    float *numbers[2], *vectors[2]; // a number, and a vector, for every token of a tile

    Scratch(float* memory, const Sizes& sizes) {
        const auto take = [&memory](Index count) {
            float* const taken = memory;
            memory += round_up(count, 16);
            return taken;
        };
        for (float*& x : vectors) x = take(sizes.tile * kLanes);
        for (float*& x : numbers) x = take(sizes.tile);
        for (float*& x : rows) x = take(sizes.tile * sizes.padded_dim);
        panels = take(sizes.tile * sizes.padded_dim);
        for (float*& x : features) x = take(sizes.tile * sizes.padded_features);
        state = take(sizes.state_floats());
        gradient = take(sizes.state_floats());
        other_context = take(sizes.padded_features * sizes.padded_dim);
        query_references = take(sizes.padded_features);
        state_weights = take(sizes.padded_features);
        end = memory;
    }

    static Index floats(const Sizes& sizes) { return Scratch(nullptr, sizes).end - static_cast<float*>(nullptr); }

private:
    float* end;
};

// Further memory of a thread for causal calls.
struct CausalScratch {
    float *queries, *query_panels;    // q as rows; the gradient of the output as panels
    float *key_columns;               // features of keys, [stretch / kPanel][padded_features][kPanel]
    float *weights, *weights_grad;    // [stretch][padded stretch]
    float *value_columns;             // [stretch / kPanel][head_dim][kPanel]
    float *norms;
    float *step_references;           // [steps][padded_features]
    Index* step_bounds;               // [steps + 1], tokens of the unit
    float *end;

    CausalScratch(float* memory, const Sizes& sizes, Index unit_tokens) {
        const auto take = [&memory](Index count) {
            float* const taken = memory;
            memory += round_up(count, 16);
            return taken;
        };
        const Index stretch = sizes.padded_stretch();
        queries = take(stretch * sizes.padded_dim);
        query_panels = take(stretch * sizes.padded_dim);
        key_columns = take(stretch * sizes.padded_features);
        weights = take(stretch * stretch);
        weights_grad = take(stretch * stretch);
        value_columns = take(stretch * sizes.head_dim);
        norms = take(stretch);
        step_bounds = reinterpret_cast<Index*>(take(2 * (unit_tokens + 1)));
        step_references = take(unit_tokens * sizes.padded_features);
        end = memory;
    }

    static Index floats(const Sizes& sizes, Index unit_tokens) {
        return CausalScratch(nullptr, sizes, unit_tokens).end - static_cast<float*>(nullptr);
    }
};

struct Workspace {
    const Sizes sizes;
    const Index causal_floats;  // of a thread
    float *projections, *slots, *gradient_slots, *threads;

    explicit Workspace(const FavorCall& call)
        : sizes(call), causal_floats(call.is_causal ? CausalScratch::floats(sizes, call.longest_unit) : 0),
          projections(call.workspace) {
        slots = projections + round_up(sizes.projections * sizes.projection_floats(), 16);
        gradient_slots = slots + round_up(call.num_slots * sizes.heads * sizes.state_floats(), 16);
        threads = gradient_slots + (call.is_causal ? gradient_slots - slots : 0);
    }

    Projection projection(Index head) const {
        return {projections + (sizes.projections > 1 ? head : 0) * sizes.projection_floats(), sizes};
    }
    State slot(Index index, Index head) const {
        return {slots + (index * sizes.heads + head) * sizes.state_floats(), sizes};
    }
    State gradient_slot(Index index, Index head) const {
        return {gradient_slots + (index * sizes.heads + head) * sizes.state_floats(), sizes};
    }
    float* thread(Index index) const { return threads + index * (Scratch::floats(sizes) + causal_floats); }
    float* causal_thread(Index index) const { return thread(index) + Scratch::floats(sizes); }

    static Index floats(const FavorCall& call) {
        const Workspace laid_out(call);
        return laid_out.thread(call.num_threads) - call.workspace;
    }
};

inline void pack_projection(const FavorCall& call, const Sizes& sizes, Index head, bool is_backward,
                            const Projection& projection) {
    const Index padded = sizes.padded_features, dim = sizes.head_dim;
    const float scale = static_cast<float>(call.scale);
    const float column_scale = call.is_exponential ? static_cast<float>(call.scale * kLog2E) : scale;
    float largest_square = 0;
    if (is_backward) std::memset(projection.rows, 0, sizeof(float) * padded * sizes.padded_dim);
    for (Index first = 0; first < padded; first += kPanel) {
        const float* rows[kPanel];
        float signs[kPanel];
        for (Index i = 0; i < kPanel; ++i) {
            const Index j = first + i;
            const bool is_mirrored = j >= call.num_rows, is_filling = j >= sizes.features;
            rows[i] = call.projection + head * call.projection_head_stride;
            if (!is_filling) rows[i] += (is_mirrored ? j - call.num_rows : j) * dim;
            signs[i] = is_filling ? 0.0f : is_mirrored ? -1.0f : 1.0f;
            projection.squares[j] = dot(rows[i], rows[i], dim);
            // Not std::max: a row that is not finite must make the bound NaN.
            if (!(projection.squares[j] <= largest_square)) largest_square = projection.squares[j];
        }
        float* columns = projection.columns + first * dim;
        for (Index c = 0; c < dim; ++c, columns += kPanel)
            for (Index i = 0; i < kPanel; ++i) columns[i] = rows[i][c] * (signs[i] * column_scale);
        for (Index i = 0; i < kPanel && is_backward; ++i)
            for (Index c = 0; c < dim; ++c)
                projection.rows[(c / kPanel * padded + first + i) * kPanel + c % kPanel] = rows[i][c] * (signs[i] * scale);
    }
    *projection.longest = column_scale * std::sqrt(largest_square);
}

// The positions of the tokens of one call, unit and head in memory.
struct Tokens {
    const FavorCall& call;
    const FavorUnit& unit;
    Index head;

    Index token(Index i) const { return call.positions ? call.positions[unit.first + i] : unit.first + i; }
    float* at(const FavorTensor& tensor, Index i) const {
        return tensor.data + unit.row * tensor.batch_stride + head * tensor.head_stride + token(i) * tensor.token_stride;
    }
    float* query_sum(Index i) const {
        return call.query_sums + (unit.row * call.heads + head) * call.num_tokens + token(i);
    }
    double oprf_a() const { return call.oprf_a ? call.oprf_a[unit.segment * call.heads + head] : 0.0; }

    // Copies vectors, times a factor, to contiguous rows.
    void gather(const FavorTensor& tensor, Index first, Index count, float factor, float* rows) const {
        const Index dim = call.head_dim;
        for (Index i = 0; i < count; ++i, rows += dim) {
            const float* x = at(tensor, first + i);
            for (Index c = 0; c < dim; ++c) rows[c] = x[c] * factor;
        }
    }
};

// Writes context and sums to `rows`, (segments, heads, features, head_dim + 1).
inline void store_sums(float* rows, const Sizes& sizes, const State& state, Index segment, Index head) {
    const Index dim = sizes.head_dim, padded = sizes.padded_features;
    rows += (segment * sizes.heads + head) * sizes.features * (dim + 1);
    for (Index j = 0; j < sizes.features; ++j, rows += dim + 1) {
        for (Index c = 0; c < dim; c += kPanel)
            std::memcpy(rows + c, state.context + (c / kPanel * padded + j) * kPanel,
                        sizeof(float) * (dim - c < kPanel ? dim - c : kPanel));
        rows[dim] = state.sums[j];
    }
}

inline void store_state(const FavorCall& call, const Sizes& sizes, const State& state, Index segment, Index head) {
    store_sums(call.states, sizes, state, segment, head);
    if (call.is_exponential)
        std::memcpy(call.references + (segment * sizes.heads + head) * sizes.features, state.references,
                    sizeof(float) * sizes.features);
    else
        call.references[segment * sizes.heads + head] = 0.0f;
}

// Requests pages of 2 MiB for a large result that is about to be written for the first time: a page fault for every
// 4 KiB costs as much as a tenth of the attention. A call need not have every result.
inline void ask_for_huge_pages(const FavorTensor& result, Index bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (!result.data) return;
    constexpr std::uintptr_t page = std::uintptr_t{1} << 21;
    const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(result.data);
    const std::uintptr_t first = (begin + page - 1) / page * page;
    const std::uintptr_t last = (begin + bytes) / page * page;
    // Only advice: without such pages the results are the same.
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace PROTLM_NAMESPACE
