// Bidirectional FAVOR of bfloat16, forward: the projection attends to the keys, then the queries to the projection.
//
// What remains of the first is the state: for every feature a mean of v, and the logarithm, to base 2, of the feature's
// sum over the keys; for ReLU the sums themselves. States are float32, in the form in which bidirectional.h has them.

#pragma once

#include <omp.h>

#include "bidirectional.h"
#include "row_attention.h"

namespace PROTLM_NAMESPACE {

struct HalfSizes {
    Index heads, dim, inner, columns, features, padded_features, projections;

    explicit HalfSizes(const FavorCall& call)
        : heads(call.heads), dim(call.head_dim), inner(round_up_inner<Half>(dim)), columns(round_up_columns(dim)),
          features(call.num_rows * (1 + call.mirror)), padded_features(round_up(features, kUnitRows)),
          projections(call.projection_head_stride ? heads : 1) {}

    Index state_floats() const { return round_up(padded_features * RowSums::floats(columns), 16); }
    Index projection_floats() const { return round_up(padded_features * (inner + 1), 16); }
};

// The projection of one head, not scaled, which would round it again.
struct HalfProjection {
    Half *rows, *columns;  // [padded_features][inner], and the same as columns
    float* squares;     // ‖ω‖²

    HalfProjection(float* memory, const HalfSizes& sizes)
        : rows(reinterpret_cast<Half*>(memory)), columns(rows + sizes.padded_features * sizes.inner),
          squares(memory + sizes.padded_features * sizes.inner) {}
};

struct HalfScratch {
    RowScratch<Half> of_rows;
    Half *rows, *columns, *values;  // of kBlockKeys keys, or of kUnitRows queries
    Half* state_values;
    float *biases, *sums;        // of keys, or of features
    Half* weights;               // the sums, rounded as the values are that they divide
    float *state, *reading;      // of all features; of kUnitRows queries
    float* end;

    template <class Take>
    HalfScratch(const HalfSizes& sizes, Take&& take)
        : of_rows(take), rows(take_elements<Half>(take, kBlockKeys * sizes.inner)),
          columns(take_elements<Half>(take, kBlockKeys * sizes.inner)), values(take_elements<Half>(take, kBlockKeys * sizes.columns)),
          state_values(take_elements<Half>(take, sizes.padded_features * sizes.columns)), biases(take(longest(sizes))),
          sums(take(longest(sizes))), weights(take_elements<Half>(take, longest(sizes))), state(take(sizes.state_floats())),
          reading(take(kUnitRows * RowSums::floats(sizes.columns))), end(take(0)) {}

private:
    static Index longest(const HalfSizes& sizes) {
        return sizes.padded_features > kBlockKeys ? sizes.padded_features : kBlockKeys;
    }
};

struct HalfWorkspace {
    const HalfSizes sizes;
    float *projections, *slots, *threads;

    explicit HalfWorkspace(const FavorCall& call) : sizes(call), projections(call.workspace) {
        slots = projections + sizes.projections * sizes.projection_floats();
        threads = slots + call.num_slots * sizes.heads * sizes.state_floats();
    }

    HalfProjection projection(Index head) const {
        return {projections + (sizes.projections > 1 ? head : 0) * sizes.projection_floats(), sizes};
    }
    RowSums slot(Index index, Index head) const {
        return RowSums::in(slots + (index * sizes.heads + head) * sizes.state_floats(), sizes.padded_features, sizes.columns);
    }
    float* thread(Index index) const { return threads + index * scratch_floats<HalfScratch>(sizes); }

