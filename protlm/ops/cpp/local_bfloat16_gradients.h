// The backward of exact attention of bfloat16: a unit computes the gradients of its own queries from the keys within their
// reach, and those of its own keys from the queries that reach them.
//
// Blocks of keys and stripes of queries are counted from the start of the segment, so that no result depends on what lies
// before it in the row. What lies on both sides of a seam is computed twice, and no two threads write to the same place.

#pragma once

#include <initializer_list>

#include "local_rows.h"
#include "row_gradients.h"

namespace PROTLM_NAMESPACE {

struct LocalGradientSizes {
    Index dim, inner, columns, own_keys;

    // The unit's own keys may begin within a block and end within one.
    explicit LocalGradientSizes(const LocalCall& call)
        : dim(call.head_dim), inner(round_up_inner<Half>(dim)), columns(round_up_columns(dim)),
          own_keys(round_up(call.longest_unit, kBlockKeys) + kBlockKeys) {}
};

// A block of keys in the forms that the products read.
struct PackedBlock {
    Half *key_columns, *value_columns, *key_values;  // keys and values as columns, keys as the inner axis

    static Index elements(const LocalGradientSizes& sizes) { return kBlockKeys * (2 * sizes.inner + sizes.columns); }
    static PackedBlock in(Half* memory, const LocalGradientSizes& sizes) {
        Half* const values = memory + kBlockKeys * sizes.inner;
        return {memory, values, values + kBlockKeys * sizes.inner};
    }
};

struct LocalGradientScratch {
    GradientScratch of_rows;
    Half *queries, *grads;                // of a stripe: [kStripeRows][inner]
    Half *query_columns, *grad_columns;   // the same: [inner][kStripeRows]
    Half *rows;                           // of whatever is packed: [kBlockKeys][inner]
    Half *blocks;                         // PackedBlock: those of the unit's own keys, and another one
    Half *exponent_grads;                 // of kUnitRows queries: [kUnitRows][kBlockKeys]
    Half *weight_panels, *grad_panels;    // of a stripe, as its inner axis
    float *exponents, *factors, *products;  // of queries
    float *key_exponents, *ones;          // of keys
    float *query_grads;                   // of a stripe: [kStripeRows][columns]
    float *key_grads, *value_grads;       // of the unit's own keys: [inner][own_keys]
    float *end;

    template <class Take>
    LocalGradientScratch(const LocalGradientSizes& sizes, Take&& take) : of_rows(take) {
        for (Half** x : {&queries, &grads, &query_columns, &grad_columns, &rows})
            *x = take_elements<Half>(take, kStripeRows * sizes.inner);
        blocks = take_elements<Half>(take, (sizes.own_keys / kBlockKeys + 1) * PackedBlock::elements(sizes));
        exponent_grads = take_elements<Half>(take, kUnitRows * kBlockKeys);
        for (Half** x : {&weight_panels, &grad_panels}) *x = take_elements<Half>(take, kBlockKeys / kPanelColumns * kStripePanel);
        for (float** x : {&exponents, &factors, &products}) *x = take(kStripeRows);
        for (float** x : {&key_exponents, &ones}) *x = take(kBlockKeys);
        query_grads = take(kStripeRows * sizes.columns);
        for (float** x : {&key_grads, &value_grads}) *x = take(sizes.inner * sizes.own_keys);
        end = take(0);
    }
};
static_assert(kStripeRows == kBlockKeys, "one memory for vectors of either");

// The computations on one unit of tokens of one head. Tokens are counted from the start of the segment.
struct LocalGradientWork {
    const LocalCall& call;
    const LocalUnit& unit;
    const Index head;
    const LocalGradientSizes& sizes;
    const LocalGradientScratch& scratch;

    const Index dim = sizes.dim, inner = sizes.inner, columns = sizes.columns;
    const Index first = unit.first, last = unit.first + unit.count, stride = sizes.own_keys;
    const Index first_own = first / kBlockKeys * kBlockKeys;  // the block with the first own key
    const float scale = static_cast<float>(kLog2E / std::sqrt(double(dim)));
    const LocalTokens<Half> tokens{call, unit, head, inner};
    const RowGradients<true, AddedFirst::kOfKey> gradients{scratch.of_rows, inner, scale};

