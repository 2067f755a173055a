// Bidirectional FAVOR of bfloat16, backward: of the attention of the queries to the projection, then of that of the
// projection to the keys, from the states that the forward wrote.
//
// Between the two stands the gradient of the state: of every feature's mean of v, or sum for ReLU, and of its sum over the
// keys. Those of the units of a long segment are added in their order.

#pragma once

#include <initializer_list>

#include "favor_bfloat16.h"
#include "row_gradients.h"

namespace PROTLM_NAMESPACE {

// The gradient of the state of one segment and head.
struct StateGradient {
    float *values;  // [inner][padded_features], the features of a column of v together
    float *sums;    // [padded_features]

    static Index floats(const HalfSizes& sizes) { return round_up(sizes.padded_features * (sizes.inner + 1), 16); }
    static StateGradient in(float* memory, const HalfSizes& sizes) {
        return {memory, memory + sizes.padded_features * sizes.inner};
    }
};

struct HalfGradientScratch {
    GradientScratch of_rows;
    Half *rows, *partners;           // of a stripe of tokens: [kStripeRows][inner]
    Half *partner_columns;           // [inner][kStripeRows]
    Half *weights, *exponent_grads;  // of kUnitRows tokens: [kUnitRows][kBlockKeys]
    Half *weight_panels;             // of a stripe, as its inner axis
    Half *feature_rows;              // what is packed next: [padded_features][inner] or [columns][padded_features]
    Half *feature_partners;          // means of v, or their gradients, as columns
    Half *feature_values;            // the gradients as the inner axis
    float *exponents, *grads;        // of tokens of a stripe
    float *feature_exponents, *feature_grads;
    float *grad_sums;          // of tokens of a stripe, in parts
    float *sums, *other_sums;  // of a stripe: [kStripeRows][columns]
    float *gradient, *end;

    template <class Take>
    HalfGradientScratch(const HalfSizes& sizes, Take&& take)
        : of_rows(take), rows(take_elements<Half>(take, kStripeRows * sizes.inner)),
          partners(take_elements<Half>(take, kStripeRows * sizes.inner)),
          partner_columns(take_elements<Half>(take, kStripeRows * sizes.inner)),
          weights(take_elements<Half>(take, kUnitRows * kBlockKeys)),
          exponent_grads(take_elements<Half>(take, kUnitRows * kBlockKeys)),
          weight_panels(take_elements<Half>(take, kBlockKeys / kPanelColumns * kStripePanel)),
          feature_rows(take_elements<Half>(take, sizes.padded_features * sizes.inner)),
          feature_partners(take_elements<Half>(take, sizes.padded_features * sizes.inner)),
          feature_values(take_elements<Half>(take, sizes.padded_features * sizes.columns)), exponents(take(kStripeRows)),
          grads(take(kStripeRows)), feature_exponents(take(sizes.padded_features)), feature_grads(take(sizes.padded_features)),
          grad_sums(take(kStripeRows * kPanelColumns)), sums(take(kStripeRows * sizes.columns)),
          other_sums(take(kStripeRows * sizes.columns)), gradient(take(StateGradient::floats(sizes))), end(take(0)) {}
};

struct HalfGradientWorkspace {
    const HalfSizes sizes;
    float *projections, *slots, *threads;

    explicit HalfGradientWorkspace(const FavorCall& call) : sizes(call), projections(call.workspace) {
        slots = projections + sizes.projections * projection_floats();
        threads = slots + call.num_slots * sizes.heads * StateGradient::floats(sizes);
    }

    // The rows of the projection once more, as the inner axis.
    Index projection_floats() const {
        return sizes.projection_floats() + round_up(sizes.padded_features * sizes.columns, 32) / 2;
    }
    HalfProjection projection(Index head) const { return {projection_memory(head), sizes}; }
    Half* projection_values(Index head) const {
        return reinterpret_cast<Half*>(projection_memory(head) + sizes.projection_floats());
    }
    StateGradient slot(Index index, Index head) const {
        return StateGradient::in(slots + (index * sizes.heads + head) * StateGradient::floats(sizes), sizes);
    }
    float* thread(Index index) const { return threads + index * scratch_floats<HalfGradientScratch>(sizes); }

