// The arguments of one call of an op, as favor_cpp.py, near_far_cpp.py, local_cpp.py and heads_cpp.py pass them: plain structures of pointers, strides and counts.
//
// Strides count elements, all other sizes floats or what they are of. The caller owns all memory; results of tokens that
// no unit names are not written.

#pragma once

#include <cstdint>

extern "C" {

// A tensor (batch, heads, tokens, head_dim) whose last axis is contiguous; of bfloat16 for the kernels of that.
struct FavorTensor {
    float* data;
    std::int64_t batch_stride, head_stride, token_stride;
};

// Consecutive tokens of one segment, which one thread processes at a time.
struct FavorUnit {
    std::int64_t segment, row;  // row of the batch
    std::int64_t first, count;  // in `positions`, or tokens of the row where that is null
    std::int64_t slot;          // where its partial state is stored; -1 if the segment is this one unit
    std::int64_t first_slot;    // that of the first unit of the segment
};

// Units of one segment that is longer than one unit: slots first_slot ... first_slot + num_slots - 1, in their order.
struct FavorGroup {
    std::int64_t segment, first_slot, num_slots;
};

struct FavorCall {
    std::int64_t heads, head_dim, num_tokens;
    std::int64_t num_rows;        // of the projection
    std::int64_t mirror;          // 1: every row also with its sign changed, behind all others
    std::int64_t is_exponential;  // 0: ReLU
    std::int64_t is_causal;
    std::int64_t projection_head_stride;  // 0: shared by the heads
    double scale;                         // of the rows of the projection

    const float* projection;
    const double* oprf_a;  // (segments, heads), or null
    const float* feature_bias;            // (rows) or (heads, rows), or null
    std::int64_t feature_bias_head_stride;  // 0: shared by the heads
    const std::int32_t* positions;
    const FavorUnit* units;
    const FavorGroup* groups;
    std::int64_t num_units, num_groups, num_slots, longest_unit;

    FavorTensor q, k, v, out;
    float* query_sums;  // (batch, heads, tokens)
    float* states;      // (segments, heads, features, head_dim + 1)
    float* state_grads; // as states; only of the halves of the backward
    float* references;  // (segments, heads, features), or (segments, heads) for ReLU

    std::int64_t result_bytes;  // of `out` and of each gradient that is written; each is contiguous
    FavorTensor out_grad, q_grad, k_grad, v_grad;

    float* workspace;
    std::int64_t num_threads;
    std::int64_t is_backward;  // 1: the workspace is that of a whole backward, for kernels where it differs
};

// Consecutive tokens of one segment, which one thread processes at a time.
struct LocalUnit {
    std::int64_t row;                           // of the batch
    std::int64_t segment_first, segment_count;  // tokens of the row
    std::int64_t first, count;                  // tokens of the segment; `first` is a multiple of kQueries
};

struct LocalCall {
    std::int64_t heads, head_dim, num_tokens;
    std::int64_t before, after;  // how far a token sees
    const LocalUnit* units;
    std::int64_t num_units, longest_unit;
    FavorTensor q, k, v, out;
    // (batch, heads, tokens): the score that weights are relative to, to base 2, which is the largest or not far below it;
    // one by the sum of weights.
    float *maxima, *factors;
    std::int64_t result_bytes;  // of `out` and of each gradient that is written
    FavorTensor out_grad, q_grad, k_grad, v_grad;
    float* workspace;
    std::int64_t num_threads, is_backward;
};

// Consecutive blocks of one segment, which one thread processes at a time.
struct NearFarUnit {
    std::int64_t segment, row;             // row of the batch
    std::int64_t first_bound, num_blocks;  // of the segment, in `bounds`
    std::int64_t first, count;             // blocks of the segment
    std::int64_t slot;                     // where its states are stored; -1 if the segment is this one unit
};

// A call of the op with a near field. Of `favor` the units, the states and the references are not read; the groups are
// those of the units below, and the query sums absolute natural logarithms.
struct NearFarCall {
    FavorCall favor;
    // As the query sums: to base 2 the number that weights are relative to, one by their sum, and the gradient of the query
    // sums, or null.
    float *offsets, *factors;
    const float* sums_grad;
    const std::int64_t* bounds;  // of the blocks of every segment, one more than it has blocks: as `first` of FavorUnit
    const NearFarUnit* units;
    std::int64_t num_units, longest_unit, widest_block;
};

// Vectors (tokens, heads, head_dim) of queries or keys before attention, in float32 or bfloat16; strides count elements.
struct HeadsCall {
    std::int64_t tokens, heads, head_dim;
    std::int64_t is_half;  // 1: all vectors are of bfloat16
    void *x, *out;
    std::int64_t x_stride, out_stride;  // of tokens, whose heads are contiguous
    const float* lengths;               // (heads): what each vector is rescaled to, or null
    const float *cosines, *sines;       // (tokens, head_dim) with equal halves, or null
    std::int64_t angles_stride;
    float* norms;  // (tokens, heads), before rescaling; null where no gradient is wanted

    std::int64_t width, first_offset;  // of the convolution; a width of 0 for none
    const float* weight;               // (width, heads · head_dim)
    std::int64_t weight_stride;
    const std::int64_t *positions, *segment_lengths;  // of every token: its place in its segment, and how long that is

    void *grad, *x_grad;  // of `out`; like x
    std::int64_t grad_stride;
    float* length_grads;  // (blocks of tokens, heads), partial sums
    std::int64_t num_threads;
};

}  // extern "C"