    static Index floats(const FavorCall& call) { return HalfWorkspace(call).thread(call.num_threads) - call.workspace; }
};

inline void pack_projection(const FavorCall& call, const HalfSizes& sizes, Index head, const HalfProjection& to) {
    const Index count = sizes.padded_features, dim = sizes.dim;
    std::memset(to.rows, 0, sizeof(Half) * count * sizes.inner);
    for (Index j = 0; j < count; ++j) {
        to.squares[j] = 0.0f;
        if (j >= sizes.features) continue;
        const bool is_mirrored = j >= call.num_rows;
        const float* const row = call.projection + head * call.projection_head_stride + (is_mirrored ? j - call.num_rows : j) * dim;
        store_scaled(to.rows + j * sizes.inner, row, is_mirrored ? -1.0f : 1.0f, dim);
        to.squares[j] = dot(row, row, dim);
    }
    pack_as_columns(to.rows, count, sizes.inner, to.columns);
}

// Copies vectors to `rows`, filled up with zeros to `padded` rows of `inner`.
inline void gather_halves(const Tokens& tokens, const FavorTensor& tensor, Index first, Index count, Index padded, Index inner, Half* rows) {
    for (Index i = 0; i < count; ++i, rows += inner) {
        // The vectors of a head are far apart in memory, where processors do not foresee them.
        if (first + i + padded < tokens.unit.count) {
            const char* const next = reinterpret_cast<const char*>(
                element_at<Half>(tensor, tokens.unit.row, tokens.head, tokens.token(first + i + padded)));
            for (Index byte = 0; byte < tokens.call.head_dim * static_cast<Index>(sizeof(Half)); byte += 64)
                _mm_prefetch(next + byte, _MM_HINT_T1);
        }
        copy_row(element_at<Half>(tensor, tokens.unit.row, tokens.head, tokens.token(first + i)), tokens.call.head_dim, inner, rows);
    }
    std::memset(rows, 0, sizeof(Half) * (padded - count) * inner);
}

// Of the scores, for exponents to base 2.
template <bool kExponential>
float score_scale(const FavorCall& call, double a) {
    return static_cast<float>(call.scale * (kExponential ? kLog2E * std::sqrt(1 - 4 * a) : 1.0));
}
// Of ‖k‖² in the exponent to base 2.
inline float norm_scale(Index dim) { return static_cast<float>(0.5 * kLog2E / std::sqrt(double(dim))); }

// The computations on one unit of tokens of one head.
template <bool kExponential>
struct HalfWork {
    const HalfSizes& sizes;
    const Tokens tokens;
    const HalfProjection projection;
    const HalfScratch& scratch;
    const Index dim = sizes.dim, inner = sizes.inner, columns = sizes.columns, padded = sizes.padded_features;
    const double a = tokens.oprf_a();
    const RowAttention<Half, kExponential> attention{scratch.of_rows, inner, columns, score_scale<kExponential>(tokens.call, a)};

    // Makes `state` the sums over the keys of the unit.
    void fold(const RowSums& state) const {
        state.clear(padded, columns);
        for (Index first = 0; first < tokens.unit.count; first += kBlockKeys) {
            const PackedKeys<Half> block = keys(first, at_most(kBlockKeys, tokens.unit.count - first));
            for (Index j = 0; j < padded; j += kUnitRows)
                attention.add(projection.rows + j * inner, block, Band::whole(block.count), state.at(j, columns));
        }
    }

    PackedKeys<Half> keys(Index first, Index count) const {
        const Index whole = round_up(count, kUnitColumns);
        gather_halves(tokens, tokens.call.k, first, count, whole, inner, scratch.rows);
        for (Index t = 0; t < whole; ++t) {
            scratch.biases[t] = t < count ? -norm_scale(dim) * square_of(scratch.rows + t * inner, inner) : kNoKey;
            scratch.sums[t] = t < count ? 1.0f : 0.0f;
        }
        store_columns(scratch.weights, scratch.sums, whole);
        pack_as_columns(scratch.rows, whole, inner, scratch.columns);
        gather_halves(tokens, tokens.call.v, first, count, whole, inner, scratch.rows);
        pack_as_inner(scratch.rows, inner, whole, columns, scratch.values);
        return {scratch.columns, scratch.values, whole * kPanelColumns, scratch.biases, scratch.weights, whole};
    }

    // Turns sums into means and logarithms of sums, and clears the features that only fill a tile.
    void finish(const RowSums& state) const {
        std::memset(state.values + sizes.features * columns, 0, sizeof(float) * (padded - sizes.features) * columns);
        for (Index j = 0; j < padded; ++j) {
            const float total = state.total(j);
            float* const totals = state.totals + j * kPanelColumns;
            std::memset(totals, 0, sizeof(float) * kPanelColumns);
            totals[0] = kExponential ? 1.0f : total;
            if (!kExponential) continue;
            state.references[j] += std::log2(total);
            const __m512 inverse = _mm512_set1_ps(1.0f / total);
            float* const means = state.values + j * columns;
            for (Index c = 0; c < columns; c += 16) store16(means + c, _mm512_mul_ps(load16(means + c), inverse));
        }
    }

    void store_state(const RowSums& state) const {
        const Index place = tokens.unit.segment * sizes.heads + tokens.head;
        float* to = tokens.call.states + place * sizes.features * (dim + 1);
        for (Index j = 0; j < sizes.features; ++j, to += dim + 1) {
            std::memcpy(to, state.values + j * columns, sizeof(float) * dim);
            to[dim] = state.totals[j * kPanelColumns];
        }
        if (kExponential)
            std::memcpy(tokens.call.references + place * sizes.features, state.references, sizeof(float) * sizes.features);
        else
            tokens.call.references[place] = 0.0f;
    }