    static Index floats(const FavorCall& call) { return HalfGradientWorkspace(call).thread(call.num_threads) - call.workspace; }

private:
    float* projection_memory(Index head) const {
        return projections + (sizes.projections > 1 ? head : 0) * projection_floats();
    }
};

// The computations on one unit of tokens of one head.
template <bool kExponential>
struct HalfGradientWork {
    const HalfSizes& sizes;
    const Tokens tokens;
    const HalfProjection projection;
    const Half* projection_values;
    const HalfGradientScratch& scratch;
    const Index dim = sizes.dim, inner = sizes.inner, columns = sizes.columns, padded = sizes.padded_features;
    const double a = tokens.oprf_a();
    // Of the gradients of q and k.
    const float grad_scale = static_cast<float>(tokens.call.scale * (kExponential ? std::sqrt(1 - 4 * a) : 1.0));
    const float scale = score_scale<kExponential>(tokens.call, a);
    // Of the queries, whose exponents are those of the projection, and of the keys, to which the projection attends.
    const RowGradients<kExponential, AddedFirst::kOfKey> of_queries{scratch.of_rows, inner, scale};
    const RowGradients<kExponential, AddedFirst::kOfRow> of_keys{scratch.of_rows, inner, scale};

    // Calls visit(first token, number of tokens, the same filled up to whole units of rows) for every stripe.
    template <class Visit>
    void for_each_stripe(Visit&& visit) const {
        for (Index first = 0; first < tokens.unit.count; first += kStripeRows) {
            const Index count = at_most(kStripeRows, tokens.unit.count - first);
            visit(first, count, round_up(count, kUnitRows));
        }
    }

    // Calls visit(first feature, number of features) for every block.
    template <class Visit>
    void for_each_block(Visit&& visit) const {
        for (Index j = 0; j < padded; j += kBlockKeys) visit(j, at_most(kBlockKeys, padded - j));
    }

    GradientRows rows_at(Index r) const {
        return {scratch.rows + r * inner, scratch.partners + r * inner, scratch.exponents + r, nullptr, scratch.grads + r};
    }
    GradientKeys features_at(Index j, Index count) const {
        return GradientKeys{projection.columns, scratch.feature_partners, scratch.feature_exponents, scratch.feature_grads, padded}
            .part(j, count, inner);
    }

    // Writes the gradients of the queries of the unit, and their contribution to the gradient of the state.
    void query_gradients(const StateGradient& gradient) const {
        load_state();
        std::memset(gradient.values, 0, sizeof(float) * padded * (inner + 1));
        for_each_stripe([&](Index first, Index count, Index whole) {
            gather_queries(first, count, whole);
            std::memset(scratch.sums, 0, sizeof(float) * whole * columns);
            for_each_block([&](Index j, Index features) {
                for (Index r = 0; r < whole; r += kUnitRows) add_queries(r, j, features, gradient.sums + j);
                for (Index c = 0; c < inner; c += kUnitRows)
                    multiply<true>(scratch.partner_columns + c * kStripeRows, kStripeRows, scratch.weight_panels, kStripePanel,
                                   whole, features, gradient.values + c * padded + j, padded);
            });
            for (Index t = 0; t < count; ++t) write(tokens.call.q_grad, first + t, scratch.sums + t * columns, grad_scale);
        });
        // What only fills a tile has a weight with ReLU.
        for (Index c = 0; c < inner; ++c)
            std::memset(gradient.values + c * padded + sizes.features, 0, sizeof(float) * (padded - sizes.features));
        std::memset(gradient.sums + sizes.features, 0, sizeof(float) * (padded - sizes.features));
    }

    void load_state() const {
        const Index place = tokens.unit.segment * sizes.heads + tokens.head;
        const float* state = tokens.call.states + place * sizes.features * (dim + 1);
        const float* const references = tokens.call.references + (kExponential ? place * sizes.features : place);
        std::memset(scratch.feature_rows, 0, sizeof(Half) * padded * inner);
        for (Index j = 0; j < padded; ++j) {
            const bool is_real = j < sizes.features;
            scratch.feature_exponents[j] = !kExponential ? 0.0f
                                           : is_real     ? references[j] + feature_constant(tokens, projection.squares, a, j)
                                                         : kNoKey;
            scratch.feature_grads[j] = is_real ? state[j * (dim + 1) + dim] : 0.0f;
            if (is_real) store_columns(scratch.feature_rows + j * inner, state + j * (dim + 1), dim);
        }
        // The sums of ReLU as the forward divided by them.
        for (Index j = 0; j < padded; j += kPanelColumns)
            store16(scratch.feature_grads + j, rounded(load16(scratch.feature_grads + j)));
        pack_as_columns(scratch.feature_rows, padded, inner, scratch.feature_partners);
    }

