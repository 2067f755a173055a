// Causal FAVOR: a segment is taken in short stretches. The queries of a stretch read the state of all keys before it, and
// the keys of their own stretch by a triangle of weights.
//
// References are the largest exponents of the keys before a stretch and of its first key: every query of the stretch
// sees that key, so no weight it needs vanishes, and none depends on a later token. Where a key rises too far above the
// references the stretch ends, and the next one begins with that key. The operations that compute the output of a token
// from earlier tokens do not depend on later ones, so later tokens cannot change a bit of it.

#pragma once

#include "bidirectional.h"

namespace PROTLM_NAMESPACE {

// The most by which a key may exceed the references of its stretch. A query may be as far from its offset as 2^-32 or
// 2^60: with 2^24, exp2 of the smallest exponent stays far below that, and weights far below the largest float.
constexpr float kLargestKeyRise = 24.0f;

template <bool kExponential>
struct CausalWork : Work<kExponential> {
    using Base = Work<kExponential>;
    using Base::clear_filling, Base::dim, Base::exponent_grad, Base::factor, Base::feature, Base::padded, Base::padded_dim,
        Base::prepare_query_references, Base::projection, Base::scratch, Base::sizes, Base::tokens;

    const CausalScratch& more;
    const Index stride;  // rows of a panel of features, and of the triangles

    CausalWork(const Base& base, const CausalScratch& more_scratch)
        : Base(base), more(more_scratch), stride(base.sizes.padded_stretch()) {}

    // Makes `state` that of the keys before the unit, of no key for null.
    void begin(const State& state, const float* before) const {
        if (before) {
            std::memcpy(state.context, before, sizeof(float) * sizes.state_floats());
            return;
        }
        std::memset(state.context, 0, sizeof(float) * sizes.state_floats());
        for (Index j = 0; j < padded && kExponential; ++j) state.references[j] = kLogZero;
    }

    // The same for query_scan, which takes the context transposed.
    void begin_transposed(const State& state, const float* before) const {
        begin(state, before);
        if (before) transpose_panels(before, padded, dim, state.context);
    }

    // Gathers the stretch that begins with a token of the unit: keys, values and the features of the keys. Moves the
    // references of the state to the first key, and calls rescale(panel of features, two factors) where they move.
    // Returns how many tokens the stretch has.
    template <class Rescale>
    Index next_stretch(const State& state, Index first, Rescale&& rescale) const {
        const Index rest = tokens.unit.count - first, count = rest < sizes.stretch ? rest : sizes.stretch;
        gather_stretch(first, count);
        float *const rises = scratch.vectors[0];
        for (Index t = 0; t < count; ++t) store(rises + t * kLanes, all(-INFINITY));
        for (Index j = 0; j < padded; j += kPanel) {
            float* const features = scratch.features[0] + j * stride;
            key_exponents(j, count, features);
            if (kExponential) {
                const Vec left = load(features), right = load(features + kLanes);
                const Vec left_old = load(state.references + j), right_old = load(state.references + j + kLanes);
                const Vec left_new = larger(left, left_old), right_new = larger(right, right_old);
                store(state.references + j, left_new), store(state.references + j + kLanes, right_new);
                if (any(left_new > left_old) || any(right_new > right_old))
                    rescale(j, shrinkage(left_old, left_new), shrinkage(right_old, right_new));
                for (Index t = 0; t < count; ++t) {
                    float* const x = features + t * kPanel;
                    const Vec l = load(x) - left_new, r = load(x + kLanes) - right_new;
                    store(rises + t * kLanes, larger(load(rises + t * kLanes), larger(l, r)));
                    store(x, exp2(l)), store(x + kLanes, exp2(r));
                }
            }
        }
        Index kept = 1;
        while (kept < count && !(largest_of(load(rises + kept * kLanes)) > kLargestKeyRise)) ++kept;
        return kExponential ? kept : count;
    }

    // Gathers a stretch whose references are known.
    void known_stretch(const float* references, Index first, Index count) const {
        gather_stretch(first, count);
        for (Index j = 0; j < padded; j += kPanel) {
            float* const features = scratch.features[0] + j * stride;
            key_exponents(j, count, features);
            const Vec left = load(references + j), right = load(references + j + kLanes);
            for (Index t = 0; t < count && kExponential; ++t) {
                float* const x = features + t * kPanel;
                store(x, exp2(load(x) - left)), store(x + kLanes, exp2(load(x + kLanes) - right));
            }
        }
    }

