// FASTA text to columns of records, the compiled twin of protlm/data/parsing/fasta.py and vocabulary.clean.
//
// A plain C interface that compiled_fasta.py loads with ctypes: no Python header, no exception, no memory of its own.
// The caller measures a text, allocates every array by these sizes, and has it parsed in one call. A record that cannot
// be used is returned as a place in the text, its id and the reason; fasta.py words the error.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "judging.h"

#define XXH_INLINE_ALL
#include "xxhash.h"  // 0.8.2 as released, which a test holds; its open remarks are those of its authors

namespace {

using judging::Byte;
using judging::find;

// The kinds of bytes in a sequence; those that `clean` keeps come first, so that one comparison decides.
enum Kind : Byte { kUpper, kUpperJ, kLower, kLowerJ, kStop, kGap, kSpace, kLineEnd, kIllegal, kNumKinds };

// As vocabulary.TOKENS, from the first residue on.
constexpr char kResidues[] = "LAGVSERTIDPKQNFYMHWCXBUZO";
constexpr int kNumResidues = 25;
constexpr Byte kFirstToken = 4;
constexpr Byte kNoToken = 0x80;

struct Tables {
    Byte token[256], kind[256], letter[256];

    Tables() {
        std::memset(token, kNoToken, sizeof token);
        std::memset(kind, kIllegal, sizeof kind);
        std::memset(letter, 0, sizeof letter);
        for (int i = 0; i < kNumResidues; ++i) {
            const Byte upper = static_cast<Byte>(kResidues[i]), lower = static_cast<Byte>(upper + 32);
            token[upper] = static_cast<Byte>(kFirstToken + i);
            kind[upper] = kUpper;
            kind[lower] = kLower;
            letter[upper] = letter[lower] = upper;
        }
        kind['J'] = kUpperJ;
        kind['j'] = kLowerJ;
        letter['J'] = letter['j'] = 'X';
        kind['*'] = kStop;
        letter['*'] = '*';
        kind['-'] = kind['.'] = kGap;
        kind[' '] = kind['\t'] = kind['\r'] = kind['\v'] = kind['\f'] = kSpace;
        kind['\n'] = kLineEnd;
    }
};

const Tables tables;

// In the order of compiled_fasta._RULES.
enum Repair { kLowerCase, kTrailingStop, kJToX, kGapRemoved, kSpaceRemoved, kCommentLine, kNumRepairs };

inline bool is_space(Byte byte) { return byte == ' ' || (byte >= '\t' && byte <= '\r'); }

struct Body {
    const Byte* letters;
    std::size_t num_letters;
    std::int64_t num_line_ends;
    const Byte* next;
};

// Joins the lines of a body up to the next record. A body of one line is not copied.
Body join_lines(const Byte* place, const Byte* end, Byte* letters) {
    Body body{letters, 0, 0, place};
    const Byte* first = place;
    while (place < end && *place != '>') {
        const Byte* line_end = find(place, end, '\n');
        const std::size_t size = static_cast<std::size_t>(line_end - place);
        const bool is_only_line = place == first && (end - line_end <= 1 || line_end[1] == '>');
        if (is_only_line)
            body.letters = place;
        else
            std::memcpy(letters + body.num_letters, place, size);
        body.num_letters += size;
        body.num_line_ends += line_end != end;
        place = line_end != end ? line_end + 1 : end;
    }
    body.next = place;
    return body;
}

// Writes the tokens of upper-case residues; returns false if another letter is among them.
inline bool encode(const Byte* letters, std::size_t num_letters, Byte* tokens) {
    Byte seen = 0;
    // Half of all time is spent here; bookkeeping of the loop would be a fifth of it.
#pragma GCC unroll 8
    for (std::size_t i = 0; i < num_letters; ++i) {
        const Byte token = tables.token[letters[i]];
        tokens[i] = token;
        seen |= token;
    }
    return (seen & kNoToken) == 0;
}

// Cleans a body as vocabulary.clean does; returns the number of letters, or -1 for an illegal one.
std::int64_t clean(const Byte* place, const Byte* end, Byte* letters, std::int64_t* repairs) {
    const Byte* const start = place;
    std::int64_t counts[kNumKinds] = {};
    std::int64_t num_letters = 0;
    for (; place < end; ++place) {
        const Byte kind = tables.kind[*place];
        letters[num_letters] = tables.letter[*place];
        num_letters += kind <= kStop;
        ++counts[kind];
    }
    if (counts[kIllegal] != 0 || counts[kStop] > 1) return -1;
    if (counts[kStop] == 1 && letters[--num_letters] != '*') return -1;
    if (counts[kStop] == 0 && counts[kGap] == 1 && *judging::last_filled(start, end) == '.') {
        counts[kStop] = 1;
        counts[kGap] = 0;
    }
    repairs[kLowerCase] = counts[kLower] + counts[kLowerJ];
    repairs[kTrailingStop] = counts[kStop];
    repairs[kJToX] = counts[kUpperJ] + counts[kLowerJ];
    repairs[kGapRemoved] = counts[kGap];
    repairs[kSpaceRemoved] = counts[kSpace];
    return num_letters;
}

// Copies lines, of those that begin with `;` the line end alone; returns the number of these.
std::int64_t blank_comment_lines(const Byte* place, const Byte* end, Byte* lines, const Byte** lines_end) {
    std::int64_t num_comments = 0;
    while (place < end) {
        const Byte* line_end = find(place, end, '\n');
        const Byte* next = line_end == end ? end : line_end + 1;
        if (*place == ';') {
            ++num_comments;
            place = line_end;
        }
        const std::size_t size = static_cast<std::size_t>(next - place);
        std::memcpy(lines, place, size);
        lines += size;
        place = next;
    }
    *lines_end = lines;
    return num_comments;
}

// Returns the number of line ends before the first letter for which `clean` refuses a body.
std::int64_t line_ends_before_fault(const Byte* place, const Byte* end) {
    const Byte* last = end;
    while (last > place && tables.kind[last[-1]] >= kGap && tables.kind[last[-1]] <= kLineEnd) --last;
    std::int64_t num_line_ends = 0;
    for (; place < end; ++place) {
        const Byte kind = tables.kind[*place];
        if (kind == kIllegal || (kind == kStop && place + 1 != last)) break;
        num_line_ends += kind == kLineEnd;
    }
    return num_line_ends;
}

constexpr std::int32_t kUnknown = -1;

// Returns the number of one to nine digits that is the whole rest of a word, or kUnknown.
std::int32_t number_at(const Byte* place, const Byte* end) {
    std::int32_t value = 0;
    int num_digits = 0;
    for (; place < end && *place >= '0' && *place <= '9'; ++place) {
        if (++num_digits > 9) return kUnknown;
        value = value * 10 + (*place - '0');
    }
    return num_digits != 0 && (place == end || is_space(*place)) ? value : kUnknown;
}

struct Header {
    const Byte *id, *id_end, *description, *description_end;

