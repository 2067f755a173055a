// Exact attention to near tokens and FAVOR to far ones under one normaliser.
//
// A segment lies in blocks. A query takes the keys of its own block and of the neighbouring ones by exact weights, and
// all others by a state of features (far_states.h). Exponents are absolute: the logarithms, to base 2, of the weights
// themselves. A query is relative to its largest exact weight, which is never small beside the sum, or to its largest
// feature where that is far above. The backward has the same form twice: the queries of far blocks have a state too, of
// features divided by normalisers, and the keys read it.
//
// Keys and values are packed block by block; three blocks at a time are held. A unit computes its own results only, so
// that no two threads write to the same place.

#pragma once

#include <omp.h>

#include "near_far_backward.h"
#include "near_far_forward.h"

namespace PROTLM_NAMESPACE {

// Sums, for every unit of a segment, what lies before the block before it, and after the block after it.
template <Layout kLayout>
void sum_outer(const NearFarWorkspace& workspace, const FavorGroup& group, Index head, bool of_queries, float* spare) {
    const Sizes& sizes = workspace.sizes.favor;
    const State sum(spare, sizes);
    for (const bool is_after : {false, true}) {
        clear(sizes, sum);
        for (Index i = 0; i < group.num_slots; ++i) {
            const UnitStates own = workspace.unit_states(group.first_slot + (is_after ? group.num_slots - 1 - i : i), head, of_queries);
            // The sum lacks the nearer block of the unit before this one, in the order of the loop.
            if (i > 0) {
                const UnitStates last = workspace.unit_states(
                    group.first_slot + (is_after ? group.num_slots - i : i - 1), head, of_queries);
                const State outer = own.at(is_after ? UnitStates::kAfter : UnitStates::kBefore);
                add_states<kLayout>(sizes, sum, sum, last.at(is_after ? UnitStates::kLast : UnitStates::kFirst));
                add_states<kLayout>(sizes, sum, sum, last.at(UnitStates::kMiddle));
                copy(sizes, outer, sum);
                add_states<kLayout>(sizes, sum, sum, last.at(is_after ? UnitStates::kFirst : UnitStates::kLast));
            }
        }
    }
}

inline Index near_far_workspace(const NearFarCall& call) { return NearFarWorkspace::floats(call); }

// The work of one thread on the heads from first to before last. Every loop is divided among the threads of the parallel
// region around it, and ends when all of them have finished.
inline void run_heads(const NearFarWorkspace& workspace, const NearFarScratch& scratch, Index first, Index last) {
    const NearFarCall& call = workspace.call;
    const bool is_backward = workspace.sizes.is_backward;
    const Index heads = last - first;
    const auto work_at = [&](Index i) {
        return NearFarBlocks{call, call.units[i / heads], first + i % heads, workspace, scratch};
    };
#pragma omp for schedule(dynamic)
    for (Index i = 0; i < call.num_units * heads; ++i) {
        const NearFarBlocks work = work_at(i);
        if (work.unit.slot < 0) continue;
        is_backward ? work.fold_unit<Layout::kByColumn>(false) : work.fold_unit<Layout::kByFeature>(false);
        if (is_backward) work.fold_unit<Layout::kByFeature>(true);
    }
#pragma omp for schedule(dynamic)
    for (Index i = 0; i < call.favor.num_groups * heads; ++i) {
        const FavorGroup& group = call.favor.groups[i / heads];
        const Index head = first + i % heads;
        is_backward ? sum_outer<Layout::kByColumn>(workspace, group, head, false, scratch.spare[0])
                    : sum_outer<Layout::kByFeature>(workspace, group, head, false, scratch.spare[0]);
        if (is_backward) sum_outer<Layout::kByFeature>(workspace, group, head, true, scratch.spare[0]);
    }
#pragma omp for schedule(dynamic)
    for (Index i = 0; i < call.num_units * heads; ++i)
        is_backward ? NearFarBackward{work_at(i)}.run() : NearFarForward{work_at(i)}.run();
}

inline void run_near_far(const NearFarCall& call) {
    const NearFarWorkspace workspace(call);
    const bool is_backward = workspace.sizes.is_backward;
    const Index heads = call.favor.heads;
    for (const FavorTensor* result : {&call.favor.out, &call.favor.q_grad, &call.favor.k_grad, &call.favor.v_grad})
        if (is_backward == (result != &call.favor.out)) ask_for_huge_pages(*result, call.favor.result_bytes);
#pragma omp parallel num_threads(static_cast<int>(call.favor.num_threads))
    {
        const NearFarScratch scratch(workspace.thread(omp_get_thread_num()), workspace.sizes);
#pragma omp for schedule(static)
        for (Index i = 0; i < workspace.sizes.favor.projections; ++i)
            pack_projection(call.favor, workspace.sizes.favor, i, is_backward, workspace.projection(i));
        for (Index head = 0; head < heads; head += workspace.round)
            run_heads(workspace, scratch, head, head + workspace.round < heads ? head + workspace.round : heads);
    }
}

}  // namespace PROTLM_NAMESPACE
