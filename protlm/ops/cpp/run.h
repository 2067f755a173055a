// The passes of a call over its units, in parallel. Units, their partial results and the order in which these are
// combined depend on the call alone: any number of threads gives the same bits.

#pragma once

#include <initializer_list>

#include <omp.h>
#include "bidirectional.h"
#include "causal.h"

namespace PROTLM_NAMESPACE {

// The work of one thread in a call. Every loop below is divided among the threads of the parallel region around it, and
// ends when all of them have finished.
template <bool kExponential>
struct Team {
    const FavorCall& call;
    const Workspace& workspace;
    const Sizes& sizes = workspace.sizes;
    const Scratch scratch{workspace.thread(omp_get_thread_num()), sizes};
    const CausalScratch causal_scratch{workspace.causal_thread(omp_get_thread_num()), sizes, call.longest_unit};
    const State state{scratch.state, sizes}, gradient{scratch.gradient, sizes};

    Work<kExponential> work(const FavorUnit& unit, Index head) const {
        return {sizes, {call, unit, head}, workspace.projection(head), scratch};
    }

    CausalWork<kExponential> causal_work(const FavorUnit& unit, Index head) const {
        return {work(unit, head), causal_scratch};
    }

    void pack_projections(bool is_backward) const {
#pragma omp for schedule(static)
        for (Index head = 0; head < sizes.projections; ++head)
            pack_projection(call, sizes, head, is_backward, workspace.projection(head));
    }

    // Calls visit(unit, head) for the units of segments that are one unit, of longer segments, or of both.
    template <class Visit>
    void for_each_unit(bool whole, bool partial, Visit&& visit) const {
#pragma omp for schedule(dynamic)
        for (Index i = 0; i < call.num_units * sizes.heads; ++i) {
            const FavorUnit& unit = call.units[i / sizes.heads];
            if (unit.slot < 0 ? whole : partial) visit(unit, i % sizes.heads);
        }
    }

    template <class Visit>
    void for_each_group(Visit&& visit) const {
#pragma omp for schedule(dynamic)
        for (Index i = 0; i < call.num_groups * sizes.heads; ++i) visit(call.groups[i / sizes.heads], i % sizes.heads);
    }

    // Folds the keys of every segment into its state. visit(task) continues with a segment that is one unit while its
    // state is still in `state`; the states of longer segments are in their first slots.
    template <class Visit>
    void fold(Visit&& visit) const {
        for_each_unit(true, true, [&](const FavorUnit& unit, Index head) {
            const Work<kExponential> task = work(unit, head);
            const State to = unit.slot < 0 ? state : workspace.slot(unit.slot, head);
            task.fold(to);
            task.finish(to);
            if (unit.slot >= 0) return;
            store_state(call, sizes, state, unit.segment, head);
            visit(task);
        });
        for_each_group([&](const FavorGroup& group, Index head) {
            const State merged = workspace.slot(group.first_slot, head);
            for (Index i = 1; i < group.num_slots; ++i)
                merge<kExponential>(sizes, merged, workspace.slot(group.first_slot + i, head));
            store_state(call, sizes, merged, group.segment, head);
        });
    }

    void forward() const {
        fold([&](const Work<kExponential>& task) { task.read(state); });
        for_each_unit(false, true, [&](const FavorUnit& unit, Index head) {
            work(unit, head).read(workspace.slot(unit.first_slot, head));
        });
    }

    void read() const {
        for_each_unit(true, true, [&](const FavorUnit& unit, Index head) {
            const Work<kExponential> task = work(unit, head);
            task.load_state(state);
            task.read(state);
        });
    }

    // Writes the gradients of the queries. visit(task) continues as in `fold`, with the gradient of the state in
    // `gradient`; the gradients of longer segments are in their first slots.
    template <class Visit>
    void query_gradients(Visit&& visit) const {
        for_each_unit(true, true, [&](const FavorUnit& unit, Index head) {
            const Work<kExponential> task = work(unit, head);
            task.load_state(state);
            task.query_gradients(state, unit.slot < 0 ? gradient : workspace.slot(unit.slot, head));
            if (unit.slot < 0) visit(task);
        });
        for_each_group([&](const FavorGroup& group, Index head) { add_gradients(workspace, group, head); });
    }

    void backward() const {
        query_gradients([&](const Work<kExponential>& task) { task.key_gradients(state, gradient); });
        for_each_unit(false, true, [&](const FavorUnit& unit, Index head) {
            const Work<kExponential> task = work(unit, head);
            task.load_state(state);
            task.key_gradients(state, workspace.slot(unit.first_slot, head));
        });
    }