    void gather_stretch(Index first, Index count) const {
        this->gather_keys(first, count, scratch.rows[0], more.norms);
        tokens.gather(tokens.call.v, first, count, 1.0f, scratch.rows[1]);
    }

    // Exponents of keys, for ReLU their features, for one panel of features.
    void key_exponents(Index j, Index count, float* features) const {
        product(count, row_major(scratch.rows[0], dim), projection.columns + j * dim, [&](Index t, Vec left, Vec right) {
            if (kExponential)
                left -= more.norms[t], right -= more.norms[t];
            else
                left = feature(left), right = feature(right);
            store(features + t * kPanel, left), store(features + t * kPanel + kLanes, right);
        });
        // No sums of the state, which are zero for the padding of a panel, enter the weights within a stretch.
        for (Index i = sizes.features - j; i < kPanel && !kExponential; ++i)
            for (Index t = 0; t < count; ++t) features[t * kPanel + i] = 0.0f;
    }

    // 2^(lower - higher), 0 where the lower reference is that of no key; 1 where rounding, or a column that only pads a
    // panel, makes the lower one larger.
    static Vec shrinkage(Vec lower, Vec higher) {
        Vec factors;
        for (int i = 0; i < kLanes; ++i) factors[i] = lower[i] > higher[i] ? 1.0f : std::exp2(lower[i] - higher[i]);
        return factors;
    }

    // Writes the lower triangle of weights [t][s], the products of query features with key features.
    void triangle_of_weights(const float* query_features, Index count) const {
        transpose_panels(scratch.features[0], stride, padded, more.key_columns);
        for (Index s = 0; s < count; s += kPanel)
            product(count - s, from_strided_panels(query_features + s * kPanel), more.key_columns + s * padded,
                    [&](Index t, Vec left, Vec right) {
                        float* const to = more.weights + (s + t) * stride + s;
                        store(to, left), store(to + kLanes, right);
                    });
    }

    // Features [padded / kPanel][stride][kPanel] as the left side of a product over features.
    Operand from_strided_panels(const float* features) const {
        return {features, kPanel, 1, kPanel, padded / kPanel, stride * kPanel};
    }

    // Adds the keys of the stretch to a state.
    void add_keys(const State& state, Index count) const {
        for (Index c = 0; c < padded_dim; c += kPanel)
            for (Index j = 0; j < padded; j += kPanel)
                add_product(kPanel, Operand{scratch.features[0] + j * stride, 1, kPanel, count},
                            scratch.panels + c * count, state.context + (c * padded + j * kPanel));
        add_key_sums(state, count);
    }

    void add_key_sums(const State& state, Index count) const {
        for (Index j = 0; j < padded; j += kPanel) {
            Vec left = load(state.sums + j), right = load(state.sums + j + kLanes);
            const float* const features = scratch.features[0] + j * stride;
            for (Index t = 0; t < count; ++t)
                left += load(features + t * kPanel), right += load(features + t * kPanel + kLanes);
            store(state.sums + j, left), store(state.sums + j + kLanes, right);
        }
    }

