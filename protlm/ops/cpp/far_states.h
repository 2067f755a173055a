// States of far tokens: for every block of a segment the sum of the states of all blocks that are not near to it.
//
// A block reads what ends two blocks before it and what begins two blocks after it: a running sum from the first block
// on, and sums from the last one back, which are kept for a span of blocks at a time. No state is subtracted from
// another.

#pragma once

#include "bidirectional.h"

namespace PROTLM_NAMESPACE {

// Blocks whose sums of later blocks are kept at once.
constexpr Index kSpan = 8;

// How the context of a state lies in memory.
enum class Layout {
    kByFeature,  // [padded_dim / kPanel][padded_features][kPanel]
    kByColumn,   // [padded_features / kPanel][head_dim][kPanel]
};

inline void clear(const Sizes& sizes, const State& state) {
    std::memset(state.context, 0, sizeof(float) * sizes.state_floats());
    for (Index j = 0; j < sizes.padded_features; ++j) state.references[j] = kLogZero;
}

inline void copy(const Sizes& sizes, const State& to, const State& from) {
    std::memcpy(to.context, from.context, sizeof(float) * sizes.state_floats());
}

// 2^fall, nothing for what lies too far below to count: sums of a state may be large where it is.
PROTLM_INLINE Vec shrinkage(Vec fall) { return fall < kSmallestExponent ? Vec{} : exp2(fall); }

// Multiplies, for kPanel features from j on, two states by their weights and adds them.
template <Layout kLayout>
void add_weighted(const Sizes& sizes, Index j, const State& to, const State& a, const State& b) {
    float of_a[kPanel], of_b[kPanel];
    for (Index i = 0; i < kPanel; i += kLanes) {
        const Vec left = load(a.references + j + i), right = load(b.references + j + i), largest = larger(left, right);
        const Vec a_weight = shrinkage(left - largest), b_weight = shrinkage(right - largest);
        store(of_a + i, a_weight), store(of_b + i, b_weight);
        store(to.sums + j + i, load(a.sums + j + i) * a_weight + load(b.sums + j + i) * b_weight);
        store(to.references + j + i, largest);
    }
    if (kLayout == Layout::kByColumn) {
        for (Index place = j * sizes.head_dim; place < (j + kPanel) * sizes.head_dim; place += kPanel)
            for (Index i = 0; i < kPanel; i += kLanes)
                store(to.context + place + i, load(a.context + place + i) * load(of_a + i) +
                                                  load(b.context + place + i) * load(of_b + i));
        return;
    }
    for (Index c = 0; c < sizes.padded_dim; c += kPanel)
        for (Index i = 0; i < kPanel; ++i) {
            const Index place = c * sizes.padded_features + (j + i) * kPanel;
            for (Index lane = place; lane < place + kPanel; lane += kLanes)
                store(to.context + lane, load(a.context + lane) * of_a[i] + load(b.context + lane) * of_b[i]);
        }
}

inline bool have_same_references(const Sizes& sizes, const State& a, const State& b) {
    for (Index j = 0; j < sizes.padded_features; j += kLanes)
        if (any(load(a.references + j) != load(b.references + j))) return false;
    return true;
}

// Writes a + b to `to`, which may be either of them, relative to the larger references.
template <Layout kLayout>
void add_states(const Sizes& sizes, const State& to, const State& a, const State& b) {
    const Index padded = sizes.padded_features;
    if (!have_same_references(sizes, a, b)) {
        for (Index j = 0; j < padded; j += kPanel) add_weighted<kLayout>(sizes, j, to, a, b);
        return;
    }
    const Index used = kLayout == Layout::kByColumn ? padded * sizes.head_dim : padded * sizes.padded_dim;
    for (Index place = 0; place < used; place += kLanes)
        store(to.context + place, load(a.context + place) + load(b.context + place));
    for (Index j = 0; j < padded; j += kLanes) {
        store(to.sums + j, load(a.sums + j) + load(b.sums + j));
        store(to.references + j, load(a.references + j));
    }
}

// The states that the blocks of a unit read. Blocks are numbered from the one before the unit, which is 0.
template <Layout kLayout>
struct FarStates {
    // What of other blocks there is and is read.
    struct Reach {
        Index low, high;             // the blocks from low to before high exist: own ones, and one on either side
        const float *before, *after; // the states of what lies beyond these, or null
        bool reads_before, reads_after;
    };

    const Sizes& sizes;
    float* const memory;
    const Index num_blocks;  // of the unit
    const Reach reach;

    FarStates(const Sizes& of_call, float* thread_memory, Index blocks, const Reach& of_unit)
        : sizes(of_call), memory(thread_memory), num_blocks(blocks), reach(of_unit) {}

