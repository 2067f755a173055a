// The forward of near-far attention: queries read their near keys and the state of far ones.

#pragma once

#include "near_far_blocks.h"

namespace PROTLM_NAMESPACE {

struct NearFarForward : NearFarBlocks {
    void run() const {
        load_constants();
        FarStates<Layout::kByFeature> far = far_of_keys<Layout::kByFeature>(scratch.far[0]);
        pack_block(first - 1), pack_block(first);
        for (Index block = first; block < last; ++block) {
            pack_block(block + 1);
            const State* const state = has_far ? far.of(block - first + 1) : nullptr;
            for_each_tile_of_tokens(block, [&](Index from, Index number) { read(block, from, number, state); });
        }
    }

    // Writes the output and the logarithms of the normalisers of a tile of queries.
    void read(Index block, Index from, Index number, const State* far) const {
        gather(call.favor.q, from, number, scratch.queries);
        Vec largest[kQueries];
        for (Vec& x : largest) x = all(-INFINITY);
        for (Index i = 0; i < num_near(block); ++i) {
            float* const weights = weights_of(scratch.weights, i);
            scores(nearest(block) + i, from, number, [&](Index t, Index place, Vec left, Vec right) {
                largest[t] = larger(largest[t], larger(left, right));
                store(weights + place, left), store(weights + place + kLanes, right);
            });
        }
        for (Index t = 0; t < number; ++t) scratch.offsets[t] = largest_of(largest[t]);
        if (!far) return finish(block, from, 0, number, number, Operand{}, nullptr, nullptr);
        write_norms(number, shift);
        load_references(far->references);
        Vec exponents[kQueries], totals[kQueries];
        features_of_queries(0, number, *far, scratch.features, exponents, totals);
        const Operand features = from_panels(scratch.features, number, padded);
        bool is_finished = false;
        Index begin = 0;
        // Queries in a row whose features fit are finished together.
        for (Index t = 0; t <= number; ++t) {
            if (t < number && !any(exponents[t] - scratch.offsets[t] > kFarRange)) continue;
            finish(block, from, begin, t - begin, number, features.from_row(begin), far->context, totals + begin);
            begin = t + 1;
            if (t == number) break;
            const State state(scratch.spare[0], sizes.favor);
            if (!is_finished) finish_state(*far, state);
            is_finished = true;
            read_alone(block, from, t, number, state);
        }
    }

    // The same for one query with a feature far above its exact weights, from a state whose references are all there is
    // to its sums.
    void read_alone(Index block, Index from, Index t, Index number, const State& far) const {
        Vec exponents[1], totals[1];
        load_references(far.references);
        // Twice: the references have moved, and with them the largest exponent.
        features_of_queries(t, 1, far, scratch.one_row, exponents, totals);
        const float largest = largest_of(exponents[0]);
        if (largest > scratch.offsets[t]) scratch.offsets[t] = largest;
        features_of_queries(t, 1, far, scratch.one_row, exponents, totals);
        finish(block, from, t, 1, number, from_panels(scratch.one_row, 1, padded), far.context, totals);
    }

    // Writes features of queries relative to their offsets, their largest exponents, and their products with the sums of
    // a state.
    void features_of_queries(Index t0, Index number, const State& far, float* features, Vec* largest, Vec* totals) const {
        for (Index t = 0; t < number; ++t) largest[t] = all(-INFINITY), totals[t] = Vec{};
        const Operand queries = row_by_row(scratch.queries + t0 * padded_dim);
        const float *const norms = scratch.norms + t0, *const offsets = scratch.offsets + t0;
        for (Index j = 0; j < padded; j += kPanel, features += kPanel * number) {
            const Vec left_reference = load(scratch.query_references + j);
            const Vec right_reference = load(scratch.query_references + j + kLanes);
            const Vec left_sum = load(far.sums + j), right_sum = load(far.sums + j + kLanes);
            product(number, queries, projection.columns + j * dim, [&](Index t, Vec left, Vec right) {
                left = left * factor + (left_reference - norms[t]), right = right * factor + (right_reference - norms[t]);
                largest[t] = larger(largest[t], larger(left, right));
                left = exp2(left - offsets[t]), right = exp2(right - offsets[t]);
                totals[t] += left * left_sum + right * right_sum;
                store(features + t * kPanel, left), store(features + t * kPanel + kLanes, right);
            });
        }
    }