    void query_gradients() const {
        query_gradients([&](const Work<kExponential>& task) {
            store_sums(call.state_grads, sizes, gradient, task.tokens.unit.segment, task.tokens.head);
        });
        for_each_group([&](const FavorGroup& group, Index head) {
            store_sums(call.state_grads, sizes, workspace.slot(group.first_slot, head), group.segment, head);
        });
    }

    void key_gradients() const {
        for_each_unit(true, true, [&](const FavorUnit& unit, Index head) {
            const Work<kExponential> task = work(unit, head);
            task.load_state(state);
            task.load_sums(call.state_grads, gradient);
            task.key_gradients(state, gradient);
        });
    }

    // Folds the keys of long segments, unit by unit, so that each unit can begin with the state of the units before it.
    void prepare_causal(bool stores) const {
        for_each_unit(false, true, [&](const FavorUnit& unit, Index head) {
            const Work<kExponential> task = work(unit, head);
            task.fold(workspace.slot(unit.slot, head));
            task.finish(workspace.slot(unit.slot, head));
        });
        for_each_group([&](const FavorGroup& group, Index head) {
            keys_before<kExponential>(workspace, group, head, state, scratch.gradient);
            if (stores) store_state(call, sizes, state, group.segment, head);
        });
    }

    void causal_forward() const {
        prepare_causal(true);
        for_each_unit(true, true, [&](const FavorUnit& unit, Index head) {
            const CausalWork<kExponential> task = causal_work(unit, head);
            task.begin(state, unit.slot < 0 ? nullptr : workspace.slot(unit.slot, head).context);
            task.scan(state);
            if (unit.slot < 0) store_state(call, sizes, state, unit.segment, head);
        });
    }

    void causal_backward() const {
        prepare_causal(false);
        for_each_unit(false, true, [&](const FavorUnit& unit, Index head) {
            if (unit.slot == unit.first_slot) return;
            const State before = workspace.slot(unit.slot, head);
            causal_work(unit, head).own_gradient(workspace.gradient_slot(unit.slot, head), before.references);
        });
        for_each_group([&](const FavorGroup& group, Index head) {
            queries_after(workspace, group, head, causal_work(call.units[0], head), gradient, scratch.state);
        });
        for_each_unit(true, true, [&](const FavorUnit& unit, Index head) {
            const CausalWork<kExponential> task = causal_work(unit, head);
            task.begin_transposed(state, unit.slot < 0 ? nullptr : workspace.slot(unit.slot, head).context);
            const Index steps = task.query_scan(state);
            const std::size_t bytes = sizeof(float) * sizes.state_floats();
            if (unit.slot < 0) {
                std::memset(gradient.context, 0, bytes);
                std::memcpy(gradient.references, state.references, sizeof(float) * sizes.padded_features);
            } else {
                std::memcpy(gradient.context, workspace.gradient_slot(unit.slot, head).context, bytes);
            }
            task.key_scan(steps, gradient);
        });
    }
};

// The task of a call: all of forward or backward, or a half of the bidirectional ones. Between two halves states are
// complete, so that the caller can combine those of several processes.
enum class Task { kForward, kBackward, kFold, kRead, kQueryGradients, kKeyGradients };

template <bool kExponential>
void run_task(const Team<kExponential>& team, bool is_causal, Task task) {
    switch (task) {
        case Task::kForward: return is_causal ? team.causal_forward() : team.forward();
        case Task::kBackward: return is_causal ? team.causal_backward() : team.backward();
        case Task::kFold: return team.fold([](const Work<kExponential>&) {});
        case Task::kRead: return team.read();
        case Task::kQueryGradients: return team.query_gradients();
        case Task::kKeyGradients: return team.key_gradients();
    }
}

template <bool kExponential>
void run_team(const FavorCall& call, Task task) {
    const Workspace workspace(call);
    const bool is_backward = task == Task::kBackward || task == Task::kQueryGradients || task == Task::kKeyGradients;
    if (is_backward)
        for (const FavorTensor* grad : {&call.q_grad, &call.k_grad, &call.v_grad}) ask_for_huge_pages(*grad, call.result_bytes);
    else
        ask_for_huge_pages(call.out, call.result_bytes);
#pragma omp parallel num_threads(static_cast<int>(call.num_threads))
    {
        const Team<kExponential> team{call, workspace};
        team.pack_projections(is_backward);
        run_task(team, call.is_causal, task);
    }
}

inline void run(const FavorCall& call, Task task) {
    call.is_exponential ? run_team<true>(call, task) : run_team<false>(call, task);
}

}  // namespace PROTLM_NAMESPACE
