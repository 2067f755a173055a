// Bidirectional FAVOR: the keys of a segment folded into its state, the state read by every query, and their gradients.
//
// The state of an exponential map is a mean of v for every feature, and the logarithm of the feature's sum over the keys
// (`references`, to base 2): attention from the projection to the keys, then from the queries to the projection. The
// number subtracted from an exponent before exp2 cancels, so any guess that keeps the results in range will do. The plain
// guess costs nothing: 0 for keys, two standard deviations for queries. Norms show whether it may overflow, sums whether
// everything vanished; a panel of keys, or a tile of queries, is then computed again around its largest exponents. No
// feature is kept beyond its tile.

#pragma once

#include "workspace.h"

namespace PROTLM_NAMESPACE {

// The most by which exponents may exceed the number subtracted: 2^60, times the keys of a segment, fits in float32.
constexpr float kRange = 60.0f;
// A smaller sum may have lost significant terms to kSmallestExponent.
constexpr float kSmallestSum = 0x1p-32f;
// The most by which the largest exponent may fall below the number subtracted.
constexpr float kLargestFall = 32.0f;
// The most by which references of a state may differ for 2^references to be multiplied into it.
constexpr float kWidestSpread = 32.0f;
constexpr float kLogZero = -1e30f;

// What the exponents of a query and a key have together beside those of each, to base 2: the constant of `oprf`, for its
// A, and the bias of the feature.
inline float feature_constant(const Tokens& tokens, const float* squares, double a, Index j) {
    const FavorCall& call = tokens.call;
    const float constant = a == 0 ? 0.0f : static_cast<float>(2 * a * kLog2E * squares[j]);
    if (!call.feature_bias) return constant;
    const float* const biases = call.feature_bias + tokens.head * call.feature_bias_head_stride;
    return constant + static_cast<float>(kLog2E) * biases[j < call.num_rows ? j : j - call.num_rows];
}

// The computations on one unit of tokens of one head.
template <bool kExponential>
struct Work {
    const Sizes& sizes;
    const Tokens tokens;
    const Projection projection;
    const Scratch& scratch;
    const Index dim = sizes.head_dim, padded_dim = sizes.padded_dim, padded = sizes.padded_features;
    const double a = tokens.oprf_a();
    const float factor = a ? static_cast<float>(std::sqrt(1 - 4 * a)) : 1.0f;
    // Of ‖k‖², in the exponent to base 2.
    const float norm_scale = kExponential ? static_cast<float>(0.5 * kLog2E / std::sqrt(double(dim))) : 0.0f;

    PROTLM_INLINE static Vec feature(Vec x) { return kExponential ? exp2(x) : larger(Vec{}, x) + kReluOffset; }

    // Calls visit(first token, number of tokens) for every tile.
    template <class Visit>
    void for_each_tile_of_tokens(Visit&& visit) const {
        for (Index first = 0; first < tokens.unit.count; first += sizes.tile)
            visit(first, tokens.unit.count - first < sizes.tile ? tokens.unit.count - first : sizes.tile);
    }

    // Gathers keys for the projection, and their ‖k‖² in the exponent. Returns an upper bound of the exponents.
    float gather_keys(Index first, Index count, float* rows, float* norms) const {
        const FavorTensor& k = tokens.call.k;
        tokens.gather(k, first, count, factor, rows);
        float largest_square = 0;
        for (Index t = 0; t < count && kExponential; ++t) {
            const float* x = tokens.at(k, first + t);
            const float square = dot(x, x, dim);
            norms[t] = norm_scale * square;
            if (!(square <= largest_square)) largest_square = square;
        }
        return factor * *projection.longest * std::sqrt(largest_square);
    }

    // Adds the keys of the unit to `state`, which is that of no key before.
    void fold(const State& state) const {
        std::memset(state.context, 0, sizeof(float) * sizes.state_floats());
        bool is_first = true;
        for_each_tile_of_tokens([&](Index first, Index count) {
            const bool is_bounded = gather_keys(first, count, scratch.rows[0], scratch.numbers[0]) <= kRange;
            tokens.gather(tokens.call.v, first, count, 1.0f, scratch.rows[1]);
            pack(scratch.rows[1], count, dim, scratch.panels);
            for (Index j = 0; j < padded; j += kPanel)
                if (!(is_bounded && plain_key_features(state, j, count, is_first))) key_features(state, j, count, is_first);
            add_features(scratch.features[0], count, scratch.panels, state.context);
            is_first = false;
        });
    }

