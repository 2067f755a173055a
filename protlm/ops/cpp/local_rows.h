// Exact attention to near tokens, or to all of a segment, forward, for x86 with AVX-512: a unit of queries goes over the
// blocks of keys within its reach.
//
// Blocks of keys are counted from the start of the segment, so that no result depends on what lies before it in the row.

#pragma once

#include <omp.h>

#include "local.h"
#include "row_attention.h"

namespace PROTLM_NAMESPACE {

template <class T>
struct RowLocalSizes {
    Index dim, inner, columns, queries;

    explicit RowLocalSizes(const LocalCall& call)
        : dim(call.head_dim), inner(round_up_inner<T>(dim)), columns(round_up_columns(dim)),
          queries(round_up(call.longest_unit, kUnitRows)) {}
};

template <class T>
struct RowLocalScratch {
    RowScratch<T> of_rows;
    T *queries, *rows, *columns, *values;  // of the unit; of kBlockKeys keys
    float* biases;
    float *sums, *end;

    template <class Take>
    RowLocalScratch(const RowLocalSizes<T>& sizes, Take&& take)
        : of_rows(take), queries(take_elements<T>(take, sizes.queries * sizes.inner)), rows(take_elements<T>(take, kBlockKeys * sizes.inner)),
          columns(take_elements<T>(take, kBlockKeys * sizes.inner)), values(take_elements<T>(take, kBlockKeys * sizes.columns)),
          biases(take(kBlockKeys)), sums(take(sizes.queries * RowSums::floats(sizes.columns))), end(take(0)) {}
};

// The vectors of one unit and head. Tokens are counted from the start of the segment.
template <class T>
struct LocalTokens {
    const LocalCall& call;
    const LocalUnit& unit;
    const Index head, inner;

    T* at(const FavorTensor& tensor, Index token) const {
        return element_at<T>(tensor, unit.row, head, unit.segment_first + token);
    }
    // Of the numbers of queries.
    Index number_of(Index token) const {
        return (unit.row * call.heads + head) * call.num_tokens + unit.segment_first + token;
    }
    // Copies vectors to `to`, filled up with zeros to `padded` rows of `inner`.
    void gather(const FavorTensor& tensor, Index from, Index count, Index padded, T* to) const {
        for (Index i = 0; i < count; ++i, to += inner) copy_row(at(tensor, from + i), call.head_dim, inner, to);
        std::memset(to, 0, sizeof(T) * (padded - count) * inner);
    }
};

// The computations on one unit of tokens of one head. Tokens are counted from the start of the segment.
template <class T>
struct RowLocalWork {
    const LocalCall& call;
    const LocalUnit& unit;
    const Index head;
    const RowLocalSizes<T>& sizes;
    const RowLocalScratch<T>& scratch;

    const Index dim = sizes.dim, inner = sizes.inner, columns = sizes.columns;
    const LocalTokens<T> tokens{call, unit, head, inner};
    const Index first = unit.first, last = unit.first + unit.count, queries = round_up(unit.count, kUnitRows);
    const float scale = static_cast<float>(kLog2E / std::sqrt(double(dim)));
    const RowAttention<T, true> attention{scratch.of_rows, inner, columns, is_half<T> ? scale : 1.0f};

    PackedKeys<T> keys(Index from, Index count) const {
        const Index whole = round_up(count, kUnitColumns);
        for (Index t = 0; t < whole; ++t) scratch.biases[t] = t < count ? 0.0f : kNoKey;
        tokens.gather(call.k, from, count, whole, scratch.rows);
        pack_as_columns(scratch.rows, whole, inner, scratch.columns);
        tokens.gather(call.v, from, count, whole, scratch.rows);
        pack_as_inner(scratch.rows, inner, whole, columns, scratch.values);
        return {scratch.columns, scratch.values, whole * kPanelColumns, scratch.biases, nullptr, whole};
    }

    void forward() const {
        const RowSums sums = RowSums::in(scratch.sums, queries, columns);
        sums.clear(queries, columns);
        tokens.gather(call.q, first, unit.count, queries, scratch.queries);
        scale_rows(scratch.queries);
        const Index low = first > call.before ? first - call.before : 0;
        const Index high = last + call.after < unit.segment_count ? last + call.after : unit.segment_count;
        for (Index from = low / kBlockKeys * kBlockKeys; from < high; from += kBlockKeys) {
            const PackedKeys<T> block = keys(from, at_most(kBlockKeys, unit.segment_count - from));
            for (Index r = 0; r < queries; r += kUnitRows) add_near(r, from, block, sums.at(r, columns));
        }
        for (Index t = 0; t < unit.count; ++t) write(sums, t);
    }

    // Queries of float32 are scaled before their products, as in the backward, which computes the weights again: among
    // large scores it would find others after another rounding. Those of bfloat16 would be rounded once more.
    void scale_rows(float* rows) const {
        for (Index i = 0; i < queries * inner; ++i) rows[i] *= scale;
    }
    void scale_rows(Half*) const {}

    // The rows from r on see keys within their reach: of the block only the panels that any of them sees are computed.
    void add_near(Index r, Index from, const PackedKeys<T>& block, const RowSums& sums) const {
        const Index query = first + r - from;
        const Index seen = query > call.before ? (query - call.before) / kUnitColumns * kUnitColumns : 0;
        const Index stop = at_most(block.count, round_up(query + kUnitRows + call.after, kUnitColumns));
        if (stop <= seen) return;
        attention.add(scratch.queries + r * inner, block.part(seen, stop - seen, inner),
                      {query - call.before - seen, query + call.after + 1 - seen}, sums);
    }

    void write(const RowSums& sums, Index t) const {
        const float factor = 1.0f / sums.total(t);
        const Index number = tokens.number_of(first + t);
        call.maxima[number] = sums.references[t];
        call.factors[number] = factor;
        float* const values = sums.values + t * columns;
        for (Index c = 0; c < columns; c += 16) store16(values + c, _mm512_mul_ps(load16(values + c), _mm512_set1_ps(factor)));
        store_columns(tokens.at(call.out, first + t), values, dim);
    }
};

template <class T>
Index row_local_workspace(const LocalCall& call) {
    return call.num_threads * scratch_floats<RowLocalScratch<T>>(RowLocalSizes<T>(call));
}

template <class T>
void run_row_local(const LocalCall& call) {
    const RowLocalSizes<T> sizes(call);
    ask_for_huge_pages(call.out, call.result_bytes);
#pragma omp parallel num_threads(static_cast<int>(call.num_threads))
    {
        const Units tiles;
        const Index thread = omp_get_thread_num();
        const RowLocalScratch<T> scratch =
            scratch_at<RowLocalScratch<T>>(call.workspace + thread * scratch_floats<RowLocalScratch<T>>(sizes), sizes);
#pragma omp for schedule(dynamic)
        for (Index i = 0; i < call.num_units * call.heads; ++i)
            RowLocalWork<T>{call, call.units[i / call.heads], i % call.heads, sizes, scratch}.forward();
    }
}

}  // namespace PROTLM_NAMESPACE