    // Writes the output and the query sums of the unit from a finished state.
    void read(const RowSums& state) const {
        for (Index j = 0; j < padded; ++j) {
            const bool is_real = j < sizes.features;
            scratch.biases[j] = !kExponential || !is_real
                                    ? kNoKey
                                    : state.references[j] + feature_constant(tokens, projection.squares, a, j);
            scratch.sums[j] = is_real ? state.totals[j * kPanelColumns] : 0.0f;
        }
        store_columns(scratch.weights, scratch.sums, padded);
        pack_rounded_as_inner(state.values, columns, padded, columns, scratch.state_values);
        const PackedKeys<Half> features{projection.columns, scratch.state_values, padded * kPanelColumns, scratch.biases, scratch.weights, padded};
        const RowSums sums = RowSums::in(scratch.reading, kUnitRows, columns);
        for (Index first = 0; first < tokens.unit.count; first += kUnitRows) {
            const Index count = at_most(kUnitRows, tokens.unit.count - first);
            gather_halves(tokens, tokens.call.q, first, count, kUnitRows, inner, scratch.rows);
            sums.clear(kUnitRows, columns);
            for (Index j = 0; j < padded; j += kBlockKeys) {
                const PackedKeys<Half> block = features.part(j, at_most(kBlockKeys, padded - j), inner);
                attention.add(scratch.rows, block, Band::whole(block.count), sums);
            }
            for (Index t = 0; t < count; ++t) write(sums, first, t);
        }
    }

    void write(const RowSums& sums, Index first, Index t) const {
        const float total = sums.total(t);
        *tokens.query_sum(first + t) = kExponential ? sums.references[t] + std::log2(total) : total;
        const __m512 inverse = _mm512_set1_ps(1.0f / total);
        float* const values = sums.values + t * columns;
        for (Index c = 0; c < columns; c += 16) store16(values + c, _mm512_mul_ps(load16(values + c), inverse));
        store_columns(element_at<Half>(tokens.call.out, tokens.unit.row, tokens.head, tokens.token(first + t)), values, dim);
    }
};

// Adds the keys of a finished state to another one.
template <bool kExponential>
void merge_halves(const HalfSizes& sizes, const RowSums& merged, const RowSums& next) {
    for (Index j = 0; j < sizes.padded_features; ++j) {
        Shares shares{1.0f, 1.0f};
        if (kExponential)
            shares = merge_references(merged.references[j], next.references[j]);
        else
            merged.totals[j * kPanelColumns] += next.totals[j * kPanelColumns];
        float *const to = merged.values + j * sizes.columns, *const from = next.values + j * sizes.columns;
        for (Index c = 0; c < sizes.columns; ++c) to[c] = to[c] * shares.mine + from[c] * shares.theirs;
    }
}

template <bool kExponential>
void run_half_team(const FavorCall& call, const HalfWorkspace& workspace) {
    const Units tiles;
    const HalfSizes& sizes = workspace.sizes;
    const HalfScratch scratch = scratch_at<HalfScratch>(workspace.thread(omp_get_thread_num()), sizes);
    const RowSums own = RowSums::in(scratch.state, sizes.padded_features, sizes.columns);
    const auto work = [&](const FavorUnit& unit, Index head) {
        return HalfWork<kExponential>{sizes, {call, unit, head}, workspace.projection(head), scratch};
    };
#pragma omp for schedule(static)
    for (Index head = 0; head < sizes.projections; ++head) pack_projection(call, sizes, head, workspace.projection(head));
#pragma omp for schedule(dynamic)
    for (Index i = 0; i < call.num_units * sizes.heads; ++i) {
        const FavorUnit& unit = call.units[i / sizes.heads];
        const HalfWork<kExponential> task = work(unit, i % sizes.heads);
        const RowSums state = unit.slot < 0 ? own : workspace.slot(unit.slot, i % sizes.heads);
        task.fold(state);
        task.finish(state);
        if (unit.slot >= 0) continue;
        task.store_state(state);
        task.read(state);
    }
#pragma omp for schedule(dynamic)
    for (Index i = 0; i < call.num_groups * sizes.heads; ++i) {
        const FavorGroup& group = call.groups[i / sizes.heads];
        const Index head = i % sizes.heads;
        const RowSums merged = workspace.slot(group.first_slot, head);
        for (Index slot = 1; slot < group.num_slots; ++slot)
            merge_halves<kExponential>(sizes, merged, workspace.slot(group.first_slot + slot, head));
        FavorUnit whole{};
        whole.segment = group.segment;
        work(whole, head).store_state(merged);
    }
#pragma omp for schedule(dynamic)
    for (Index i = 0; i < call.num_units * sizes.heads; ++i) {
        const FavorUnit& unit = call.units[i / sizes.heads];
        if (unit.slot >= 0) work(unit, i % sizes.heads).read(workspace.slot(unit.first_slot, i % sizes.heads));
    }
}

inline void run_half_forward(const FavorCall& call) {
    const HalfWorkspace workspace(call);
    ask_for_huge_pages(call.out, call.result_bytes);
#pragma omp parallel num_threads(static_cast<int>(call.num_threads))
    call.is_exponential ? run_half_team<true>(call, workspace) : run_half_team<false>(call, workspace);
}

}  // namespace PROTLM_NAMESPACE