    // Adds Σ features ⊗ values over the tokens of a tile, in passes whose repeated reads stay in the first-level cache.
    void add_features(const float* features, Index count, const float* values, float* context) const {
        for (Index j = 0; j < padded; j += kPanel)
            for (Index c = 0; c < padded_dim; c += kPanel)
                add_product(kPanel, Operand{features + j * count, 1, kPanel, count}, values + c * count,
                            context + (c * padded + j * kPanel));
    }

    // Writes the features j ... of a tile of keys relative to references of 0, and adds them to the sums of the state.
    // Returns whether they are in range; if not, the sums are as before.
    PROTLM_INLINE bool plain_key_features(const State& state, Index j, Index count, bool is_first) const {
        if (any(load(state.references + j) != 0) || any(load(state.references + j + kLanes) != 0)) return false;
        const float* const norms = scratch.numbers[0];
        float* const features = scratch.features[0] + j * count;
        Vec left_sum = load(state.sums + j), right_sum = load(state.sums + j + kLanes);
        product(count, row_major(scratch.rows[0], dim), projection.columns + j * dim, [&](Index t, Vec left, Vec right) {
            if (kExponential) left -= norms[t], right -= norms[t];
            left = feature(left), right = feature(right);
            left_sum += left, right_sum += right;
            store(features + t * kPanel, left), store(features + t * kPanel + kLanes, right);
        });
        if (kExponential && is_first && !(all_of(left_sum >= kSmallestSum) && all_of(right_sum >= kSmallestSum)))
            return false;
        store(state.sums + j, left_sum), store(state.sums + j + kLanes, right_sum);
        return true;
    }

    // The same relative to the references of the state, which move to the largest exponents where those are out of range.
    void key_features(const State& state, Index j, Index count, bool is_first) const {
        const float* const columns = projection.columns + j * dim;
        const float* const norms = scratch.numbers[0];
        float* const features = scratch.features[0] + j * count;
        while (true) {
            const Vec left_reference = load(state.references + j), right_reference = load(state.references + j + kLanes);
            Vec left_sum = load(state.sums + j), right_sum = load(state.sums + j + kLanes);
            Vec left_largest = all(-INFINITY), right_largest = left_largest;
            product(count, row_major(scratch.rows[0], dim), columns, [&](Index t, Vec left, Vec right) {
                if (kExponential) {
                    left -= norms[t], right -= norms[t];
                    left_largest = larger(left_largest, left), right_largest = larger(right_largest, right);
                    left -= left_reference, right -= right_reference;
                }
                left = feature(left), right = feature(right);
                left_sum += left, right_sum += right;
                store(features + t * kPanel, left), store(features + t * kPanel + kLanes, right);
            });
            if (!kExponential || (fits(left_largest - left_reference, is_first) &&
                                  fits(right_largest - right_reference, is_first))) {
                store(state.sums + j, left_sum), store(state.sums + j + kLanes, right_sum);
                return;
            }
            float largest[kPanel];
            store(largest, left_largest), store(largest + kLanes, right_largest);
            for (Index i = 0; i < kPanel; ++i) move_reference(state, j + i, largest[i], is_first);
        }
    }

    // Neither too large nor, where nothing else gives the feature a weight, too small; NaN fits, and stays.
    PROTLM_INLINE static bool fits(Vec rise, bool is_first) {
        return !any(rise > kRange) && !(is_first && any(rise < -kLargestFall));
    }

    void move_reference(const State& state, Index j, float largest, bool is_first) const {
        const float rise = largest - state.references[j];
        if (!(rise > kRange || (is_first && rise < -kLargestFall))) return;
        const float shrink = is_first ? 0.0f : std::exp2(-rise);
        state.references[j] = largest;
        state.sums[j] *= shrink;
        for (Index c = 0; c < padded_dim; ++c) state.context[(c / kPanel * padded + j) * kPanel + c % kPanel] *= shrink;
    }

    // Turns sums into means and logarithms of sums, and clears the features that only pad a panel.
    void finish(const State& state) const {
        for (Index j = 0; j < padded && kExponential; ++j) {
            const float inverse = 1.0f / state.sums[j];
            state.references[j] += std::log2(state.sums[j]);
            state.sums[j] = 1.0f;
            for (Index c = 0; c < padded_dim; c += kPanel) {
                float* const means = state.context + (c / kPanel * padded + j) * kPanel;
                store(means, load(means) * inverse), store(means + kLanes, load(means + kLanes) * inverse);
            }
        }
        clear_filling(state);
    }

