// The backward of near-far attention. The queries have a state too, of features divided by normalisers, which far keys
// read.

#pragma once

#include "near_far_blocks.h"

namespace PROTLM_NAMESPACE {

struct NearFarBackward : NearFarBlocks {
    void run() const {
        load_constants();
        FarStates<Layout::kByColumn> far_keys = far_of_keys<Layout::kByColumn>(scratch.far[0]);
        FarStates<Layout::kByFeature> far_queries = far_of<Layout::kByFeature>(scratch.far[1], true, !is_causal, true);
        const Index begin = first > 0 ? first - 1 : 0, end = last < unit.num_blocks ? last + 1 : last;
        pack_block(begin - 1), pack_block(begin);
        for (Index block = begin; block < end; ++block) {
            pack_block(block + 1);
            const bool is_own = block >= first && block < last;
            const State* const state = has_far && is_own ? far_keys.of(block - first + 1) : nullptr;
            for_each_tile_of_tokens(block, [&](Index from, Index number) {
                query_gradients(block, from, number, state, is_own);
            });
            if (block - 1 >= first) key_gradients(block - 1, far_queries);
        }
        if (end == last) key_gradients(last - 1, far_queries);
    }

    // Writes the gradients of a tile of queries, and adds to those of the near keys of the unit.
    void query_gradients(Index block, Index from, Index number, const State* far, bool is_own) const {
        gather(call.favor.q, from, number, scratch.queries);
        gather(call.favor.out_grad, from, number, scratch.grads);
        load_normalisers(from, number, scratch.grads);
        pack(scratch.queries, number, padded_dim, scratch.query_panels);
        pack(scratch.grads, number, padded_dim, scratch.grad_panels);
        Factors factors[4];
        int terms = 0;
        const float* const inner = scratch.inner;
        for (Index i = 0; i < num_near(block); ++i) {
            const Index near = nearest(block) + i;
            const KeyBlock of = keys(near);
            if (!is_own && (near < first || near >= last)) continue;
            float *const weights = weights_of(scratch.weights, i), *const grads = weights_of(scratch.weight_grads, i);
            scores(near, from, number, [&](Index t, Index place, Vec left, Vec right) {
                const float less = scratch.offsets[t];
                store(weights + place, LocalWork::weight(left, less));
                store(weights + place + kLanes, LocalWork::weight(right, less));
            });
            const Index columns = columns_of(near);
            for (Index p = 0; p < columns / kPanel; ++p)
                product(number, row_by_row(scratch.grads), of.value_columns + p * kPanel * padded_dim,
                        [&](Index t, Vec left, Vec right) {
                            const Index place = (p * number + t) * kPanel;
                            store(grads + place, load(weights + place) * (left + inner[t]));
                            store(grads + place + kLanes, load(weights + place + kLanes) * (right + inner[t]));
                        });
            factors[terms++] = {from_panels(grads, number, columns), of.panels};
            if (near >= first && near < last) add_key_gradients(near, number, weights, grads);
        }
        if (!is_own) return;
        const int num_near_terms = terms;
        for (Index t = 0; t < number && far; ++t) store(scratch.one_row + t * kLanes, Vec{});
        if (far) {
            exponent_gradients(number, *far);
            factors[terms++] = {from_panels(scratch.features, number, padded), projection.rows};
        }
        for (Index t = 0; t < number; ++t)
            scratch.norms[t] = far ? -scale * sum_of(load(scratch.one_row + t * kLanes)) : 0.0f;
        for (Index c = 0; c < padded_dim; c += kPanel) {
            sum_of_products(number, factors, terms, [&](Index t, Vec left, Vec right) {
                const float* const query = scratch.queries + t * padded_dim + c;
                const float by = scratch.norms[t];
                store_columns(tokens.at(call.favor.q_grad, from + t) + c, dim - c, left * factor + load(query) * by,
                              right * factor + load(query + kLanes) * by);
            });
            for (int i = 0; i < terms; ++i)
                factors[i].b += i < num_near_terms ? factors[i].a.num_panels * kPanel * kPanel : padded * kPanel;
        }
    }

    void add_key_gradients(Index near, Index number, const float* weights, const float* grads) const {
        const KeyBlock of = keys(near);
        const Index columns = columns_of(near);
        for (Index p = 0; p < columns; p += kPanel)
            for (Index c = 0; c < padded_dim; c += kPanel) {
                const Index to = c * columns + p * kPanel;
                add_product(kPanel, Operand{grads + p * number, 1, kPanel, number}, scratch.query_panels + c * number,
                            of.grads + to);
                add_product(kPanel, Operand{weights + p * number, 1, kPanel, number}, scratch.grad_panels + c * number,
                            of.value_grads + to);
            }
    }

    // A feature of a query is in range, or the largest of the state it meets is not below 2^-kLargestFall; one of a key
    // times one of a query is at most 2. Only the rounding of exponents beyond 2^24 can lead further.
    PROTLM_INLINE static Vec bounded_feature(Vec exponent) {
        return exp2(exponent > kLargestFall + 8 ? all(kLargestFall + 8) : exponent);
    }

