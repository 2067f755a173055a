// The blocks of near-far attention: how keys are packed and scored, and vectors folded into states.

#pragma once

#include "near_far_memory.h"

namespace PROTLM_NAMESPACE {

// The most by which exponents of features may exceed what they are relative to. A state and a query both have some: 2^30
// twice, times the tokens of a segment and their values, stays far below the largest float.
constexpr float kFarRange = 30.0f;

// The computations on one unit of blocks of one head. Tokens are counted as in `bounds`, blocks in the segment.
struct NearFarBlocks {
    const NearFarCall& call;
    const NearFarUnit& unit;
    const Index head;
    const NearFarWorkspace& workspace;
    const NearFarScratch& scratch;

    const NearFarSizes& sizes = workspace.sizes;
    const bool is_backward = sizes.is_backward;
    const FavorUnit segment{unit.segment, unit.row, 0, 0, -1, -1};
    const Tokens tokens{call.favor, segment, head};
    const Projection projection = workspace.projection(head);
    const bool is_causal = call.favor.is_causal;
    const Index dim = sizes.favor.head_dim, padded_dim = sizes.favor.padded_dim, padded = sizes.favor.padded_features;
    const Index first = unit.first, last = unit.first + unit.count;
    const bool has_far = unit.num_blocks > 2;
    const double a = tokens.oprf_a();
    const float factor = a ? static_cast<float>(std::sqrt(1 - 4 * a)) : 1.0f;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    const float log_scale = scale * static_cast<float>(kLog2E), norm_scale = 0.5f * log_scale;
    // What all features of a query have in common besides its norm: their number, and the factors of `oprf`.
    const float shift = static_cast<float>(std::log2(double(sizes.favor.features)) - double(dim) * std::log2(double(factor)));

    Index start(Index block) const { return call.bounds[unit.first_bound + block]; }
    Index count(Index block) const { return start(block + 1) - start(block); }
    KeyBlock keys(Index block) const { return {scratch.blocks + block % 3 * KeyBlock::floats(sizes), sizes}; }
    bool exists(Index block) const { return block >= 0 && block < unit.num_blocks; }

    // Calls visit(first token, number of tokens) for every tile of a block.
    template <class Visit>
    void for_each_tile_of_tokens(Index block, Visit&& visit) const {
        for (Index from = start(block); from < start(block + 1); from += kQueries)
            visit(from, start(block + 1) - from < kQueries ? start(block + 1) - from : kQueries);
    }

    // Copies vectors to rows of padded_dim, followed by zeros.
    void gather(const FavorTensor& tensor, Index from, Index number, float* rows) const {
        for (Index i = 0; i < number; ++i, rows += padded_dim) {
            const float* const x = tokens.at(tensor, from + i);
            for (Index c = 0; c < padded_dim; c += kLanes) store(rows + c, load_columns(x + c, dim - c));
        }
    }
    Operand row_by_row(const float* rows) const { return {rows, padded_dim, 1, dim}; }

    // Writes, for each gathered vector, ‖x‖² in the exponent, and another number added.
    void write_norms(Index number, float more) const {
        for (Index t = 0; t < number; ++t) {
            const float* const x = scratch.queries + t * padded_dim;
            scratch.norms[t] = norm_scale * dot(x, x, dim) + more;
        }
    }

    // Packs a block of keys.
    void pack_block(Index block) const {
        if (!exists(block)) return;
        const KeyBlock to = keys(block);
        const Index number = count(block), rounded = round_up(number, kPanel), floats = rounded * padded_dim;
        for (const bool is_values : {false, true}) {
            float* const rows = scratch.rows;
            gather(is_values ? call.favor.v : call.favor.k, start(block), number, rows);
            std::memset(rows + number * padded_dim, 0, sizeof(float) * (rounded - number) * padded_dim);
            if (is_values) {
                if (is_backward) pack_transposed(rows, rounded, padded_dim, to.value_columns);
                if (is_causal && !is_backward) clear_not_finite(block, rows, number);
                if (!is_backward) pack(rows, rounded, padded_dim, to.value_panels);
                continue;
            }
            if (is_backward)
                for (Index t = 0; t < rounded; ++t)
                    to.norms[t] = norm_scale * dot(rows + t * padded_dim, rows + t * padded_dim, dim);
            // The same bits in the forward and the backward, whose scores are compared.
            for (Index i = 0; i < floats; ++i) rows[i] *= log_scale;
            pack_transposed(rows, rounded, padded_dim, to.columns);
            // Beside features, whose gradients are still to be multiplied by the factor.
            for (Index i = 0; i < floats && is_backward; ++i) rows[i] /= factor * static_cast<float>(kLog2E);
            if (is_backward) pack(rows, rounded, padded_dim, to.panels);
        }
        if (!is_backward) return;
        for (float* grads : {to.grads, to.value_grads}) std::memset(grads, 0, sizeof(float) * sizes.width * padded_dim);
    }