    void clear_filling(const State& state) const {
        for (Index j = sizes.features; j < padded; ++j) {
            state.sums[j] = 0.0f;
            for (Index c = 0; c < padded_dim; c += kPanel)
                std::memset(state.context + (c / kPanel * padded + j) * kPanel, 0, sizeof(float) * kPanel);
        }
    }

    // Writes what queries add for each feature, its reference and its constant; returns the largest.
    float prepare_query_references(const float* references) const {
        float largest = -INFINITY;
        for (Index j = 0; j < padded; ++j) {
            float reference = kLogZero;
            if (j < sizes.features) {
                reference = references[j] + feature_constant(tokens, projection.squares, a, j);
                if (reference > largest) largest = reference;
            }
            scratch.query_references[j] = reference;
        }
        return largest;
    }

    // Writes the output and the query sums of the unit.
    void read(const State& state) const {
        const float largest_reference = kExponential ? prepare_query_references(state.references) : 0.0f;
        const bool is_plain = !kExponential || prepare_plain_state(state, largest_reference);
        float *const offsets = scratch.numbers[0], *const totals = scratch.numbers[1];
        for_each_tile_of_tokens([&](Index first, Index count) {
            tokens.gather(tokens.call.q, first, count, factor, scratch.rows[0]);
            const bool is_bounded = guess_offsets(scratch.rows[0], count, largest_reference) && is_plain;
            const float* context = kExponential ? scratch.other_context : state.context;
            if (!is_bounded || !plain_query_features(kExponential ? scratch.state_weights : state.sums, largest_reference, count)) {
                context = state.context;
                query_features(state, scratch.rows[0], scratch.features[0], count, count);
                if (!offsets_fit(count)) query_features(state, scratch.rows[0], scratch.features[0], count, count);
            }
            for (Index t = 0; t < count; ++t) {
                const float total = sum_of(load(scratch.vectors[1] + t * kLanes));
                totals[t] = 1.0f / total;
                *tokens.query_sum(first + t) = kExponential ? offsets[t] + std::log2(total) : total;
            }
            for (Index c = 0; c < dim; c += kPanel)
                product(count, from_panels(scratch.features[0], count, padded), context + c * padded,
                        [&](Index t, Vec left, Vec right) {
                            store_columns(tokens.at(tokens.call.out, first + t) + c, dim - c, left * totals[t],
                                          right * totals[t]);
                        });
        });
    }

    // Multiplies the state by 2^references, relative to the largest, so that exponents of queries need not hold them.
    // Returns whether that keeps all of it.
    bool prepare_plain_state(const State& state, float largest_reference) const {
        for (Index j = 0; j < padded; ++j) {
            const float relative = scratch.query_references[j] - largest_reference;
            if (j < sizes.features && !(relative >= -kWidestSpread)) return false;
            const float weight = j < sizes.features ? std::exp2(relative) : 0.0f;
            scratch.state_weights[j] = weight * state.sums[j];
            for (Index c = 0; c < padded_dim; c += kPanel) {
                const Index place = c * padded + j * kPanel;
                store(scratch.other_context + place, load(state.context + place) * weight);
                store(scratch.other_context + place + kLanes, load(state.context + place + kLanes) * weight);
            }
        }
        return true;
    }

    // Writes the numbers subtracted from the exponents of a tile of queries; returns whether they keep them in range.
    bool guess_offsets(const float* queries, Index count, float largest_reference) const {
        bool is_bounded = true;
        for (Index t = 0; t < count && kExponential; ++t, queries += dim) {
            const float square = dot(queries, queries, dim);
            // The standard deviation of ω·q; the largest of them is near its double.
            const float deviation = std::sqrt(2 * static_cast<float>(kLog2E) * norm_scale * square);
            scratch.numbers[0][t] = largest_reference + 2 * deviation;
            if (!(*projection.longest * std::sqrt(square) - 2 * deviation <= kRange)) is_bounded = false;
        }
        return is_bounded;
    }