    void backward() const {
        for (float* x : {scratch.key_grads, scratch.value_grads}) std::memset(x, 0, sizeof(float) * inner * stride);
        for (Index i = 0; i < kBlockKeys; ++i) scratch.ones[i] = 1.0f;
        for (Index from = first_own; from < last; from += kBlockKeys) pack_keys(from, packed_at((from - first_own) / kBlockKeys));
        // Stripes are cut where the unit's own queries begin and end.
        const Index begin = first > call.after ? first - call.after : 0;
        const Index end = last + call.before < unit.segment_count ? last + call.before : unit.segment_count;
        for (Index query = begin / kStripeRows * kStripeRows; query < end; query += kStripeRows) {
            const Index stop = at_most(end, query + kStripeRows);
            add_stripe(query > begin ? query : begin, at_most(first, stop), false);
            add_stripe(query > first ? query : first, at_most(last, stop), true);
            add_stripe(query > last ? query : last, stop, false);
        }
        write_key_grads(scratch.key_grads, call.k_grad, 1.0f / std::sqrt(static_cast<float>(dim)));
        write_key_grads(scratch.value_grads, call.v_grad, 1.0f);
    }

private:
    // Adds what the queries from `query` on and before `stop` give to the unit's own keys, and if they are its own writes
    // their gradients.
    void add_stripe(Index query, Index stop, bool is_own) const {
        if (stop <= query) return;
        const Index count = stop - query, whole = round_up(count, kUnitRows);
        gather_queries(query, count, whole);
        const Index nearest = query > call.before ? query - call.before : 0;
        const Index farthest = at_most(unit.segment_count, stop + call.after);
        const Index low = is_own || nearest > first ? nearest : first, high = is_own || farthest < last ? farthest : last;
        if (is_own) std::memset(scratch.query_grads, 0, sizeof(float) * whole * columns);
        for (Index from = low / kBlockKeys * kBlockKeys; from < high; from += kBlockKeys) add_block(query, whole, from, is_own);
        const float factor = 1.0f / std::sqrt(static_cast<float>(dim));
        for (Index t = 0; t < count && is_own; ++t)
            store_scaled(tokens.at(call.q_grad, query + t), scratch.query_grads + t * columns, factor, dim);
    }

    void gather_queries(Index query, Index count, Index whole) const {
        tokens.gather(call.out, query, count, whole, scratch.rows);
        tokens.gather(call.out_grad, query, count, whole, scratch.grads);
        tokens.gather(call.q, query, count, whole, scratch.queries);
        const Index number = tokens.number_of(query);
        for (Index t = 0; t < whole; ++t) {
            scratch.products[t] = -product_of(scratch.rows + t * inner, scratch.grads + t * inner, inner);
            scratch.exponents[t] = t < count ? -call.maxima[number + t] : kNoKey;
            scratch.factors[t] = t < count ? call.factors[number + t] : 0.0f;
        }
        transpose_rows(scratch.queries, whole, inner, scratch.query_columns, kStripeRows);
        transpose_rows(scratch.grads, whole, inner, scratch.grad_columns, kStripeRows);
    }

    void add_block(Index query, Index whole, Index from, bool is_own) const {
        const bool has_own_keys = from >= first_own && from < last;
        const PackedBlock block = packed_at(has_own_keys ? (from - first_own) / kBlockKeys : sizes.own_keys / kBlockKeys);
        if (!has_own_keys) pack_keys(from, block);
        const Index real = at_most(kBlockKeys, unit.segment_count - from), count = round_up(real, kUnitColumns);
        for (Index t = 0; t < count; ++t) scratch.key_exponents[t] = t < real ? 0.0f : kNoKey;
        const GradientKeys keys{block.key_columns, block.value_columns, scratch.key_exponents, scratch.ones, count};
        for (Index r = 0; r < whole; r += kUnitRows) add_rows(query + r - from, r, keys, block, is_own, has_own_keys);
        for (Index c = 0; c < inner && has_own_keys; c += kUnitRows) {
            const Index to = c * stride + from - first_own;
            multiply<true>(scratch.query_columns + c * kStripeRows, kStripeRows, scratch.grad_panels, kStripePanel, whole, count,
                           scratch.key_grads + to, stride);
            multiply<true>(scratch.grad_columns + c * kStripeRows, kStripeRows, scratch.weight_panels, kStripePanel, whole, count,
                           scratch.value_grads + to, stride);
        }
    }

