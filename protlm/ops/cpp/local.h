// Exact attention to near tokens: a stretch of a segment at a time, whose keys and values are packed once, and in it
// blocks of queries whose weights stay in the first-level caches.
//
// A unit computes the results of its own tokens alone: the outputs and gradients of its queries from the keys within their
// reach, the gradients of its keys from the queries that reach them. What lies on both sides of a seam is computed twice,
// and no two threads write to the same place. Blocks and panels are counted from the start of the segment, so that no
// result depends on what lies before it in the row.

#pragma once

#include <initializer_list>

#include <omp.h>

#include "call.h"
#include "workspace.h"

namespace PROTLM_NAMESPACE {

// Queries that are computed together.
constexpr Index kQueries = 32;
static_assert(kQueries % kPanel == 0, "blocks begin where panels of keys begin");
// What a query does not see; scores of arithmetic are larger, or not finite.
constexpr float kHidden = -3.0e38f;

struct LocalSizes {
    Index dim, padded_dim, keys, columns;

    // For the longest unit and the widest window of a call.
    explicit LocalSizes(const LocalCall& call)
        : dim(call.head_dim), padded_dim(round_up(dim, kPanel)), keys(call.longest_unit + call.before + call.after),
          columns(kQueries + call.before + call.after) {
        Index longest_segment = 0;
        for (Index i = 0; i < call.num_units; ++i)
            if (call.units[i].segment_count > longest_segment) longest_segment = call.units[i].segment_count;
        for (Index* x : {&keys, &columns}) *x = round_up(*x < longest_segment ? *x : longest_segment, kPanel) + kPanel;
    }
};

// The memory of one thread.
struct LocalScratch {
    float *rows;                              // [keys][dim], contiguous
    float *key_columns, *value_columns;       // [keys / kPanel][dim][kPanel]
    float *key_panels, *value_panels;         // [padded_dim / kPanel][keys][kPanel]
    float *key_grads, *value_grads;           // likewise
    float *queries, *grads;                   // [kQueries][dim]
    float *query_panels, *grad_panels;        // [padded_dim / kPanel][kQueries][kPanel]
    float *weights, *weight_grads;            // [columns / kPanel][kQueries][kPanel]
    float *numbers;                           // a number for each query

    LocalScratch(float* memory, const LocalSizes& sizes) {
        const auto take = [&memory](Index count) {
            float* const taken = memory;
            memory += round_up(count, 16);
            return taken;
        };
        rows = take(sizes.keys * sizes.dim);
        for (float** x : {&key_columns, &value_columns}) *x = take(sizes.keys * sizes.dim);
        for (float** x : {&key_panels, &value_panels, &key_grads, &value_grads}) *x = take(sizes.keys * sizes.padded_dim);
        for (float** x : {&queries, &grads}) *x = take(kQueries * sizes.dim);
        for (float** x : {&query_panels, &grad_panels}) *x = take(kQueries * sizes.padded_dim);
        for (float** x : {&weights, &weight_grads}) *x = take(kQueries * sizes.columns);
        numbers = take(kQueries);
        end = memory;
    }

    static Index floats(const LocalSizes& sizes) { return LocalScratch(nullptr, sizes).end - static_cast<float*>(nullptr); }

private:
    float* end;
};

// The computations on one unit of tokens of one head. Tokens are counted from the start of the segment.
struct LocalWork {
    const LocalCall& call;
    const LocalUnit& unit;
    const Index head;
    const LocalSizes& sizes;
    const LocalScratch& scratch;

    const Index dim = sizes.dim, padded_dim = sizes.padded_dim;
    const Index first = unit.first, last = unit.first + unit.count;
    const Index first_key = (first > call.before ? first - call.before : 0) / kPanel * kPanel;
    const Index last_key = last + call.after < unit.segment_count ? last + call.after : unit.segment_count;
    const Index padded_keys = round_up(last_key - first_key, kPanel);
    const float scale = static_cast<float>(kLog2E / std::sqrt(double(dim)));

    float* at(const FavorTensor& tensor, Index token) const {
        return tensor.data + unit.row * tensor.batch_stride + head * tensor.head_stride +
               (unit.segment_first + token) * tensor.token_stride;
    }
    Index number_of(Index token) const {
        return (unit.row * call.heads + head) * call.num_tokens + unit.segment_first + token;
    }

    // Copies vectors, times a factor, to contiguous rows.
    void gather(const FavorTensor& tensor, Index from, Index count, float factor, float* rows) const {
        for (Index i = 0; i < count; ++i, rows += dim) {
            const float* const x = at(tensor, from + i);
            for (Index c = 0; c < dim; ++c) rows[c] = x[c] * factor;
        }
    }