    // Writes the features of a tile of queries, and in vectors[1] their products with weights of the features, for a
    // state that holds 2^references. Returns whether they are in range.
    PROTLM_INLINE bool plain_query_features(const float* weights, float largest_reference, Index count) const {
        float *const totals = scratch.vectors[1], *const offsets = scratch.vectors[0];
        for (Index t = 0; t < count; ++t) {
            store(totals + t * kLanes, Vec{});
            offsets[t] = kExponential ? scratch.numbers[0][t] - largest_reference : 0.0f;
        }
        for (Index j = 0; j < padded; j += kPanel) {
            const Vec left_weight = load(weights + j), right_weight = load(weights + j + kLanes);
            float* const features = scratch.features[0] + j * count;
            product(count, row_major(scratch.rows[0], dim), projection.columns + j * dim, [&](Index t, Vec left, Vec right) {
                if (kExponential) left -= offsets[t], right -= offsets[t];
                left = feature(left), right = feature(right);
                store(features + t * kPanel, left), store(features + t * kPanel + kLanes, right);
                store(totals + t * kLanes, load(totals + t * kLanes) + left * left_weight + right * right_weight);
            });
        }
        for (Index t = 0; t < count && kExponential; ++t)
            if (!(sum_of(load(totals + t * kLanes)) >= kSmallestSum)) return false;
        return true;
    }

    // Writes the features of a tile of queries, in panels of `stride` rows, and for each query its largest exponent and
    // the product of its features with the sums of the state.
    void query_features(const State& state, const float* queries, float* panels, Index stride, Index count) const {
        float *const largest = scratch.vectors[0], *const totals = scratch.vectors[1];
        const float* const offsets = scratch.numbers[0];
        for (Index t = 0; t < count; ++t) {
            store(largest + t * kLanes, all(-INFINITY));
            store(totals + t * kLanes, Vec{});
        }
        for (Index j = 0; j < padded; j += kPanel) {
            const Vec left_reference = load(scratch.query_references + j);
            const Vec right_reference = load(scratch.query_references + j + kLanes);
            const Vec left_sum = load(state.sums + j), right_sum = load(state.sums + j + kLanes);
            float* const features = panels + j * stride;
            product(count, row_major(queries, dim), projection.columns + j * dim, [&](Index t, Vec left, Vec right) {
                if (kExponential) {
                    left += left_reference, right += right_reference;
                    const Vec known = load(largest + t * kLanes);
                    store(largest + t * kLanes, larger(larger(known, left), right));
                    left -= offsets[t], right -= offsets[t];
                }
                left = feature(left), right = feature(right);
                store(features + t * kPanel, left), store(features + t * kPanel + kLanes, right);
                store(totals + t * kLanes, load(totals + t * kLanes) + left * left_sum + right * right_sum);
            });
        }
    }

    // Moves every offset that is not near the largest exponent to it; returns whether none had to move.
    bool offsets_fit(Index count) const {
        bool fit = true;
        for (Index t = 0; t < count; ++t) {
            const float largest = largest_of(load(scratch.vectors[0] + t * kLanes));
            const float rise = largest - scratch.numbers[0][t];
            if (rise <= kRange && rise >= -kLargestFall) continue;
            scratch.numbers[0][t] = largest;
            fit = false;
        }
        return fit;
    }

    // Writes the gradients of the queries of the unit, and their contribution to the gradient of the state.
    void query_gradients(const State& state, const State& gradient) const {
        std::memset(gradient.context, 0, sizeof(float) * sizes.state_floats());
        transpose_panels(state.context, padded, dim, scratch.other_context);
        if (kExponential) prepare_query_references(state.references);
        float* const query_sums = scratch.numbers[0];
        float *const queries = scratch.rows[0], *const pulled = scratch.rows[1];
        for_each_tile_of_tokens([&](Index first, Index count) {
            tokens.gather(tokens.call.q, first, count, factor, queries);
            for (Index t = 0; t < count; ++t) query_sums[t] = *tokens.query_sum(first + t);
            gather_pulled(first, count, pulled);
            pack(pulled, count, dim, scratch.panels);
            for (Index j = 0; j < padded; j += kPanel) scaled_query_features(gradient, j, count);
            add_features(scratch.features[0], count, scratch.panels, gradient.context);
            for (Index j = 0; j < padded; j += kPanel) query_exponent_grads(state, j, count);
            for (Index c = 0; c < dim; c += kPanel)
                product(count, from_panels(scratch.features[0], count, padded), projection.rows + c * padded,
                        [&](Index t, Vec left, Vec right) {
                            store_columns(tokens.at(tokens.call.q_grad, first + t) + c, dim - c, left * factor,
                                          right * factor);
                        });
        });
        clear_filling(gradient);
    }

    // Gathers the gradient of the output, and minus its inner product with the output in numbers[1].
    void gather_pulled(Index first, Index count, float* pulled) const {
        for (Index t = 0; t < count; ++t, pulled += dim) {
            const float* out_grad = tokens.at(tokens.call.out_grad, first + t);
            const float weight = kExponential ? 1.0f : 1.0f / *tokens.query_sum(first + t);
            scratch.numbers[1][t] = -weight * dot(out_grad, tokens.at(tokens.call.out, first + t), dim);
            for (Index c = 0; c < dim; ++c) pulled[c] = out_grad[c] * weight;
        }
    }