    // A weight of zero times a later value that is not finite would reach back.
    void clear_not_finite(Index block, float* rows, Index number) const {
        bool is_finite = true;
        for (Index i = 0; i < number * padded_dim; ++i) {
            const bool fits = rows[i] - rows[i] == 0.0f;
            is_finite &= fits;
            rows[i] = fits ? rows[i] : 0.0f;
        }
        scratch.are_finite[block % 3] = is_finite;
    }

    // Calls take(query, place of the vectors in the weights, left, right) with the scores, to base 2, of the gathered
    // queries, which begin with token `from`, and of a block of keys; kHidden where the query does not see the key.
    template <class Take>
    PROTLM_INLINE void scores(Index block, Index from, Index number, Take&& take) const {
        float steps[kLanes];
        for (int i = 0; i < kLanes; ++i) steps[i] = static_cast<float>(i);
        const Vec lanes = load(steps);
        const Index keys_count = count(block), seen = is_causal ? from - start(block) + 1 : keys_count;
        for (Index p = 0; p * kPanel < keys_count; ++p) {
            const float* const columns = keys(block).columns + p * kPanel * padded_dim;
            const bool is_whole = (p + 1) * kPanel <= (seen < keys_count ? seen : keys_count);
            product(number, row_by_row(scratch.queries), columns, [&](Index t, Vec left, Vec right) {
                if (!is_whole) {
                    const Index visible = is_causal && seen + t < keys_count ? seen + t : keys_count;
                    const Vec end = all(static_cast<float>(visible - p * kPanel));
                    left = lanes >= end ? all(kHidden) : left;
                    right = lanes + kLanes >= end ? all(kHidden) : right;
                }
                take(t, (p * number + t) * kPanel, left, right);
            });
        }
    }

    // The blocks that are near to a block, from the first on, and their number.
    Index nearest(Index block) const { return block > 0 ? block - 1 : 0; }
    Index num_near(Index block) const {
        const Index end = is_causal || block + 1 == unit.num_blocks ? block + 1 : block + 2;
        return end - nearest(block);
    }
    float* weights_of(float* weights, Index i) const { return weights + i * sizes.weight_floats(); }
    Index columns_of(Index block) const { return round_up(count(block), kPanel); }

    void load_constants() const {
        for (Index j = 0; j < padded; ++j)
            scratch.constants[j] = j < sizes.favor.features ? feature_constant(tokens, projection.squares, a, j) : kLogZero;
    }

    // Writes what queries add to the exponent of each feature.
    void load_references(const float* references) const {
        for (Index j = 0; j < padded; j += kLanes)
            store(scratch.query_references + j, load(references + j) + load(scratch.constants + j));
    }

    // Folds vectors into a state: Σ features ⊗ values, and Σ features·weights or, without weights, Σ features.
    template <Layout kLayout>
    void fold(Index number, const float* constants, const float* values, const float* weights, const State& to) const {
        float largest = -INFINITY;
        for (Index t = 0; t < number; ++t) {
            const float exponent = -scratch.norms[t] - scratch.offsets[t];
            largest = exponent > largest ? exponent : largest;
        }
        // The same for most blocks, so that their states are added without factors.
        const float guess = largest - largest == 0 ? std::nearbyint(largest / kFarRange) * kFarRange : 0.0f;
        for (Index j = 0; j < padded; j += kPanel) fold_panel(j, number, guess, constants, weights, to);
        const float* const features = scratch.features;
        if (kLayout == Layout::kByColumn) {
            const Operand columns{scratch.more_rows, 1, padded_dim, number};
            for (Index j = 0; j < padded; j += kPanel) {
                float* const context = to.context + j * dim;
                product(dim, columns, features + j * number, [&](Index c, Vec left, Vec right) {
                    store(context + c * kPanel, left), store(context + c * kPanel + kLanes, right);
                });
            }
        } else {
            for (Index j = 0; j < padded; j += kPanel)
                for (Index c = 0; c < padded_dim; c += kPanel) {
                    float* const context = to.context + c * padded + j * kPanel;
                    product(kPanel, Operand{features + j * number, 1, kPanel, number}, values + c * number,
                            [&](Index i, Vec left, Vec right) {
                                store(context + i * kPanel, left), store(context + i * kPanel + kLanes, right);
                            });
                }
        }
        clear_filling<kLayout>(to);
    }