    static Index floats(const Sizes& sizes, Index blocks) {
        return (blocks + 2 + blocks / kSpan + 1 + kSpan + 2) * sizes.state_floats();
    }

    State block(Index i) const { return at(i); }

    // Begins; then every block is written, from the last one that exists to the first, and `written` called for it.
    void begin() {
        has_running = reach.reads_before && reach.before;
        if (has_running) copy(sizes, running(), State(const_cast<float*>(reach.before), sizes));
        has_sum = reach.reads_after && reach.after;
        if (has_sum) sum = State(const_cast<float*>(reach.after), sizes);
        next_span = reach.reads_after ? (num_blocks - 1) / kSpan : -1;
        keep_sums(reach.high);
    }

    void written(Index i) {
        if (next_span < 0) return;
        if (has_sum) add_states<kLayout>(sizes, combined(), sum, block(i));
        sum = has_sum ? combined() : block(i);
        has_sum = true;
        keep_sums(i);
    }

    // The state that own block i reads, which holds until the next call; null if no token is far. To be called for
    // i = 1, 2, ... in this order.
    const State* of(Index i) {
        if (reach.reads_after && (i - 1) % kSpan == 0) sum_span((i - 1) / kSpan);
        const bool adds = reach.reads_before && i - 2 >= reach.low, had_running = has_running;
        const bool has_later = reach.reads_after && (i + 2 < reach.high || reach.after);
        has_running |= adds;
        if (!has_running && !has_later) return nullptr;
        found = has_running ? running() : suffix((i - 1) % kSpan);
        if (adds && !had_running) copy(sizes, running(), block(i - 2));
        if (adds && had_running && has_later) {
            advance(block(i - 2), suffix((i - 1) % kSpan));
            found = combined();
        } else {
            if (adds && had_running) add_states<kLayout>(sizes, running(), running(), block(i - 2));
            if (has_running && has_later) {
                add_states<kLayout>(sizes, combined(), running(), suffix((i - 1) % kSpan));
                found = combined();
            }
        }
        return &found;
    }

private:
    bool has_running = false, has_sum = false;
    Index next_span = -1;      // whose sum of later blocks is still to be kept
    State found{memory, sizes}, sum{memory, sizes};

    State at(Index place) const { return {memory + place * sizes.state_floats(), sizes}; }
    // What is after the last block that blocks of a span read by its own sum.
    State later(Index span) const { return at(num_blocks + 2 + span); }
    State suffix(Index i) const { return at(num_blocks + 2 + num_blocks / kSpan + 1 + i); }
    State running() const { return suffix(kSpan); }
    State combined() const { return suffix(kSpan + 1); }
    // The last own block of a span.
    Index end_of(Index span) const { return (span + 1) * kSpan < num_blocks ? (span + 1) * kSpan : num_blocks; }

    // Keeps the sum, of all blocks from i on, for the spans that need it.
    void keep_sums(Index i) {
        for (; next_span >= 0 && end_of(next_span) + 3 >= i; --next_span)
            if (has_sum) copy(sizes, later(next_span), sum);
    }

    // Adds a block to the running sum, and writes that and the later blocks together.
    void advance(const State& more, const State& rest) const {
        const State run = running(), all_of_them = combined();
        if (!have_same_references(sizes, run, more) || !have_same_references(sizes, run, rest)) {
            add_states<kLayout>(sizes, run, run, more);
            return add_states<kLayout>(sizes, all_of_them, run, rest);
        }
        // Contexts are followed by sums.
        for (Index place = 0; place < sizes.padded_features * (sizes.padded_dim + 1); place += kLanes) {
            const Vec before = load(run.context + place) + load(more.context + place);
            store(run.context + place, before);
            store(all_of_them.context + place, before + load(rest.context + place));
        }
        std::memcpy(all_of_them.references, run.references, sizeof(float) * sizes.padded_features);
    }

    // Writes for each own block of a span the sum of what begins two blocks after it.
    void sum_span(Index span) const {
        const Index first = span * kSpan + 1, last = end_of(span);
        State next = later(span);
        bool is_empty = last + 3 >= reach.high && !reach.after;
        for (Index i = last; i >= first; --i) {
            const State to = suffix(i - first);
            if (!is_empty && i + 2 < reach.high)
                add_states<kLayout>(sizes, to, block(i + 2), next);
            else if (!is_empty || i + 2 < reach.high)
                copy(sizes, to, is_empty ? block(i + 2) : next);
            is_empty = is_empty && i + 2 >= reach.high;
            next = to;
        }
    }
};

}  // namespace PROTLM_NAMESPACE