    // Writes features of queries divided by their sums; adds their contribution to the gradient of the sums of the state.
    PROTLM_INLINE void scaled_query_features(const State& gradient, Index j, Index count) const {
        const Vec left_reference = load(scratch.query_references + j);
        const Vec right_reference = load(scratch.query_references + j + kLanes);
        float* const features = scratch.features[0] + j * count;
        const float *const query_sums = scratch.numbers[0], *const inner = scratch.numbers[1];
        Vec left_grad = load(gradient.sums + j), right_grad = load(gradient.sums + j + kLanes);
        product(count, row_major(scratch.rows[0], dim), projection.columns + j * dim, [&](Index t, Vec left, Vec right) {
            if (kExponential)
                left = left + left_reference - query_sums[t], right = right + right_reference - query_sums[t];
            left = feature(left), right = feature(right);
            left_grad += left * inner[t], right_grad += right * inner[t];
            store(features + t * kPanel, left), store(features + t * kPanel + kLanes, right);
        });
        store(gradient.sums + j, left_grad), store(gradient.sums + j + kLanes, right_grad);
    }

    // Replaces the features of queries by the gradients of their exponents.
    PROTLM_INLINE void query_exponent_grads(const State& state, Index j, Index count) const {
        float* const features = scratch.features[0] + j * count;
        const float* const inner = scratch.numbers[1];
        const Vec left_sum = load(state.sums + j), right_sum = load(state.sums + j + kLanes);
        product(count, row_major(scratch.rows[1], dim), scratch.other_context + j * dim, [&](Index t, Vec left, Vec right) {
            float* const x = features + t * kPanel;
            left += left_sum * inner[t], right += right_sum * inner[t];
            store(x, exponent_grad(load(x), left)), store(x + kLanes, exponent_grad(load(x + kLanes), right));
        });
    }

    // The gradient of an exponent, or of ω·y, from the feature and its gradient.
    PROTLM_INLINE static Vec exponent_grad(Vec feature, Vec grad) {
        return kExponential ? feature * grad : (Vec)((Ints)grad & ~(Ints)(feature <= kReluOffset));
    }

    // Writes the gradients of the keys and values of the unit.
    void key_gradients(const State& state, const State& gradient) const {
        transpose_panels(gradient.context, padded, dim, scratch.other_context);
        float *const keys = scratch.rows[0], *const values = scratch.rows[1];
        for_each_tile_of_tokens([&](Index first, Index count) {
            gather_keys(first, count, keys, scratch.numbers[0]);
            tokens.gather(tokens.call.v, first, count, 1.0f, values);
            for (Index t = 0; t < count; ++t) store(scratch.vectors[0] + t * kLanes, Vec{});
            for (Index j = 0; j < padded; j += kPanel) scaled_key_features(state, j, count);
            for (Index j = 0; j < padded; j += kPanel) key_exponent_grads(gradient, j, count);
            for (Index c = 0; c < dim; c += kPanel)
                product(count, from_panels(scratch.features[0], count, padded), gradient.context + c * padded,
                        [&](Index t, Vec left, Vec right) {
                            store_columns(tokens.at(tokens.call.v_grad, first + t) + c, dim - c, left, right);
                        });
            write_key_gradients(scratch.features[1], count, first, count);
        });
    }

    // Writes the gradients of keys from those of their exponents, in panels of `stride` rows, and from the sums of the
    // latter in vectors[0]; overwrites numbers[0].
    void write_key_gradients(const float* exponent_grads, Index stride, Index first, Index count) const {
        float* const norm_grads = scratch.numbers[0];
        const float norm_factor = -1.0f / std::sqrt(static_cast<float>(dim));
        if (kExponential)
            for (Index t = 0; t < count; ++t) norm_grads[t] = norm_factor * sum_of(load(scratch.vectors[0] + t * kLanes));
        const Operand grads{exponent_grads, kPanel, 1, kPanel, padded / kPanel, stride * kPanel};
        for (Index c = 0; c < dim; c += kPanel)
            product(count, grads, projection.rows + c * padded, [&](Index t, Vec left, Vec right) {
                left *= factor, right *= factor;
                if (kExponential) {
                    const Vec norm_grad = all(norm_grads[t]);
                    const float* const key = tokens.at(tokens.call.k, first + t) + c;
                    left += norm_grad * load_columns(key, dim - c), right += norm_grad * load_columns(key + kLanes, dim - c - kLanes);
                }
                store_columns(tokens.at(tokens.call.k_grad, first + t) + c, dim - c, left, right);
            });
    }

