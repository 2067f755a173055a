// The sizes of a call of near-far attention, and the layout of its workspace.

#pragma once

#include <initializer_list>

#include "far_states.h"
#include "local.h"

namespace PROTLM_NAMESPACE {

struct NearFarSizes {
    const Sizes favor;
    const Index width, unit_blocks;  // of the widest block; of the longest unit
    const bool is_backward;

    explicit NearFarSizes(const NearFarCall& call)
        : favor(call.favor), width(round_up(call.widest_block, kPanel)), unit_blocks(call.longest_unit),
          is_backward(call.favor.out_grad.data) {}

    // Of the weights of a tile of queries and one block of keys.
    Index weight_floats() const { return width * kQueries; }
};

// A block of keys: what queries read of it, and the gradients that they give it.
struct KeyBlock {
    float *columns, *panels;            // of k: [width / kPanel][padded_dim][kPanel], [padded_dim / kPanel][width][kPanel]
    float *value_columns, *value_panels;
    float *grads, *value_grads;         // as panels
    float *norms;                       // ‖k‖² in the exponent

    KeyBlock(float* memory, const NearFarSizes& sizes) {
        for (float** x : {&columns, &panels, &value_columns, &value_panels, &grads, &value_grads})
            *x = memory, memory += sizes.width * sizes.favor.padded_dim;
        norms = memory;
    }

    static Index floats(const NearFarSizes& sizes) { return sizes.width * (6 * sizes.favor.padded_dim + 1); }
};

// The memory of one thread.
struct NearFarScratch {
    float *rows;                              // [width][padded_dim]
    float *queries, *grads, *more_rows;       // [kQueries][padded_dim]
    float *query_panels, *grad_panels;        // [padded_dim / kPanel][kQueries][kPanel]
    float *features;                          // [padded_features / kPanel][kQueries][kPanel]
    float *one_row;                           // features of one query
    float *lanes[2];                          // [padded_features][kPanel]: features of a panel of keys, and gradients
    float *weights, *weight_grads;            // [3][width / kPanel][kQueries][kPanel]
    float *offsets, *norms, *inner, *factors; // a number for each query
    float *constants, *query_references;      // a number for each feature
    float *blocks, *spare[2];
    float* far[2];                            // the states of the keys, and in a backward those of the queries
    float* are_finite;                        // whether the values of the blocks of keys are

    NearFarScratch(float* memory, const NearFarSizes& sizes) {
        const auto take = [&memory](Index count) {
            float* const taken = memory;
            memory += round_up(count, 16);
            return taken;
        };
        const Index dim = sizes.favor.padded_dim, features_count = sizes.favor.padded_features;
        rows = take(sizes.width * dim);
        for (float** x : {&queries, &grads, &more_rows, &query_panels, &grad_panels}) *x = take(kQueries * dim);
        features = take(kQueries * features_count);
        one_row = take(features_count * kPanel);
        for (float*& x : lanes) x = take(features_count * kPanel);
        for (float** x : {&weights, &weight_grads}) *x = take(3 * sizes.weight_floats());
        for (float** x : {&offsets, &norms, &inner, &factors}) *x = take(kQueries);
        for (float** x : {&constants, &query_references}) *x = take(features_count);
        blocks = take(3 * KeyBlock::floats(sizes));
        are_finite = take(3);
        for (float*& x : spare) x = take(sizes.favor.state_floats());
        for (int i = 0; i < 1 + sizes.is_backward; ++i)
            far[i] = take(FarStates<Layout::kByFeature>::floats(sizes.favor, sizes.unit_blocks));
        end = memory;
    }

    static Index floats(const NearFarSizes& sizes) {
        return NearFarScratch(nullptr, sizes).end - static_cast<float*>(nullptr);
    }

private:
    float* end;
};

// The states of a unit of a longer segment: of its first block, of its last one, of all between them; and of what lies
// before the block before it, and after the block after it.
struct UnitStates {
    enum Part { kFirst, kMiddle, kLast, kBefore, kAfter, kNumParts };
    float* memory;
    const Sizes& sizes;

    State at(Part part) const { return {memory + part * sizes.state_floats(), sizes}; }
};

// Of the states of all units that are held at once: more heads are computed in several rounds.
constexpr Index kUnitStateFloats = Index{2} << 20;

struct NearFarWorkspace {
    const NearFarCall& call;
    const NearFarSizes sizes;
    const Index round;  // heads that are computed at once
    float *projections, *slots, *threads;

    explicit NearFarWorkspace(const NearFarCall& of_call)
        : call(of_call), sizes(of_call), round(heads_of_round()), projections(of_call.favor.workspace) {
        slots = projections + round_up(sizes.favor.projections * sizes.favor.projection_floats(), 16);
        threads = slots + round_up(round * head_floats(), 16);
    }

    Index unit_floats() const { return UnitStates::kNumParts * sizes.favor.state_floats(); }
    // Of the units of one head, of keys and in a backward of queries.
    Index head_floats() const { return (1 + sizes.is_backward) * call.favor.num_slots * unit_floats(); }
    Index heads_of_round() const {
        const Index heads = sizes.favor.heads, most = head_floats() ? kUnitStateFloats / head_floats() : heads;
        return most < 1 ? 1 : most < heads ? most : heads;
    }
    Projection projection(Index head) const {
        return {projections + (sizes.favor.projections > 1 ? head : 0) * sizes.favor.projection_floats(), sizes.favor};
    }
    // Of the keys, or of the queries.
    UnitStates unit_states(Index slot, Index head, bool of_queries) const {
        const Index place = (of_queries * call.favor.num_slots + slot) * round + head % round;
        return {slots + place * unit_floats(), sizes.favor};
    }
    float* thread(Index index) const { return threads + index * NearFarScratch::floats(sizes); }

    static Index floats(const NearFarCall& call) {
        const NearFarWorkspace laid_out(call);
        return laid_out.thread(call.favor.num_threads) - call.favor.workspace;
    }
};

}  // namespace PROTLM_NAMESPACE