    // Copies a state, its sums made part of the references.
    void finish_state(const State& state, const State& to) const {
        copy(sizes.favor, to, state);
        for (Index j = 0; j < padded; ++j) {
            const float sum = to.sums[j];
            to.references[j] = sum > 0 ? to.references[j] + std::log2(sum) : kLogZero;
            to.sums[j] = sum > 0 ? 1.0f : sum;
            for (Index c = 0; c < padded_dim && sum > 0; ++c)
                to.context[(c / kPanel * padded + j) * kPanel + c % kPanel] /= sum;
        }
    }

    // Merges near and far, for `number` queries of a tile of `all_queries`; `far` is null if no token is far.
    void finish(Index block, Index from, Index t0, Index number, Index all_queries, const Operand& features, const float* far,
                const Vec* far_totals) const {
        if (number == 0) return;
        Factors factors[4];
        const int num_near_blocks = static_cast<int>(num_near(block));
        int terms = 0;
        if (far) factors[terms++] = {features, far};
        Vec totals[kQueries];
        for (Index t = 0; t < number; ++t) totals[t] = far ? far_totals[t] : Vec{};
        for (int i = 0; i < num_near_blocks; ++i) {
            float* const weights = weights_of(scratch.weights, i);
            const Index columns = columns_of(nearest(block) + i);
            for (Index p = 0; p < columns / kPanel; ++p)
                for (Index t = 0; t < number; ++t) {
                    float* const x = weights + (p * all_queries + t0 + t) * kPanel;
                    const float less = scratch.offsets[t0 + t];
                    const Vec left = LocalWork::weight(load(x), less), right = LocalWork::weight(load(x + kLanes), less);
                    totals[t] += left + right;
                    store(x, left), store(x + kLanes, right);
                }
            factors[terms++] = {from_panels(weights, all_queries, columns).from_row(t0), keys(nearest(block) + i).value_panels};
        }
        for (Index t = 0; t < number; ++t) {
            const float total = sum_of(totals[t]);
            const Index at = place(from + t0 + t);
            scratch.factors[t0 + t] = 1.0f / total;
            // Not as one logarithm, which beside a large score would lose the sum.
            call.offsets[at] = scratch.offsets[t0 + t], call.factors[at] = scratch.factors[t0 + t];
            call.favor.query_sums[at] = (scratch.offsets[t0 + t] + std::log2(total)) / static_cast<float>(kLog2E);
        }
        for (Index c = 0; c < padded_dim; c += kPanel) {
            sum_of_products(number, factors, terms, [&](Index t, Vec left, Vec right) {
                const float by = scratch.factors[t0 + t];
                store_columns(tokens.at(call.favor.out, from + t0 + t) + c, dim - c, left * by, right * by);
            });
            if (far) factors[0].b += padded * kPanel;
            for (int i = far != nullptr; i < terms; ++i)
                factors[i].b += columns_of(nearest(block) + i - (far != nullptr)) * kPanel;
        }
        if (is_causal) spread_not_finite(block, from + t0, number);
    }

    // Makes outputs NaN where a key that the query sees has a value that is not finite.
    void spread_not_finite(Index block, Index from, Index number) const {
        const bool is_finite = scratch.are_finite[nearest(block) % 3] && scratch.are_finite[block % 3];
        for (Index s = start(nearest(block)); s < from + number && !is_finite; ++s) {
            const float* const value = tokens.at(call.favor.v, s);
            for (Index c = 0; c < dim; ++c) {
                const float none = value[c] - value[c];
                for (Index t = s > from ? s : from; none != 0.0f && t < from + number; ++t)
                    tokens.at(call.favor.out, t)[c] += none;
            }
        }
    }
};

}  // namespace PROTLM_NAMESPACE