    void fold_panel(Index j, Index number, float guess, const float* constants, const float* weights, const State& to) const {
        float* const features = scratch.features + j * number;
        const float *const norms = scratch.norms, *const offsets = scratch.offsets;
        Vec left_reference = all(guess), right_reference = left_reference, left_constant = {}, right_constant = {};
        if (constants) left_constant = load(constants + j), right_constant = load(constants + j + kLanes);
        while (true) {
            Vec left_sum = {}, right_sum = {}, left_largest = all(-INFINITY), right_largest = left_largest;
            product(number, row_by_row(scratch.queries), projection.columns + j * dim, [&](Index t, Vec left, Vec right) {
                left = left * factor + (left_constant - norms[t]) - offsets[t];
                right = right * factor + (right_constant - norms[t]) - offsets[t];
                left_largest = larger(left_largest, left), right_largest = larger(right_largest, right);
                left = exp2(left - left_reference), right = exp2(right - right_reference);
                const float weight = weights ? weights[t] : 1.0f;
                left_sum += left * weight, right_sum += right * weight;
                store(features + t * kPanel, left), store(features + t * kPanel + kLanes, right);
            });
            // Features that vanish, whose bias is −∞, keep a reference that is finite; NaN stays.
            left_largest = larger(all(kLogZero), left_largest), right_largest = larger(all(kLogZero), right_largest);
            Ints left_moves = moves(left_largest - left_reference), right_moves = moves(right_largest - right_reference);
            for (Index i = sizes.favor.features - j; i < kPanel; ++i)
                (i < kLanes ? left_moves[i] : right_moves[i - kLanes]) = 0;
            if (!(any(left_moves) || any(right_moves))) {
                store(to.sums + j, left_sum), store(to.sums + j + kLanes, right_sum);
                store(to.references + j, left_reference), store(to.references + j + kLanes, right_reference);
                return;
            }
            left_reference = left_moves ? left_largest : left_reference;
            right_reference = right_moves ? right_largest : right_reference;
        }
    }

    // Where features are out of range; NaN stays.
    PROTLM_INLINE static Ints moves(Vec rise) { return (rise > kFarRange) | (rise < -kLargestFall); }

    template <Layout kLayout>
    void clear_filling(const State& state) const {
        for (Index j = sizes.favor.features; j < padded; ++j) {
            state.sums[j] = 0.0f, state.references[j] = kLogZero;
            for (Index c = 0; c < (kLayout == Layout::kByColumn ? dim : padded_dim); ++c)
                state.context[kLayout == Layout::kByColumn ? (j / kPanel * dim + c) * kPanel + j % kPanel
                                                           : (c / kPanel * padded + j) * kPanel + c % kPanel] = 0.0f;
        }
    }

