// k-mers of residues and sets of them, the compiled twin of the NumPy code in kmers.py.
//
// A plain C interface that kmers.py loads with ctypes. Tokens are read as they lie in a mapped file; a word is eight of
// them from any place on as one number, and those after the end are zero.

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

using Byte = std::uint8_t;
using Word = std::uint64_t;

constexpr std::int64_t kWord = 8;
constexpr int kTailBits = 24;  // of a word below a hash, as kmers.py has it
constexpr int kAhead = 32;     // k-mers whose bits are on their way while earlier ones are looked up

struct Tokens {
    const Byte* bytes;
    std::int64_t size;

    Word word(std::int64_t place) const {
        Word word = 0;
        if (place + kWord <= size) {
            std::memcpy(&word, bytes + place, kWord);
        } else if (place < size) {
            std::memcpy(&word, bytes + place, static_cast<std::size_t>(size - place));
        }
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        word = __builtin_bswap64(word);
#endif
        return word;
    }
};

}  // namespace

extern "C" {

// A set of hashes, by their high bits. The factor moves residues beyond the k-mer out at the top.
struct KmerSet {
    Byte* bits;
    std::int64_t shift;
    Word factor;
    std::int64_t stride;
};

}  // extern "C"

namespace {

inline Word hash_of(const KmerSet& set, Word word) { return (word * set.factor) >> kTailBits; }

inline bool has(const KmerSet& set, Word hash) {
    const Word slot = hash >> set.shift;
    return set.bits[slot >> 3] >> (slot & 7) & 1;
}

inline void fetch(const KmerSet& set, Word hash) { __builtin_prefetch(set.bits + (hash >> set.shift >> 3)); }

// Calls use(place, hash) for the k-mers at first, first + stride, … before `end`, whose bits are in the cache by then.
template <class Use>
void for_each(const KmerSet& set, const Tokens& tokens, std::int64_t first, std::int64_t end, Use use) {
    Word hashes[kAhead];
    while (first < end) {
        int count = 0;
        for (std::int64_t place = first; count < kAhead && place < end; place += set.stride, ++count) {
            hashes[count] = hash_of(set, tokens.word(place));
            fetch(set, hashes[count]);
        }
        for (int number = 0; number < count; ++number, first += set.stride) {
            use(first, hashes[number]);
        }
    }
}

}  // namespace

extern "C" {

// Adds the k-mers at multiples of the stride.
void protlm_add_kmers(const KmerSet* set, const Byte* bytes, std::int64_t num_tokens) {
    for_each(*set, {bytes, num_tokens}, 0, num_tokens, [set](std::int64_t, Word hash) {
        const Word slot = hash >> set->shift;
        set->bits[slot >> 3] |= static_cast<Byte>(1u << (slot & 7));
    });
}

// Finds the k-mers at first, first + stride, … before `end` that are in the set. There is room for all of them.
// Returns how many they are.
std::int64_t protlm_find_kmers(const KmerSet* set, const Byte* bytes, std::int64_t num_tokens, std::int64_t first,
                               std::int64_t end, std::int64_t* places, Word* hashes) {
    std::int64_t found = 0;
    for_each(*set, {bytes, num_tokens}, first, end, [&](std::int64_t place, Word hash) {
        places[found] = place;
        hashes[found] = hash;
        found += has(*set, hash);
    });
    return found;
}

// Marks the sequences that have a k-mer of the set at one of the first `stride` places of each of `num_probes`
// stretches of `span` residues, which lie evenly between their first and their last residue. Each has a whole stretch.
void protlm_mark_known(const KmerSet* set, const Byte* bytes, std::int64_t num_tokens, const std::int64_t* starts,
                       const std::int64_t* lengths, std::int64_t num_sequences, std::int64_t span,
                       std::int64_t num_probes, Byte* marks) {
    const Tokens tokens{bytes, num_tokens};
    for (std::int64_t sequence = 0; sequence < num_sequences; ++sequence) {
        bool is_known = true;
        for (std::int64_t probe = 0; is_known && probe < num_probes; ++probe) {
            const std::int64_t first = starts[sequence] + (lengths[sequence] - span) * probe / (num_probes - 1);
            is_known = false;
            for (std::int64_t place = first; !is_known && place < first + set->stride; ++place) {
                is_known = has(*set, hash_of(*set, tokens.word(place)));
            }
        }
        marks[sequence] = is_known;
    }
}

}  // extern "C"