    PROTLM_INLINE void scaled_key_features(const State& state, Index j, Index count) const {
        const Vec left_reference = load(state.references + j), right_reference = load(state.references + j + kLanes);
        float* const features = scratch.features[0] + j * count;
        const float* const norms = scratch.numbers[0];
        product(count, row_major(scratch.rows[0], dim), projection.columns + j * dim, [&](Index t, Vec left, Vec right) {
            if (kExponential) left = left - norms[t] - left_reference, right = right - norms[t] - right_reference;
            store(features + t * kPanel, feature(left)), store(features + t * kPanel + kLanes, feature(right));
        });
    }

    PROTLM_INLINE void key_exponent_grads(const State& gradient, Index j, Index count) const {
        const float* const features = scratch.features[0] + j * count;
        float *const grads = scratch.features[1] + j * count, *const totals = scratch.vectors[0];
        const Vec left_grad = load(gradient.sums + j), right_grad = load(gradient.sums + j + kLanes);
        product(count, row_major(scratch.rows[1], dim), scratch.other_context + j * dim, [&](Index t, Vec left, Vec right) {
            left = exponent_grad(load(features + t * kPanel), left + left_grad);
            right = exponent_grad(load(features + t * kPanel + kLanes), right + right_grad);
            if (kExponential) store(totals + t * kLanes, load(totals + t * kLanes) + left + right);
            store(grads + t * kPanel, left), store(grads + t * kPanel + kLanes, right);
        });
    }

    Index place() const { return tokens.unit.segment * sizes.heads + tokens.head; }

    // Loads what `store_sums` wrote to `rows`; references are 0.
    void load_sums(const float* rows, const State& state) const {
        rows += place() * sizes.features * (dim + 1);
        std::memset(state.context, 0, sizeof(float) * sizes.state_floats());
        for (Index j = 0; j < sizes.features; ++j, rows += dim + 1) {
            for (Index c = 0; c < dim; ++c) state.context[(c / kPanel * padded + j) * kPanel + c % kPanel] = rows[c];
            state.sums[j] = rows[dim];
        }
    }

    // Loads a state that `store_state` wrote.
    void load_state(const State& state) const {
        load_sums(tokens.call.states, state);
        if (kExponential)
            std::memcpy(state.references, tokens.call.references + place() * sizes.features, sizeof(float) * sizes.features);
    }
};

// The weights of a feature's means over two sets of keys in that over both.
struct Shares {
    float mine, theirs;
};

// Makes the logarithm of a sum that of it and another one.
inline Shares merge_references(float& mine, float theirs) {
    const float larger_one = mine > theirs ? mine : theirs;
    const float a = std::exp2(mine - larger_one), b = std::exp2(theirs - larger_one), sum = a + b;
    mine = larger_one + std::log2(sum);
    return {a / sum, b / sum};
}

// Adds the keys of a finished state to another one, which may be that of no key.
template <bool kExponential>
void merge(const Sizes& sizes, const State& merged, const State& next) {
    const Index padded = sizes.padded_features;
    for (Index j = 0; j < sizes.features; ++j) {
        Shares shares{1.0f, 1.0f};
        if (kExponential) {
            shares = merge_references(merged.references[j], next.references[j]);
            merged.sums[j] = 1.0f;
        } else {
            merged.sums[j] += next.sums[j];
        }
        for (Index c = 0; c < sizes.padded_dim; c += kLanes) {
            const Index place = (c / kPanel * padded + j) * kPanel + c % kPanel;
            store(merged.context + place, load(merged.context + place) * shares.mine + load(next.context + place) * shares.theirs);
        }
    }
}

// Adds the partial gradients of a state, in their order, in the memory of the first.
inline void add_gradients(const Workspace& workspace, const FavorGroup& group, Index head) {
    const State sum = workspace.slot(group.first_slot, head);
    for (Index i = 1; i < group.num_slots; ++i) {
        const State next = workspace.slot(group.first_slot + i, head);
        for (Index place = 0; place < workspace.sizes.state_floats(); place += kLanes)
            store(sum.context + place, load(sum.context + place) + load(next.context + place));
    }
}

}  // namespace PROTLM_NAMESPACE