    // Writes the output and the query sums of the unit. `state` holds all keys before the unit, and at the end also the
    // keys of the unit.
    void scan(const State& state) const {
        float *const offsets = scratch.numbers[0], *const totals = scratch.vectors[1];
        for (Index first = 0, count; first < tokens.unit.count; first += count) {
            count = next_stretch(state, first, [&](Index j, Vec left, Vec right) {
                store(state.sums + j, load(state.sums + j) * left);
                store(state.sums + j + kLanes, load(state.sums + j + kLanes) * right);
                rescale_panels(state.context, j, left, right);
            });
            tokens.gather(tokens.call.q, first, count, factor, more.queries);
            const float largest_reference = kExponential ? prepare_query_references(state.references) : 0.0f;
            this->guess_offsets(more.queries, count, largest_reference);
            this->query_features(state, more.queries, scratch.features[1], stride, count);
            if (kExponential && !this->offsets_fit(count))
                this->query_features(state, more.queries, scratch.features[1], stride, count);
            triangle_of_weights(scratch.features[1], count);
            pack(scratch.rows[1], count, dim, scratch.panels);
            for (Index t = 0; t < count; ++t) {
                float total = sum_of(load(totals + t * kLanes));
                for (Index s = 0; s <= t; ++s) total += more.weights[t * stride + s];
                *tokens.query_sum(first + t) = kExponential ? offsets[t] + std::log2(total) : total;
                scratch.numbers[1][t] = 1.0f / total;
            }
            for (Index c = 0; c < dim; c += kPanel) {
                const float* const values = scratch.panels + c * count;
                product(count, from_strided_panels(scratch.features[1]), state.context + c * padded,
                        [&](Index t, Vec left, Vec right) {
                            // One token at a time: zero times a later value that is not finite would reach back.
                            for (Index s = 0; s <= t; ++s) {
                                const Vec weight = all(more.weights[t * stride + s]);
                                left += weight * load(values + s * kPanel);
                                right += weight * load(values + s * kPanel + kLanes);
                            }
                            store_columns(tokens.at(tokens.call.out, first + t) + c, dim - c,
                                          left * scratch.numbers[1][t], right * scratch.numbers[1][t]);
                        });
            }
            add_keys(state, count);
            clear_filling(state);
        }
    }

    // Multiplies the rows j ... of panels [columns / kPanel][padded][kPanel] by a factor each.
    void rescale_panels(float* context, Index j, Vec left, Vec right) const {
        for (Index i = 0; i < kPanel; ++i) {
            const float by = i < kLanes ? left[i] : right[i - kLanes];
            if (by == 1.0f) continue;
            for (Index c = 0; c < padded_dim; c += kPanel) {
                float* const x = context + (c * padded + (j + i) * kPanel);
                store(x, load(x) * by), store(x + kLanes, load(x + kLanes) * by);
            }
        }
    }

    // Writes the gradients of the queries of the unit. `state` holds all keys before, its context transposed to
    // [padded / kPanel][head_dim][kPanel]. Keeps the stretches and their references; returns their number.
    Index query_scan(const State& state) const {
        Index steps = 0;
        for (Index first = 0, count; first < tokens.unit.count; first += count) {
            count = next_stretch(state, first, [&](Index j, Vec left, Vec right) {
                store(state.sums + j, load(state.sums + j) * left);
                store(state.sums + j + kLanes, load(state.sums + j + kLanes) * right);
                for (Index c = 0; c < dim; ++c) {
                    float* const x = state.context + j * dim + c * kPanel;
                    store(x, load(x) * left), store(x + kLanes, load(x + kLanes) * right);
                }
            });
            keep_step(steps++, first, state);
            gather_queries(state.references, first, count);
            triangle_of_gradients(count);
            for (Index j = 0; j < padded; j += kPanel) {
                const Vec left_sum = load(state.sums + j), right_sum = load(state.sums + j + kLanes);
                const float* const inner = scratch.numbers[1];
                float* const features = scratch.features[1] + j * stride;
                product_with_triangle(
                    count, row_major(more.queries, dim), state.context + j * dim,
                    [&](Index t, int rows) { return Operand{more.weights_grad + t * stride, stride, 1, t + rows}; },
                    [&](Index) { return scratch.features[0] + j * stride; },
                    [&](Index t, Vec left, Vec right) {
                        left += left_sum * inner[t], right += right_sum * inner[t];
                        float* const x = features + t * kPanel;
                        store(x, exponent_grad(load(x), left)), store(x + kLanes, exponent_grad(load(x + kLanes), right));
                    });
            }
            for (Index c = 0; c < dim; c += kPanel)
                product(count, from_strided_panels(scratch.features[1]), projection.rows + c * padded,
                        [&](Index t, Vec left, Vec right) {
                            store_columns(tokens.at(tokens.call.q_grad, first + t) + c, dim - c, left * factor,
                                          right * factor);
                        });
            for (Index j = 0; j < padded; j += kPanel)
                add_product(dim, Operand{scratch.rows[1], 1, dim, count}, scratch.features[0] + j * stride,
                            state.context + j * dim);
            add_key_sums(state, count);
            for (Index j = sizes.features; j < padded; ++j) state.sums[j] = 0.0f;
        }
        more.step_bounds[steps] = tokens.unit.count;
        return steps;
    }