    // Packs the keys, or the values, that the unit reads; either form may be left out.
    void pack_keys(const FavorTensor& tensor, float* columns, float* panels) const {
        const Index count = last_key - first_key;
        gather(tensor, first_key, count, 1.0f, scratch.rows);
        std::memset(scratch.rows + count * dim, 0, sizeof(float) * (padded_keys - count) * dim);
        if (columns) pack_transposed(scratch.rows, padded_keys, dim, columns);
        if (panels) pack(scratch.rows, padded_keys, dim, panels);
    }

    // A block of queries, and the panels of keys that it reads, counted from the first key.
    struct Block {
        Index query, count, panel, num_panels;
        Index columns() const { return num_panels * kPanel; }
    };

    // The block that begins with a query, of keys from `low` on and before `high`.
    Block block_at(Index query, Index count, Index low, Index high) const {
        const Index nearest = query - call.before > low ? query - call.before : low;
        const Index farthest = query + count + call.after < high ? query + count + call.after : high;
        const Index panel = (nearest - first_key) / kPanel;
        return {query, count, panel, (farthest - first_key + kPanel - 1) / kPanel - panel};
    }

    // Calls take(query of the block, place of the vectors in `weights`, left, right) with the scores, to base 2, of each
    // query and panel of keys; kHidden where the query does not see the key.
    template <class Take>
    PROTLM_INLINE void scores(const Block& block, Take&& take) const {
        float steps[kLanes];
        for (int i = 0; i < kLanes; ++i) steps[i] = static_cast<float>(i);
        const Vec lanes = load(steps);
        for (Index p = 0; p < block.num_panels; ++p) {
            const Index key = first_key + (block.panel + p) * kPanel;
            const float* const columns = scratch.key_columns + (block.panel + p) * kPanel * dim;
            const bool is_whole = key + call.before >= block.query + block.count - 1 &&
                                  key + kPanel - 1 <= block.query + call.after && key + kPanel <= unit.segment_count;
            product(block.count, row_major(scratch.queries, dim), columns, [&](Index t, Vec left, Vec right) {
                if (!is_whole) {
                    const Index query = block.query + t;
                    const Index farthest = query + call.after < unit.segment_count ? query + call.after : unit.segment_count - 1;
                    // Distances are below 2^24, so that floats hold them.
                    const Vec low = all(static_cast<float>(query - call.before - key));
                    const Vec high = all(static_cast<float>(farthest - key));
                    left = (lanes < low) | (lanes > high) ? all(kHidden) : left;
                    right = (lanes + kLanes < low) | (lanes + kLanes > high) ? all(kHidden) : right;
                }
                take(t, (p * block.count + t) * kPanel, left, right);
            });
        }
    }

    // exp2 of scores less a number, 0 where hidden; NaN stays.
    PROTLM_INLINE static Vec weight(Vec score, float less) {
        const Vec difference = score - less, result = exp2(difference);
        // exp2 works on bits, and so not on every NaN.
        return score <= all(kHidden) ? Vec{} : difference == difference ? result : difference;
    }

    void forward() const {
        pack_keys(call.k, scratch.key_columns, nullptr);
        pack_keys(call.v, nullptr, scratch.value_panels);
        for (Index query = first; query < last; query += kQueries)
            forward(block_at(query, last - query < kQueries ? last - query : kQueries, first_key, last_key));
    }

    void forward(const Block& block) const {
        gather(call.q, block.query, block.count, scale, scratch.queries);
        Vec largest[kQueries];
        for (Vec& x : largest) x = all(-INFINITY);
        scores(block, [&](Index t, Index place, Vec left, Vec right) {
            largest[t] = larger(largest[t], larger(left, right));
            store(scratch.weights + place, left), store(scratch.weights + place + kLanes, right);
        });
        for (Index t = 0; t < block.count; ++t) {
            const float less = largest_of(largest[t]);
            Vec sums = {};
            for (Index p = 0; p < block.num_panels; ++p) {
                float* const x = scratch.weights + (p * block.count + t) * kPanel;
                const Vec left = weight(load(x), less), right = weight(load(x + kLanes), less);
                sums += left + right;
                store(x, left), store(x + kLanes, right);
            }
            const float sum = sum_of(sums);
            scratch.numbers[t] = 1.0f / sum;
            // Not as one logarithm, which beside a large score would lose the sum.
            call.maxima[number_of(block.query + t)] = less;
            call.factors[number_of(block.query + t)] = scratch.numbers[t];
        }
        for (Index c = 0; c < padded_dim; c += kPanel)
            product(block.count, from_panels(scratch.weights, block.count, block.columns()),
                    scratch.value_panels + c * padded_keys + block.panel * kPanel * kPanel, [&](Index t, Vec left, Vec right) {
                        const float factor = scratch.numbers[t];
                        store_columns(at(call.out, block.query + t) + c, dim - c, left * factor, right * factor);
                    });
    }