    // Of the block only the panels that any of the kUnitRows queries sees are computed. `query` is counted from its first key.
    void add_rows(Index query, Index r, const GradientKeys& keys, const PackedBlock& block, bool is_own, bool has_own_keys) const {
        const Index low = query > call.before ? (query - call.before) / kUnitColumns * kUnitColumns : 0, seen = at_most(keys.count, low);
        const Index high = query + kUnitRows + call.after;
        const Index stop = high <= seen ? seen : at_most(keys.count, round_up(high, kUnitColumns));
        if (has_own_keys)
            for (Index i = 0; i < keys.count; i += kPanelColumns) {
                if (i >= seen && i < stop) continue;
                const Index place = i / kPanelColumns * kStripePanel + r * kPanelColumns;
                for (Half* panels : {scratch.weight_panels, scratch.grad_panels})
                    std::memset(panels + place, 0, sizeof(Half) * kUnitRows * kPanelColumns);
            }
        if (stop <= seen) return;
        const GradientRows rows{scratch.queries + r * inner, scratch.grads + r * inner, scratch.exponents + r,
                                scratch.factors + r, scratch.products + r};
        const Band band{query - call.before - seen, query + call.after + 1 - seen};
        gradients.compute(rows, keys.part(seen, stop - seen, inner), band, [&](Index t, Index i, const WeightPairs& pairs) {
            for (int n = 0; n < 2; ++n) store_row(scratch.exponent_grads + (t + n) * kBlockKeys + i, pairs.grads[n]);
            if (!has_own_keys) return;
            const Index place = (seen + i) / kPanelColumns * kStripePanel + (r + t) * kPanelColumns;
            store_pair(scratch.weight_panels + place, pairs.weights);
            store_pair(scratch.grad_panels + place, pairs.grads);
        });
        if (is_own)
            multiply<true>(scratch.exponent_grads, kBlockKeys, block.key_values + seen * kPanelColumns, kBlockKeys * kPanelColumns,
                           stop - seen, columns, scratch.query_grads + r * columns, columns);
    }

    PackedBlock packed_at(Index index) const {
        return PackedBlock::in(scratch.blocks + index * PackedBlock::elements(sizes), sizes);
    }

    void pack_keys(Index from, const PackedBlock& block) const {
        const Index count = at_most(kBlockKeys, unit.segment_count - from);
        tokens.gather(call.v, from, count, kBlockKeys, scratch.rows);
        pack_as_columns(scratch.rows, kBlockKeys, inner, block.value_columns);
        tokens.gather(call.k, from, count, kBlockKeys, scratch.rows);
        pack_as_columns(scratch.rows, kBlockKeys, inner, block.key_columns);
        pack_as_inner(scratch.rows, inner, kBlockKeys, columns, block.key_values);
    }

    // Writes the gradients of the unit's own keys, whose columns lie in rows.
    void write_key_grads(const float* sums, const FavorTensor& to, float factor) const {
        float turned[kPanelColumns * kPanelColumns];
        for (Index from = first / kPanelColumns * kPanelColumns; from < last; from += kPanelColumns)
            for (Index c = 0; c < dim; c += kPanelColumns) {
                transpose_words(sums + c * stride + from - first_own, stride, turned);
                for (Index token = from > first ? from : first; token < at_most(last, from + kPanelColumns); ++token)
                    store_scaled(tokens.at(to, token) + c, turned + (token - from) * kPanelColumns, factor, at_most(kPanelColumns, dim - c));
            }
    }
};

inline Index local_gradient_workspace(const LocalCall& call) {
    return call.num_threads * scratch_floats<LocalGradientScratch>(LocalGradientSizes(call));
}

inline void run_local_gradients(const LocalCall& call) {
    const LocalGradientSizes sizes(call);
    for (const FavorTensor* grad : {&call.q_grad, &call.k_grad, &call.v_grad}) ask_for_huge_pages(*grad, call.result_bytes);
#pragma omp parallel num_threads(static_cast<int>(call.num_threads))
    {
        const Units tiles;
        const Index thread = omp_get_thread_num();
        const LocalGradientScratch scratch =
            scratch_at<LocalGradientScratch>(call.workspace + thread * scratch_floats<LocalGradientScratch>(sizes), sizes);
#pragma omp for schedule(dynamic)
        for (Index i = 0; i < call.num_units * call.heads; ++i)
            LocalGradientWork{call, call.units[i / call.heads], i % call.heads, sizes, scratch}.backward();
    }
}

}  // namespace PROTLM_NAMESPACE