    // Gathers queries and the gradients of their outputs, for ReLU divided by the sum of the query's weights.
    void gather_queries(Index first, Index count, Index whole) const {
        // In the memory of the queries, which are gathered last.
        Half* const outputs = scratch.rows;
        gather_halves(tokens, tokens.call.out, first, count, whole, inner, outputs);
        gather_halves(tokens, tokens.call.out_grad, first, count, whole, inner, scratch.partners);
        for (Index t = 0; t < whole; ++t) {
            Half* const grad = scratch.partners + t * inner;
            const bool is_real = t < count;
            const float sum = is_real ? *tokens.query_sum(first + t) : 0.0f;
            scratch.exponents[t] = !kExponential ? 0.0f : is_real ? -sum : kNoKey;
            for (Index c = 0; c < inner && is_real && !kExponential; c += kPanelColumns)
                store_row(grad + c, _mm512_mul_ps(widened(grad + c), _mm512_set1_ps(1.0f / sum)));
            scratch.grads[t] = -product_of(grad, outputs + t * inner, inner);
        }
        transpose_rows(scratch.partners, whole, inner, scratch.partner_columns, kStripeRows);
        gather_halves(tokens, tokens.call.q, first, count, whole, inner, scratch.rows);
    }

    // Adds what kUnitRows queries get from a block of features, and makes their weights columns of `weight_panels`.
    void add_queries(Index r, Index j, Index features, float* sums) const {
        const GradientRows rows = rows_at(r);
        of_queries.compute(rows, features_at(j, features), Band::whole(features), [&](Index t, Index i, const WeightPairs& pairs) {
            for (int n = 0; n < 2; ++n) store_row(scratch.exponent_grads + (t + n) * kBlockKeys + i, pairs.grads[n]);
            store_pair(scratch.weight_panels + i / kPanelColumns * kStripePanel + (r + t) * kPanelColumns, pairs.weights);
            __m512 sum = load16(sums + i);
            for (int n = 0; n < 2; ++n) sum = _mm512_fmadd_ps(pairs.weights[n], _mm512_set1_ps(rows.grads[t + n]), sum);
            store16(sums + i, sum);
        });
        multiply<true>(scratch.exponent_grads, kBlockKeys, projection_values + j * kPanelColumns, padded * kPanelColumns, features,
                       columns, scratch.sums + r * columns, columns);
    }

    // Writes the gradients of the keys and values of the unit.
    void key_gradients(const StateGradient& gradient) const {
        load_gradient(gradient);
        for_each_stripe([&](Index first, Index count, Index whole) {
            gather_keys(first, count, whole);
            for (float* sums : {scratch.sums, scratch.other_sums}) std::memset(sums, 0, sizeof(float) * whole * columns);
            std::memset(scratch.grad_sums, 0, sizeof(float) * whole * kPanelColumns);
            for_each_block([&](Index j, Index features) {
                for (Index r = 0; r < whole; r += kUnitRows) add_keys(r, j, features);
            });
            for (Index t = 0; t < count; ++t) {
                float* const key_grad = scratch.sums + t * columns;
                for (Index c = 0; c < columns; ++c) key_grad[c] *= grad_scale;
                if (kExponential) add_norm_gradient(t, key_grad);
                write(tokens.call.k_grad, first + t, key_grad, 1.0f);
                write(tokens.call.v_grad, first + t, scratch.other_sums + t * columns, 1.0f);
            }
        });
    }

    void load_gradient(const StateGradient& gradient) const {
        const Index place = tokens.unit.segment * sizes.heads + tokens.head;
        const float* const references = tokens.call.references + (kExponential ? place * sizes.features : place);
        for (Index j = 0; j < padded; ++j) {
            scratch.feature_exponents[j] = !kExponential ? 0.0f : j < sizes.features ? -references[j] : kNoKey;
            scratch.feature_grads[j] = gradient.sums[j];
        }
        pack_rounded_as_inner(gradient.values, padded, inner, padded, scratch.feature_partners);
        // Its columns are rows already.
        for (Index c = 0; c < columns; ++c) store_columns(scratch.feature_rows + c * padded, gradient.values + c * padded, padded);
        pack_as_columns(scratch.feature_rows, columns, padded, scratch.feature_values);
    }

    void gather_keys(Index first, Index count, Index whole) const {
        gather_halves(tokens, tokens.call.k, first, count, whole, inner, scratch.rows);
        gather_halves(tokens, tokens.call.v, first, count, whole, inner, scratch.partners);
        for (Index t = 0; t < whole; ++t) {
            scratch.exponents[t] = !kExponential ? 0.0f
                                   : t < count   ? -norm_scale(dim) * square_of(scratch.rows + t * inner, inner)
                                                 : kNoKey;
            scratch.grads[t] = 1.0f;
        }
    }