    Header(const Byte* place, const Byte* end) {
        while (end > place && is_space(end[-1])) --end;
        while (place < end && is_space(*place)) ++place;
        id = place;
        while (place < end && !is_space(*place)) ++place;
        id_end = place;
        while (place < end && is_space(*place)) ++place;
        description = place;
        description_end = end;
    }

    bool has_name_before(const Byte* equals, const char* name) const {
        const std::size_t size = std::strlen(name);
        if (static_cast<std::size_t>(equals - description) < size) return false;
        const Byte* start = equals - size;
        return std::memcmp(start, name, size) == 0 && (start == description || is_space(start[-1]));
    }

    // The first `n=` and the first `TaxID=` or `OX=` that are followed by a fitting number.
    void read_numbers(std::int32_t* cluster_size, std::int32_t* taxon_id) const {
        *cluster_size = *taxon_id = kUnknown;
        for (const Byte* at = description; (at = find(at, description_end, '=')) != description_end; ++at) {
            if (*cluster_size == kUnknown && has_name_before(at, "n"))
                *cluster_size = number_at(at + 1, description_end);
            else if (*taxon_id == kUnknown && (has_name_before(at, "OX") || has_name_before(at, "TaxID")))
                *taxon_id = number_at(at + 1, description_end);
        }
    }
};

// Returns whether bytes are UTF-8 as Python decodes it: no surrogates, no overlong forms, nothing above U+10FFFF.
bool is_utf8(const Byte* place, const Byte* end) {
    while (place < end) {
        const Byte first = *place++;
        if (first < 0x80) continue;
        const int num_following = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;
        if (first < 0xc2 || first > 0xf4 || end - place < num_following) return false;
        // The range of the second byte depends on the first; the others are 0x80 to 0xbf.
        const Byte low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
        const Byte high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
        if (*place < low || *place > high) return false;
        for (int i = 1; i < num_following; ++i)
            if ((place[i] & 0xc0) != 0x80) return false;
        place += num_following;
    }
    return true;
}

// In the order of compiled_fasta.REASONS.
enum Reason : Byte {
    kNoId, kNotUtf8, kOversized, kPir, kMissingLineEnd, kText, kIllegalCharacter, kNoSequence, kGood
};

// A cleaned sequence, or why there is none and on which line below its header, 0 for the header itself.
struct Sequence {
    const Byte* letters;
    std::int64_t num_letters;
    Reason reason;
    std::int64_t fault_line;
};

// Cleans and encodes a body. The letters may be written to the same place as those of `body`.
Sequence read_sequence(
    const Body& body, const Byte* start, Byte* letters, Byte* tokens, std::int64_t* repairs
) {
    const Byte *place = start, *end = body.next;
    std::int64_t num_letters = static_cast<std::int64_t>(body.num_letters);
    const bool is_clean = encode(body.letters, body.num_letters, tokens);
    if (!is_clean) {
        if (find(place, end, ';') != end) {
            repairs[kCommentLine] = blank_comment_lines(start, body.next, letters, &end);
            place = letters;
        }
        // Not to the place of the lines, which are still to be judged.
        num_letters = clean(place, end, tokens, repairs);
        if (num_letters < 0 || repairs[kLowerCase] != 0 || repairs[kSpaceRemoved] != 0) {
            const bool has_only_letters = num_letters >= 0 && repairs[kSpaceRemoved] == 0;
            const judging::Finding finding = judging::judge(place, end, has_only_letters);
            if (finding.kind == judging::Finding::kText) return {letters, 0, kText, finding.line};
            if (finding.kind == judging::Finding::kHeader) return {letters, 0, kMissingLineEnd, finding.line};
        }
        if (num_letters < 0) return {letters, 0, kIllegalCharacter, 1 + line_ends_before_fault(place, end)};
    }
    if (num_letters == 0) return {letters, 0, kNoSequence, 0};
    const std::size_t size = static_cast<std::size_t>(num_letters);
    if (repairs[kTrailingStop] == 0 &&
        judging::is_placeholder(is_clean ? body.letters : tokens, size, repairs[kGapRemoved])) {
        judging::Lines lines{place, end};
        lines.next();
        return {letters, 0, kText, lines.number};
    }
    if (is_clean) return {body.letters, num_letters, kGood, 0};
    std::memcpy(letters, tokens, size);
    encode(letters, size, tokens);
    return {letters, num_letters, kGood, 0};
}

// Returns whether an id begins with the code of a kind of sequence of PIR files.
bool is_pir_id(const Byte* id, const Byte* end) {
    if (end - id < 3 || id[2] != ';') return false;
    const char code[] = {static_cast<char>(id[0]), static_cast<char>(id[1]), ' ', 0};
    return std::strstr("P1 F1 DL DC RL RC N1 N3 XX ", code) != nullptr;
}

// Writes the xxh3-128 of a text, high half first.
inline void write_digest(const Byte* text, std::size_t size, std::uint64_t* digest) {
    const XXH128_hash_t hash = XXH3_128bits(text, size);
    digest[0] = hash.high64;
    digest[1] = hash.low64;
}

}  // namespace

