// What the lines below a FASTA header are, if no sequence: the compiled twin of judging.py, which says why.

#ifndef PROTLM_JUDGING_H
#define PROTLM_JUDGING_H

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace judging {

using Byte = std::uint8_t;

inline const Byte* find(const Byte* place, const Byte* end, int byte) {
    const void* match = place < end ? std::memchr(place, byte, static_cast<std::size_t>(end - place)) : nullptr;
    return match ? static_cast<const Byte*>(match) : end;
}

inline bool is_blank(Byte byte) { return byte == ' ' || byte == '\t' || byte == '\v' || byte == '\f'; }
inline bool is_upper(Byte byte) { return byte >= 'A' && byte <= 'Z'; }
inline bool is_lower(Byte byte) { return byte >= 'a' && byte <= 'z'; }
inline bool is_letter(Byte byte) { return is_upper(byte) || is_lower(byte); }
inline bool is_digit(Byte byte) { return byte >= '0' && byte <= '9'; }

struct Span {
    const Byte *start, *end;

    std::size_t size() const { return static_cast<std::size_t>(end - start); }

    Span stripped() const {
        Span span = *this;
        while (span.start < span.end && is_blank(*span.start)) ++span.start;
        while (span.end > span.start && is_blank(span.end[-1])) --span.end;
        return span;
    }

    // Whether it is one of some words in upper case, each between blanks in a list, whatever its own case.
    bool is_one_of(const char* list) const {
        for (const char* word = list; *word != 0;) {
            const char* word_end = std::strchr(word, ' ');
            if (static_cast<std::size_t>(word_end - word) == size()) {
                std::size_t i = 0;
                while (i < size() && is_letter(start[i]) && (start[i] & ~0x20) == word[i]) ++i;
                if (i == size()) return true;
            }
            word = word_end + 1;
        }
        return false;
    }
};

// Words that programs write in place of a sequence, as judging.PLACEHOLDERS.
constexpr char kPlaceholders[] =
    "NA NAN NONE NULL ERROR EMPTY UNKNOWN MISSING INVALID DELETED OBSOLETE WITHDRAWN UNDEFINED UNAVAILABLE NOTFOUND "
    "NOSEQUENCE NODATA TODO TBD PENDING FAILED NOTAVAILABLE NOTAPPLICABLE SEQUENCEUNAVAILABLE ";
constexpr std::size_t kLongestPlaceholder = 19;
constexpr std::int64_t kMostPlaceholderGaps = 2;
constexpr char kTellingWords[] =
    "ACCESS AVAILABLE DENIED DOWNLOAD ERROR EXCEPTION FAILED FORBIDDEN FOUND GATEWAY INTERNAL INVALID PLEASE REQUEST "
    "RETRY SEQUENCE SERVER SERVICE TIMEOUT UNAVAILABLE UNKNOWN ";
constexpr char kResidueNames[] =
    "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL ASX GLX SEC PYL XAA UNK ";
constexpr std::size_t kMostNameLetters = 20, kMostTitleLetters = 30, kSpelledLetters = 12;

inline bool is_placeholder(const Byte* letters, std::size_t num_letters, std::int64_t num_gaps) {
    return num_letters <= kLongestPlaceholder && num_gaps <= kMostPlaceholderGaps &&
           Span{letters, letters + num_letters}.is_one_of(kPlaceholders);
}

// Walks over the lines of a body that are not blank.
struct Lines {
    const Byte *place, *end;
    std::int64_t number = 0;  // from 1, of the line that `next` returned
    Span line{nullptr, nullptr};

    bool next() {
        while (place < end) {
            const Byte* line_end = find(place, end, '\n');
            line = Span{place, line_end};
            place = line_end == end ? end : line_end + 1;
            ++number;
            if (line.stripped().size() != 0) return true;
        }
        return false;
    }
};

// Returns the `>` of a header inside a sequence line, or nothing.
inline const Byte* header_in(Span line) {
    const Byte* mark = find(line.start, line.end, '>');
    if (line.end - mark < 2 || is_blank(mark[1]) || Span{line.start, mark}.stripped().size() == 0) return nullptr;
    for (const Byte* at = line.start; at < mark; ++at)
        if (!is_letter(*at) && *at != '*' && *at != '.' && *at != '-' && !is_blank(*at)) return nullptr;
    return mark;
}

inline bool is_markup(Span line) {
    if (line.size() < 2) return false;
    const Byte first = line.start[0], second = line.start[1];
    return (first == '{' && second == '"') ||
           (first == '<' && (is_letter(second) || second == '!' || second == '/' || second == '?'));
}

inline bool is_prose(Span core) {
    if (core.size() < 2) return false;
    for (const Byte* at = core.start + 1; at < core.end; ++at)
        if (!is_lower(*at) && *at != '\'' && *at != '-') return false;
    return true;
}

inline bool is_text(Span line) {
    line = line.stripped();
    if (is_markup(line)) return true;
    std::size_t num_words = 0, num_kept = 0, num_long = 0, num_prose = 0, num_names = 0, first_size = 0, last_size = 0;
    bool is_telling = false, are_blocks = true;
    for (const Byte* at = line.start; at < line.end;) {
        Span word{at, at};
        bool is_number = true;
        while (word.end < line.end && !is_blank(*word.end)) is_number &= is_digit(*word.end++);
        for (at = word.end; at < line.end && is_blank(*at);) ++at;
        Span core = word;
        while (core.start < core.end && !is_letter(*core.start)) ++core.start;
        while (core.end > core.start && !is_letter(core.end[-1])) --core.end;
        ++num_words;
        is_telling |= core.is_one_of(kTellingWords);
        if (is_number) continue;
        if (num_kept++ == 0) first_size = word.size();
        // All but the last are as long as the first.
        else are_blocks &= last_size == first_size;
        last_size = word.size();
        num_long += core.size() != 1;
        num_prose += is_prose(core);
        num_names += core.is_one_of(kResidueNames);
    }
    if (num_words < 2) return false;
    if (is_telling || (num_kept >= 3 && num_names == num_kept)) return true;
    are_blocks &= last_size <= first_size;
    are_blocks &= first_size == 1 || first_size >= 10 || (first_size >= 5 && num_kept >= 3);
    return num_kept >= 2 && 2 * num_prose > num_long && !are_blocks;
}

inline bool is_proper_name(Span word) {
    for (const Byte* at = word.start; at < word.end;) {
        if (!is_upper(*at++)) return false;
        const Byte* rest = at;
        while (at < word.end && is_lower(*at)) ++at;
        if (at - rest < 3) return false;
    }
    return word.size() <= kMostNameLetters;
}

inline bool is_title(Span word, Span second) {
    if (word.size() >= second.size() || word.size() > kMostTitleLetters) return false;
    const Byte* rest = word.start + is_upper(*word.start);
    if (word.end - rest < 2) return false;
    for (const Byte* at = rest; at < word.end; ++at)
        if (!is_lower(*at)) return false;
    for (const Byte* at = second.start; at < second.end; ++at)
        if (is_lower(*at)) return false;
    return true;
}

inline bool is_spelled(Span line) {
    Byte letters[kSpelledLetters];
    std::size_t size = 0;
    for (const Byte* at = line.start; at < line.end && size < kSpelledLetters; ++at)
        if (!is_blank(*at) && *at != '-') letters[size++] = *at;
    if (size < kSpelledLetters) return false;
    for (const Byte* at = letters; at < letters + kSpelledLetters; at += 3)
        if (!is_upper(at[0]) || !is_lower(at[1]) || !is_lower(at[2]) || !Span{at, at + 3}.is_one_of(kResidueNames))
            return false;
    return true;
}

struct Finding {
    enum Kind { kNothing, kText, kHeader } kind;
    std::int64_t line;
};

// Judges a body; one without blanks and illegal characters can only be a title or spelled residues.
inline Finding judge(const Byte* place, const Byte* end, bool has_only_letters) {
    Lines lines{place, end};
    if (!lines.next()) return {Finding::kNothing, 0};
    const Span first = lines.line.stripped();
    const std::int64_t first_number = lines.number;
    const bool has_second = lines.next();
    if (is_spelled(first) || (has_second ? is_title(first, lines.line.stripped()) : is_proper_name(first)))
        return {Finding::kText, first_number};
    if (has_only_letters) return {Finding::kNothing, 0};
    for (lines = Lines{place, end}; lines.next();) {
        const Byte* header = header_in(lines.line);
        if (is_text(Span{lines.line.start, header ? header : lines.line.end})) return {Finding::kText, lines.number};
        if (header) return {Finding::kHeader, lines.number};
    }
    return {Finding::kNothing, 0};
}

// Returns the last byte of a body that is neither blank nor a line end; one must exist.
inline const Byte* last_filled(const Byte* place, const Byte* end) {
    do --end;
    while (end > place && (is_blank(*end) || *end == '\r' || *end == '\n'));
    return end;
}

}  // namespace judging

#endif