    void keep_step(Index step, Index first, const State& state) const {
        more.step_bounds[step] = first;
        std::memcpy(more.step_references + step * padded, state.references, sizeof(float) * padded);
    }

    // Gathers the queries of a stretch for the backward: their scaled features in features[1], the gradient of the output
    // as rows in `queries` and as panels, and its inner products with the output in numbers[1].
    void gather_queries(const float* references, Index first, Index count) const {
        float* const query_sums = scratch.numbers[0];
        tokens.gather(tokens.call.q, first, count, factor, more.queries);
        for (Index t = 0; t < count; ++t) query_sums[t] = *tokens.query_sum(first + t);
        if (kExponential) prepare_query_references(references);
        for (Index j = 0; j < padded; j += kPanel) {
            float* const features = scratch.features[1] + j * stride;
            const Vec left_reference = load(scratch.query_references + j);
            const Vec right_reference = load(scratch.query_references + j + kLanes);
            product(count, row_major(more.queries, dim), projection.columns + j * dim, [&](Index t, Vec left, Vec right) {
                if (kExponential)
                    left = left + left_reference - query_sums[t], right = right + right_reference - query_sums[t];
                store(features + t * kPanel, feature(left)), store(features + t * kPanel + kLanes, feature(right));
            });
        }
        this->gather_pulled(first, count, more.queries);
        pack(more.queries, count, dim, more.query_panels);
    }

    // Writes the lower triangle [t][s] of the gradients of the weights, zeros above it.
    void triangle_of_gradients(Index count) const {
        const float* const inner = scratch.numbers[1];
        pack_transposed(scratch.rows[1], count, dim, more.value_columns);
        for (Index s = 0; s < count; s += kPanel)
            product(count, row_major(more.queries, dim), more.value_columns + s * dim, [&](Index t, Vec left, Vec right) {
                float* const to = more.weights_grad + t * stride + s;
                store(to, left + inner[t]), store(to + kLanes, right + inner[t]);
            });
        clear_above_diagonal(more.weights_grad, count);
    }

    void clear_above_diagonal(float* triangle, Index count) const {
        for (Index t = 0; t < count; ++t)
            for (Index s = t + 1; s < count; ++s) triangle[t * stride + s] = 0.0f;
    }

    // Adds the contribution of the queries of the stretch to the gradient of the state.
    void add_queries(const State& gradient, Index count) const {
        for (Index j = 0; j < padded; j += kPanel) {
            const float* const features = scratch.features[1] + j * stride;
            for (Index c = 0; c < padded_dim; c += kPanel)
                add_product(kPanel, Operand{features, 1, kPanel, count}, more.query_panels + c * count,
                            gradient.context + (c * padded + j * kPanel));
            Vec left = load(gradient.sums + j), right = load(gradient.sums + j + kLanes);
            for (Index t = 0; t < count; ++t) {
                left += load(features + t * kPanel) * scratch.numbers[1][t];
                right += load(features + t * kPanel + kLanes) * scratch.numbers[1][t];
            }
            store(gradient.sums + j, left), store(gradient.sums + j + kLanes, right);
        }
        clear_filling(gradient);
    }

    // Makes a gradient of the state relative to earlier references.
    void move_gradient(const State& gradient, const float* references) const {
        for (Index j = 0; j < padded && kExponential; j += kPanel) {
            const Vec left = shrinkage(load(references + j), load(gradient.references + j));
            const Vec right = shrinkage(load(references + j + kLanes), load(gradient.references + j + kLanes));
            store(gradient.sums + j, load(gradient.sums + j) * left);
            store(gradient.sums + j + kLanes, load(gradient.sums + j + kLanes) * right);
            rescale_panels(gradient.context, j, left, right);
        }
        std::memcpy(gradient.references, references, sizeof(float) * padded);
    }

    // Adds the gradient of the state that the queries of the unit give, relative to the references before the unit.
    void own_gradient(const State& gradient, const float* references) const {
        std::memset(gradient.context, 0, sizeof(float) * sizes.state_floats());
        std::memcpy(gradient.references, references, sizeof(float) * padded);
        for (Index first = 0; first < tokens.unit.count; first += sizes.stretch) {
            const Index rest = tokens.unit.count - first, count = rest < sizes.stretch ? rest : sizes.stretch;
            gather_queries(references, first, count);
            add_queries(gradient, count);
        }
    }