    // Writes the gradients of the exponents of a tile of queries, and in `one_row` their sums.
    void exponent_gradients(Index number, const State& far) const {
        write_norms(number, shift);
        load_references(far.references);
        const float *const norms = scratch.norms, *const offsets = scratch.offsets, *const inner = scratch.inner;
        float* const totals = scratch.one_row;
        for (Index j = 0; j < padded; j += kPanel) {
            float* const features = scratch.features + j * number;
            const Vec left_reference = load(scratch.query_references + j);
            const Vec right_reference = load(scratch.query_references + j + kLanes);
            product(number, row_by_row(scratch.queries), projection.columns + j * dim, [&](Index t, Vec left, Vec right) {
                left = left * factor + (left_reference - norms[t]), right = right * factor + (right_reference - norms[t]);
                store(features + t * kPanel, bounded_feature(left - offsets[t]));
                store(features + t * kPanel + kLanes, bounded_feature(right - offsets[t]));
            });
            const Vec left_sum = load(far.sums + j), right_sum = load(far.sums + j + kLanes);
            product(number, row_by_row(scratch.grads), far.context + j * dim, [&](Index t, Vec left, Vec right) {
                float* const x = features + t * kPanel;
                left = load(x) * (left + left_sum * inner[t]), right = load(x + kLanes) * (right + right_sum * inner[t]);
                store(totals + t * kLanes, load(totals + t * kLanes) + left + right);
                store(x, left), store(x + kLanes, right);
            });
        }
    }

    // Writes the gradients of a block of own keys, whose near queries are all there.
    void key_gradients(Index block, FarStates<Layout::kByFeature>& far_queries) const {
        const State* const far = has_far ? far_queries.of(block - first + 1) : nullptr;
        for (Index p = 0; p < columns_of(block); p += kPanel) key_gradients(block, p, far);
    }

    // The same for the panel that begins with key p of the block. Keys are lanes here: so neither the state nor the keys
    // need be transposed.
    void key_gradients(Index block, Index p, const State* far) const {
        const KeyBlock of = keys(block);
        const Index columns = columns_of(block), from = start(block) + p;
        const Index number = count(block) - p < kPanel ? count(block) - p : kPanel;
        float *const features = scratch.lanes[0], *const grads = scratch.lanes[1];
        float norm_grads[kPanel] = {};
        if (far) {
            // Columns have the factor of exact scores.
            const float by = factor / scale;
            features_of_keys(of, p, *far, by, features);
            Vec left_total = {}, right_total = {};
            product(padded, along(far->context), of.value_columns + p * padded_dim, [&](Index j, Vec left, Vec right) {
                const float sum = far->sums[j];
                left = load(features + j * kPanel) * (left + sum), right = load(features + j * kPanel + kLanes) * (right + sum);
                left_total += left, right_total += right;
                store(grads + j * kPanel, left), store(grads + j * kPanel + kLanes, right);
            });
            store(norm_grads, left_total * -scale), store(norm_grads + kLanes, right_total * -scale);
        }
        for (Index c = 0; c < padded_dim; c += kPanel) {
            const float* const near = of.value_grads + c * columns + p * kPanel;
            const float* const near_keys = of.grads + c * columns + p * kPanel;
            const auto write_value = [&](Index t, Vec left, Vec right) {
                store_columns(tokens.at(call.favor.v_grad, from + t) + c, dim - c, left + load(near + t * kPanel),
                              right + load(near + t * kPanel + kLanes));
            };
            const auto write_key = [&](Index t, Vec left, Vec right) {
                const float* const key = tokens.at(call.favor.k, from + t) + c;
                const float by = norm_grads[t];
                left = left * factor + load(near_keys + t * kPanel) * scale + load_columns(key, dim - c) * by;
                right = right * factor + load(near_keys + t * kPanel + kLanes) * scale +
                        load_columns(key + kLanes, dim - c - kLanes) * by;
                store_columns(tokens.at(call.favor.k_grad, from + t) + c, dim - c, left, right);
            };
            if (far) {
                product(number, Operand{features, 1, kPanel, padded}, far->context + c * padded, write_value);
                product(number, Operand{grads, 1, kPanel, padded}, projection.rows + c * padded, write_key);
            } else {
                for (Index t = 0; t < number; ++t) write_value(t, Vec{}, Vec{}), write_key(t, Vec{}, Vec{});
            }
        }
    }

    // Writes the features of a panel of keys, relative to the references of the queries that read them.
    void features_of_keys(const KeyBlock& of, Index p, const State& far, float by, float* features) const {
        const Vec left_norm = load(of.norms + p), right_norm = load(of.norms + p + kLanes);
        product(padded, along(projection.rows), of.columns + p * padded_dim, [&](Index j, Vec left, Vec right) {
            const float reference = far.references[j];
            store(features + j * kPanel, bounded_feature(left * by + (reference - left_norm)));
            store(features + j * kPanel + kLanes, bounded_feature(right * by + (reference - right_norm)));
        });
    }

    // Panels over columns, as by_feature contexts are, as the left side of a product over columns.
    Operand along(const float* panels) const { return {panels, kPanel, 1, kPanel, padded_dim / kPanel, padded * kPanel}; }
};

}  // namespace PROTLM_NAMESPACE