    // Writes the state of a block of keys, or of queries divided by their normalisers: but for less than a factor of 2 the
    // division is in the exponents, so that a feature of a key times one of a query is not far above 1.
    template <Layout kLayout>
    void fold_block(Index block, bool of_queries, const State& to) const {
        if (count(block) == 0) return clear(sizes.favor, to);
        bool is_first = true;
        for_each_tile_of_tokens(block, [&](Index from, Index number) {
            const State state = is_first ? to : State(scratch.spare[0], sizes.favor);
            gather(of_queries ? call.favor.q : call.favor.k, from, number, scratch.queries);
            gather(of_queries ? call.favor.out_grad : call.favor.v, from, number, scratch.more_rows);
            write_norms(number, of_queries ? shift : 0.0f);
            for (Index t = 0; t < number; ++t) scratch.offsets[t] = 0.0f;
            if (of_queries) {
                load_normalisers(from, number, scratch.more_rows);
                for (Index t = 0; t < number; ++t) {
                    const int power = -std::ilogb(scratch.factors[t]);
                    const float by = std::ldexp(1.0f, power);
                    scratch.norms[t] += static_cast<float>(power);
                    scratch.inner[t] *= by;
                    for (Index c = 0; c < dim; ++c) scratch.more_rows[t * padded_dim + c] *= by;
                }
            }
            if (kLayout == Layout::kByFeature) pack(scratch.more_rows, number, padded_dim, scratch.grad_panels);
            fold<kLayout>(number, of_queries ? scratch.constants : nullptr, scratch.grad_panels,
                          of_queries ? scratch.inner : nullptr, state);
            if (!is_first) add_states<kLayout>(sizes.favor, to, to, state);
            is_first = false;
        });
    }

    // The place of a query in what is as the query sums.
    Index place(Index token) const { return tokens.query_sum(token) - call.favor.query_sums; }

    // Loads what weights of queries are relative to, and divides the gathered gradients of the output by the sums of the
    // weights. Writes the gradients of these sums: minus the inner products with the output, and those of the logarithms.
    void load_normalisers(Index from, Index number, float* grads) const {
        for (Index t = 0; t < number; ++t, grads += padded_dim) {
            const Index at = place(from + t);
            const float by = call.factors[at], more = call.sums_grad ? call.sums_grad[at] : 0.0f;
            scratch.offsets[t] = call.offsets[at], scratch.factors[t] = by;
            scratch.inner[t] = by * (more - dot(grads, tokens.at(call.favor.out, from + t), dim));
            for (Index c = 0; c < dim; ++c) grads[c] *= by;
        }
    }

    // Folds the blocks of the unit; takes those on either side from other units.
    template <Layout kLayout>
    FarStates<kLayout> far_of(float* memory, bool of_queries, bool reads_before, bool reads_after) const {
        const bool is_cut = unit.slot >= 0;
        const UnitStates own = workspace.unit_states(is_cut ? unit.slot : 0, head, of_queries);
        const float* const before = first > 1 ? own.at(UnitStates::kBefore).context : nullptr;
        const float* const after = last + 1 < unit.num_blocks ? own.at(UnitStates::kAfter).context : nullptr;
        FarStates<kLayout> far(sizes.favor, memory, unit.count,
                               {first > 0 ? 0 : 1, unit.count + 1 + (last < unit.num_blocks), before, after, reads_before,
                                reads_after});
        if (!has_far) return far;
        far.begin();
        const Index begin = first > 0 ? first - 1 : first, end = last < unit.num_blocks ? last + 1 : last;
        for (Index block = end - 1; block >= begin; --block) {
            const Index i = block - first + 1;
            if (block < first)
                copy(sizes.favor, far.block(i), workspace.unit_states(unit.slot - 1, head, of_queries).at(UnitStates::kLast));
            else if (block >= last)
                copy(sizes.favor, far.block(i), workspace.unit_states(unit.slot + 1, head, of_queries).at(UnitStates::kFirst));
            else
                fold_block<kLayout>(block, of_queries, far.block(i));
            far.written(i);
        }
        return far;
    }

    template <Layout kLayout>
    FarStates<kLayout> far_of_keys(float* memory) const {
        return far_of<kLayout>(memory, false, true, !is_causal);
    }

    // Writes the states of the unit's own blocks for the other units of the segment.
    template <Layout kLayout>
    void fold_unit(bool of_queries) const {
        load_constants();
        const UnitStates own = workspace.unit_states(unit.slot, head, of_queries);
        fold_block<kLayout>(first, of_queries, own.at(UnitStates::kFirst));
        clear(sizes.favor, own.at(UnitStates::kMiddle));
        const State state(scratch.spare[1], sizes.favor);
        for (Index block = first + 1; block < last - 1; ++block) {
            fold_block<kLayout>(block, of_queries, state);
            add_states<kLayout>(sizes.favor, own.at(UnitStates::kMiddle), own.at(UnitStates::kMiddle), state);
        }
        fold_block<kLayout>(last - 1, of_queries, own.at(UnitStates::kLast));
    }
};

}  // namespace PROTLM_NAMESPACE