    void backward() const {
        pack_keys(call.k, scratch.key_columns, scratch.key_panels);
        pack_keys(call.v, scratch.value_columns, nullptr);
        for (float* sums : {scratch.key_grads, scratch.value_grads})
            std::memset(sums, 0, sizeof(float) * padded_keys * padded_dim);
        const Index begin = (first > call.after ? first - call.after : 0) / kQueries * kQueries;
        const Index end = last + call.before < unit.segment_count ? last + call.before : unit.segment_count;
        for (Index query = begin; query < end; query += kQueries) {
            const bool is_own = query >= first && query < last;
            const Index stop = is_own ? last : end;
            const Index count = stop - query < kQueries ? stop - query : kQueries;
            backward(block_at(query, count, is_own ? first_key : first, is_own ? last_key : last), is_own);
        }
        write_grads(scratch.key_grads, call.k_grad, static_cast<float>(1 / kLog2E));
        write_grads(scratch.value_grads, call.v_grad, 1.0f);
    }

    // Adds the gradients of the keys and values that a block of queries reaches; writes those of the queries if they are
    // the unit's own.
    void backward(const Block& block, bool is_own) const {
        if (block.num_panels <= 0) return;
        gather(call.q, block.query, block.count, scale, scratch.queries);
        gather(call.out_grad, block.query, block.count, 1.0f, scratch.grads);
        pack(scratch.queries, block.count, dim, scratch.query_panels);
        pack(scratch.grads, block.count, dim, scratch.grad_panels);
        for (Index t = 0; t < block.count; ++t)
            scratch.numbers[t] = dot(scratch.grads + t * dim, at(call.out, block.query + t), dim);
        scores(block, [&](Index t, Index place, Vec left, Vec right) {
            const Index number = number_of(block.query + t);
            const float less = call.maxima[number], factor = call.factors[number];
            store(scratch.weights + place, weight(left, less) * factor);
            store(scratch.weights + place + kLanes, weight(right, less) * factor);
        });
        for (Index p = 0; p < block.num_panels; ++p)
            product(block.count, row_major(scratch.grads, dim), scratch.value_columns + (block.panel + p) * kPanel * dim,
                    [&](Index t, Vec left, Vec right) {
                        const Index place = (p * block.count + t) * kPanel;
                        const float less = scratch.numbers[t];
                        const float* const weights = scratch.weights + place;
                        store(scratch.weight_grads + place, load(weights) * (left - less));
                        store(scratch.weight_grads + place + kLanes, load(weights + kLanes) * (right - less));
                    });
        const float factor = static_cast<float>(scale / kLog2E);
        for (Index c = 0; c < padded_dim && is_own; c += kPanel)
            product(block.count, from_panels(scratch.weight_grads, block.count, block.columns()),
                    scratch.key_panels + c * padded_keys + block.panel * kPanel * kPanel, [&](Index t, Vec left, Vec right) {
                        store_columns(at(call.q_grad, block.query + t) + c, dim - c, left * factor, right * factor);
                    });
        for (Index p = 0; p < block.num_panels; ++p) {
            const Index key = (block.panel + p) * kPanel;
            if (first_key + key + kPanel <= first || first_key + key >= last) continue;
            const Index place = p * block.count * kPanel;
            for (Index c = 0; c < padded_dim; c += kPanel) {
                const Index to = c * padded_keys + key * kPanel;
                add_product(kPanel, Operand{scratch.weight_grads + place, 1, kPanel, block.count},
                            scratch.query_panels + c * block.count, scratch.key_grads + to);
                add_product(kPanel, Operand{scratch.weights + place, 1, kPanel, block.count},
                            scratch.grad_panels + c * block.count, scratch.value_grads + to);
            }
        }
    }

    // Writes the gradients of the unit's own keys from panels.
    void write_grads(const float* panels, const FavorTensor& to, float factor) const {
        for (Index c = 0; c < padded_dim; c += kPanel)
            for (Index token = first; token < last; ++token) {
                const float* const x = panels + c * padded_keys + (token - first_key) * kPanel;
                store_columns(at(to, token) + c, dim - c, load(x) * factor, load(x + kLanes) * factor);
            }
    }
};

inline Index local_workspace(const LocalCall& call) { return call.num_threads * LocalScratch::floats(LocalSizes(call)); }

inline void run_local(const LocalCall& call, bool is_backward) {
    const LocalSizes sizes(call);
    for (const FavorTensor* result : {&call.out, &call.q_grad, &call.k_grad, &call.v_grad})
        if (is_backward == (result != &call.out)) ask_for_huge_pages(*result, call.result_bytes);
#pragma omp parallel num_threads(static_cast<int>(call.num_threads))
    {
        const LocalScratch scratch(call.workspace + omp_get_thread_num() * LocalScratch::floats(sizes), sizes);
#pragma omp for schedule(dynamic)
        for (Index i = 0; i < call.num_units * call.heads; ++i) {
            const LocalWork work{call, call.units[i / call.heads], i % call.heads, sizes, scratch};
            is_backward ? work.backward() : work.forward();
        }
    }
}

}  // namespace PROTLM_NAMESPACE