    // Adds what kUnitRows keys get from a block of features.
    void add_keys(Index r, Index j, Index features) const {
        float* const grad_sums = scratch.grad_sums + r * kPanelColumns;
        of_keys.compute(rows_at(r), features_at(j, features), Band::whole(features), [&](Index t, Index i, const WeightPairs& pairs) {
            for (int n = 0; n < 2; ++n) {
                store_row(scratch.weights + (t + n) * kBlockKeys + i, pairs.weights[n]);
                store_row(scratch.exponent_grads + (t + n) * kBlockKeys + i, pairs.grads[n]);
                float* const sum = grad_sums + (t + n) * kPanelColumns;
                if (kExponential) store16(sum, _mm512_add_ps(load16(sum), pairs.grads[n]));
            }
        });
        multiply<true>(scratch.exponent_grads, kBlockKeys, projection_values + j * kPanelColumns, padded * kPanelColumns, features,
                       columns, scratch.sums + r * columns, columns);
        multiply<true>(scratch.weights, kBlockKeys, scratch.feature_values + j * kPanelColumns, padded * kPanelColumns, features,
                       columns, scratch.other_sums + r * columns, columns);
    }

    // Adds the gradient of a key by way of ‖k‖².
    void add_norm_gradient(Index t, float* to) const {
        const float sum = _mm512_reduce_add_ps(load16(scratch.grad_sums + t * kPanelColumns));
        const __m512 factor = _mm512_set1_ps(-sum / std::sqrt(static_cast<float>(dim)));
        for (Index c = 0; c < columns; c += kPanelColumns)
            store16(to + c, _mm512_fmadd_ps(factor, widened(scratch.rows + t * inner + c), load16(to + c)));
    }

    void write(const FavorTensor& to, Index t, const float* row, float factor) const {
        store_scaled(element_at<Half>(to, tokens.unit.row, tokens.head, tokens.token(t)), row, factor, dim);
    }
};

template <bool kExponential>
void run_half_gradient_team(const FavorCall& call, const HalfGradientWorkspace& workspace) {
    const Units tiles;
    const HalfSizes& sizes = workspace.sizes;
    const HalfGradientScratch scratch = scratch_at<HalfGradientScratch>(workspace.thread(omp_get_thread_num()), sizes);
    const StateGradient own = StateGradient::in(scratch.gradient, sizes);
    const auto work = [&](const FavorUnit& unit, Index head) {
        return HalfGradientWork<kExponential>{sizes, {call, unit, head}, workspace.projection(head), workspace.projection_values(head), scratch};
    };
#pragma omp for schedule(static)
    for (Index head = 0; head < sizes.projections; ++head) {
        const HalfProjection projection = workspace.projection(head);
        pack_projection(call, sizes, head, projection);
        pack_as_inner(projection.rows, sizes.inner, sizes.padded_features, sizes.columns, workspace.projection_values(head));
    }
#pragma omp for schedule(dynamic)
    for (Index i = 0; i < call.num_units * sizes.heads; ++i) {
        const FavorUnit& unit = call.units[i / sizes.heads];
        const HalfGradientWork<kExponential> task = work(unit, i % sizes.heads);
        task.query_gradients(unit.slot < 0 ? own : workspace.slot(unit.slot, i % sizes.heads));
        if (unit.slot < 0) task.key_gradients(own);
    }
#pragma omp for schedule(dynamic)
    for (Index i = 0; i < call.num_groups * sizes.heads; ++i) {
        const FavorGroup& group = call.groups[i / sizes.heads];
        float* const sum = workspace.slot(group.first_slot, i % sizes.heads).values;
        for (Index slot = 1; slot < group.num_slots; ++slot) {
            const float* const next = workspace.slot(group.first_slot + slot, i % sizes.heads).values;
            for (Index place = 0; place < StateGradient::floats(sizes); ++place) sum[place] += next[place];
        }
    }
#pragma omp for schedule(dynamic)
    for (Index i = 0; i < call.num_units * sizes.heads; ++i) {
        const FavorUnit& unit = call.units[i / sizes.heads];
        if (unit.slot >= 0) work(unit, i % sizes.heads).key_gradients(workspace.slot(unit.first_slot, i % sizes.heads));
    }
}

inline Index half_workspace(const FavorCall& call) {
    return call.is_backward ? HalfGradientWorkspace::floats(call) : HalfWorkspace::floats(call);
}

inline void run_half_backward(const FavorCall& call) {
    const HalfGradientWorkspace workspace(call);
    for (const FavorTensor* grad : {&call.q_grad, &call.k_grad, &call.v_grad}) ask_for_huge_pages(*grad, call.result_bytes);
#pragma omp parallel num_threads(static_cast<int>(call.num_threads))
    call.is_exponential ? run_half_gradient_team<true>(call, workspace) : run_half_gradient_team<false>(call, workspace);
}

}  // namespace PROTLM_NAMESPACE