extern "C" {

// Raised whenever a function or a structure below or in kmers.cpp changes, so that a library built from older sources
// is not used.
std::int64_t protlm_fasta_version() { return 4; }

// A header inside a line makes a second bad record of the one that it stands in.
struct FastaSizes {
    std::int64_t num_records, header_bytes, longest_record, num_glued_headers, glued_header_bytes;
};

// Room for every record of a text, which the caller has measured. Columns as in record_table.py; `bad_records` has
// five numbers each: start, end, line, number of good records before it, line of the fault; reasons and ids have columns.
struct FastaColumns {
    Byte* letters;
    Byte* tokens;
    std::int64_t* offsets;
    Byte* ids;
    std::int64_t* id_offsets;
    Byte* descriptions;
    std::int64_t* description_offsets;
    std::uint64_t* digests;
    std::uint64_t* id_digests;
    std::int32_t* cluster_size;
    std::int32_t* taxon_id;
    std::int64_t* lines;
    std::int64_t* bad_records;
    Byte* bad_reasons;
    Byte* bad_ids;
    std::int64_t* bad_id_offsets;
    std::int64_t repairs[kNumRepairs];
    std::int64_t num_records, num_bad_records;
};

static void add_bad_record(
    FastaColumns& c, std::int64_t& num_bad, const std::int64_t (&bad)[5], Reason reason, const Byte* id,
    const Byte* id_end
) {
    const std::size_t size = static_cast<std::size_t>(id_end - id);
    std::memcpy(c.bad_records + 5 * num_bad, bad, sizeof bad);
    c.bad_reasons[num_bad] = reason;
    std::memcpy(c.bad_ids + c.bad_id_offsets[num_bad], id, size);
    c.bad_id_offsets[num_bad + 1] = c.bad_id_offsets[num_bad] + static_cast<std::int64_t>(size);
    ++num_bad;
}

// Adds the records whose headers stand inside the lines of a bad record.
static void add_glued_records(
    FastaColumns& c, std::int64_t& num_bad, const std::int64_t (&bad)[5], const Byte* body_start, const Byte* body_end
) {
    for (judging::Lines lines{body_start, body_end}; lines.next();) {
        const Byte* mark = *lines.line.start == ';' ? nullptr : judging::header_in(lines.line);
        if (mark == nullptr) continue;
        const Byte* id_end = mark + 1;
        while (id_end < lines.line.end && !judging::is_blank(*id_end)) ++id_end;
        const std::int64_t glued[5] = {bad[0], bad[1], bad[2], bad[3], bad[2] + lines.number};
        add_bad_record(c, num_bad, glued, kMissingLineEnd, mark + 1, id_end);
    }
}

void protlm_measure_fasta(const Byte* text, std::int64_t size, FastaSizes* sizes) {
    const Byte* end = text + size;
    *sizes = FastaSizes{0, 0, 0, 0, 0};
    for (const Byte* start = text; start < end;) {
        const Byte* header_end = find(start, end, '\n');
        const Byte* next = header_end == end ? end : header_end + 1;
        for (const Byte* body = next; (next = find(next, end, '>')) != end;) {
            if (next == body || next[-1] == '\n') break;
            const Byte* line_end = find(next, end, '\n');
            ++sizes->num_glued_headers;
            sizes->glued_header_bytes += line_end - next;
            next = line_end;
        }
        ++sizes->num_records;
        sizes->header_bytes += header_end - start;
        if (next - start > sizes->longest_record) sizes->longest_record = next - start;
        start = next;
    }
}

void protlm_parse_fasta(const Byte* text, std::int64_t size, std::int64_t max_record_bytes, FastaColumns* columns) {
    const Byte* end = text + size;
    FastaColumns& c = *columns;
    std::int64_t line = 1, n = 0, num_bad = 0;
    c.offsets[0] = c.id_offsets[0] = c.description_offsets[0] = c.bad_id_offsets[0] = 0;
    for (const Byte* start = text; start < end;) {
        const Byte* header_end = find(start, end, '\n');
        const Byte* body_start = header_end == end ? end : header_end + 1;
        const Header header(start + 1, header_end);
        const Body body = join_lines(body_start, end, c.letters);

        Byte* tokens = c.tokens + c.offsets[n];
        std::int64_t repairs[kNumRepairs] = {};
        const Sequence sequence = read_sequence(body, body_start, c.letters, tokens, repairs);
        const Byte* letters = sequence.letters;
        const std::int64_t num_letters = sequence.num_letters;

        // A record ends before the line end that comes before the next one.
        const Byte* record_end = body.next == end ? end : body.next - 1;
        const Reason reason = header.id == header.id_end                       ? kNoId
                              : !is_utf8(header.id, header.description_end)    ? kNotUtf8
                              : record_end - start - 1 > max_record_bytes      ? kOversized
                              : is_pir_id(header.id, header.id_end)            ? kPir
                              : sequence.reason != kGood                       ? sequence.reason
                                                                               : kGood;
        if (reason != kGood) {
            const bool is_in_body = reason == sequence.reason;
            const std::int64_t bad[5] = {
                start - text, record_end - text, line, n, is_in_body ? line + sequence.fault_line : line
            };
            add_bad_record(c, num_bad, bad, reason, header.id, header.id_end);
            if (reason == kMissingLineEnd) add_glued_records(c, num_bad, bad, body_start, body.next);
        } else {
            const std::size_t id_size = static_cast<std::size_t>(header.id_end - header.id);
            const std::size_t description_size = static_cast<std::size_t>(header.description_end - header.description);
            write_digest(letters, static_cast<std::size_t>(num_letters), c.digests + 2 * n);
            write_digest(header.id, id_size, c.id_digests + 2 * n);
            std::memcpy(c.ids + c.id_offsets[n], header.id, id_size);
            std::memcpy(c.descriptions + c.description_offsets[n], header.description, description_size);
            header.read_numbers(c.cluster_size + n, c.taxon_id + n);
            c.lines[n] = line;
            c.offsets[n + 1] = c.offsets[n] + num_letters;
            c.id_offsets[n + 1] = c.id_offsets[n] + static_cast<std::int64_t>(id_size);
            c.description_offsets[n + 1] = c.description_offsets[n] + static_cast<std::int64_t>(description_size);
            for (int i = 0; i < kNumRepairs; ++i) c.repairs[i] += repairs[i];
            ++n;
        }
        line += (header_end != end) + body.num_line_ends;
        start = body.next;
    }
    c.num_records = n;
    c.num_bad_records = num_bad;
}

void protlm_digest(const Byte* text, std::int64_t size, std::uint64_t* digest) {
    write_digest(text, static_cast<std::size_t>(size), digest);
}

// Four histograms, so that equal tokens in a row do not wait for each other's count.
void protlm_count_residues(const Byte* tokens, std::int64_t num_tokens, std::int64_t* counts) {
    std::int64_t histograms[4][256] = {};
    std::int64_t i = 0;
    for (; i + 4 <= num_tokens; i += 4)
        for (int k = 0; k < 4; ++k) ++histograms[k][tokens[i + k]];
    for (; i < num_tokens; ++i) ++histograms[0][tokens[i]];
    for (int residue = 0; residue < kNumResidues; ++residue) {
        const int token = kFirstToken + residue;
        counts[residue] =
            histograms[0][token] + histograms[1][token] + histograms[2][token] + histograms[3][token];
    }
}

}  // extern "C"