    // Writes the gradients of keys and values, from the last stretch to the first; `gradient` is that of later units.
    void key_scan(Index steps, const State& gradient) const {
        for (Index step = steps - 1; step >= 0; --step) {
            const Index first = more.step_bounds[step];
            const Index count = more.step_bounds[step + 1] - first;
            const float* const references = more.step_references + step * padded;
            move_gradient(gradient, references);
            known_stretch(references, first, count);
            gather_queries(references, first, count);
            triangle_of_gradients(count);
            triangle_of_weights(scratch.features[1], count);
            clear_above_diagonal(more.weights, count);
            for (Index c = 0; c < dim; c += kPanel)
                product_with_triangle(
                    count, from_strided_panels(scratch.features[0]), gradient.context + c * padded,
                    [&](Index s, int) { return Operand{more.weights + s * stride + s, 1, stride, count - s}; },
                    [&](Index s) { return more.query_panels + c * count + s * kPanel; },
                    [&](Index s, Vec left, Vec right) {
                        store_columns(tokens.at(tokens.call.v_grad, first + s) + c, dim - c, left, right);
                    });
            transpose_panels(gradient.context, padded, dim, scratch.other_context);
            float* const totals = scratch.vectors[0];
            for (Index s = 0; s < count; ++s) store(totals + s * kLanes, Vec{});
            for (Index j = 0; j < padded; j += kPanel) {
                const Vec left_grad = load(gradient.sums + j), right_grad = load(gradient.sums + j + kLanes);
                float* const features = scratch.features[0] + j * stride;
                product_with_triangle(
                    count, row_major(scratch.rows[1], dim), scratch.other_context + j * dim,
                    [&](Index s, int) { return Operand{more.weights_grad + s * stride + s, 1, stride, count - s}; },
                    [&](Index s) { return scratch.features[1] + j * stride + s * kPanel; },
                    [&](Index s, Vec left, Vec right) {
                        float* const x = features + s * kPanel;
                        left = exponent_grad(load(x), left + left_grad);
                        right = exponent_grad(load(x + kLanes), right + right_grad);
                        if (kExponential) store(totals + s * kLanes, load(totals + s * kLanes) + left + right);
                        store(x, left), store(x + kLanes, right);
                    });
            }
            this->write_key_gradients(scratch.features[0], stride, first, count);
            add_queries(gradient, count);
        }
    }
};

// Makes every partial state that of all keys before it, and returns in `total` that of the whole segment.
template <bool kExponential>
void keys_before(const Workspace& workspace, const FavorGroup& group, Index head, const State& total, float* spare) {
    const Sizes& sizes = workspace.sizes;
    const std::size_t bytes = sizeof(float) * sizes.state_floats();
    std::memset(total.context, 0, bytes);
    for (Index j = 0; j < sizes.padded_features && kExponential; ++j) total.references[j] = kLogZero;
    const State next(spare, sizes);
    for (Index i = 0; i < group.num_slots; ++i) {
        const State slot = workspace.slot(group.first_slot + i, head);
        std::memcpy(next.context, slot.context, bytes);
        std::memcpy(slot.context, total.context, bytes);
        merge<kExponential>(sizes, total, next);
    }
}

// Makes every partial gradient of the state that of all queries after it; the first unit's is not read.
template <bool kExponential>
void queries_after(const Workspace& workspace, const FavorGroup& group, Index head, const CausalWork<kExponential>& work,
                   const State& total, float* spare) {
    const Sizes& sizes = workspace.sizes;
    const std::size_t bytes = sizeof(float) * sizes.state_floats();
    const State own(spare, sizes);
    std::memset(total.context, 0, bytes);
    for (Index i = group.num_slots - 1; i >= 0; --i) {
        const State slot = workspace.gradient_slot(group.first_slot + i, head);
        if (i == group.num_slots - 1) std::memcpy(total.references, slot.references, sizeof(float) * sizes.padded_features);
        std::memcpy(own.context, slot.context, bytes);
        std::memcpy(slot.context, total.context, bytes);
        if (i == 0) return;
        work.move_gradient(total, own.references);
        for (Index place = 0; place < sizes.padded_features * (sizes.padded_dim + 1); place += kLanes)
            store(total.context + place, load(total.context + place) + load(own.context + place));
    }
}

}  // namespace PROTLM_NAMESPACE
