// xxh3-128 with seed 0 and the default secret, after the specification that xxHash publishes.

#ifndef PROTLM_DATA_XXH3_H
#define PROTLM_DATA_XXH3_H

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace xxh3 {

using Byte = std::uint8_t;
using Word = std::uint64_t;
using Wide = unsigned __int128;

constexpr Word kPrime32[3] = {0x9E3779B1u, 0x85EBCA77u, 0xC2B2AE3Du};
constexpr Word kPrime64[5] = {0x9E3779B185EBCA87u, 0xC2B2AE3D27D4EB4Fu, 0x165667B19E3779F9u, 0x85EBCA77C2B2AE63u,
                              0x27D4EB2F165667C5u};
constexpr Word kMixer1 = 0x165667919E3779F9u;
constexpr Word kMixer2 = 0x9FB21C651E98DF25u;
constexpr std::size_t kSecretSize = 192;
constexpr Byte kSecret[kSecretSize] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d,
    0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0,
    0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0,
    0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b,
    0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac,
    0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51,
    0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34,
    0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49,
    0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8,
    0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b,
    0x40, 0x7e};

struct Digest {
    Word high, low;
};

// Input and secret are little-endian words at any address.
inline Word read64(const Byte* place) {
    Word value;
    std::memcpy(&value, place, sizeof value);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

inline std::uint32_t read32(const Byte* place) {
    std::uint32_t value;
    std::memcpy(&value, place, sizeof value);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap32(value);
#endif
    return value;
}

inline Word secret64(std::size_t place) { return read64(kSecret + place); }
inline Word secret_pair(std::size_t place) { return secret64(place) ^ secret64(place + 8); }
inline Word low_half(Wide value) { return static_cast<Word>(value); }
inline Word high_half(Wide value) { return static_cast<Word>(value >> 64); }

inline Word folded_product(Word a, Word b) {
    const Wide product = static_cast<Wide>(a) * b;
    return low_half(product) ^ high_half(product);
}

inline Word avalanche(Word x) {
    x = (x ^ (x >> 37)) * kMixer1;
    return x ^ (x >> 32);
}

inline Word avalanche_of_xxh64(Word x) {
    x = (x ^ (x >> 33)) * kPrime64[1];
    x = (x ^ (x >> 29)) * kPrime64[2];
    return x ^ (x >> 32);
}

inline Digest digest_1_to_3(const Byte* input, std::size_t size) {
    const std::uint32_t packed = static_cast<std::uint32_t>(input[size - 1]) | static_cast<std::uint32_t>(size << 8) |
                                 static_cast<std::uint32_t>(input[0]) << 16 |
                                 static_cast<std::uint32_t>(input[size >> 1]) << 24;
    const std::uint32_t swapped = __builtin_bswap32(packed);
    const std::uint32_t rotated = swapped << 13 | swapped >> 19;
    const Word low = static_cast<Word>(read32(kSecret) ^ read32(kSecret + 4)) ^ packed;
    const Word high = static_cast<Word>(read32(kSecret + 8) ^ read32(kSecret + 12)) ^ rotated;
    return {avalanche_of_xxh64(high), avalanche_of_xxh64(low)};
}

inline Digest digest_4_to_8(const Byte* input, std::size_t size) {
    const Word ends = read32(input) | static_cast<Word>(read32(input + size - 4)) << 32;
    const Wide product = static_cast<Wide>(secret_pair(16) ^ ends) * (kPrime64[0] + (size << 2));
    Word low = low_half(product);
    const Word high = high_half(product) + (low << 1);
    low ^= high >> 3;
    low = (low ^ (low >> 35)) * kMixer2;
    return {avalanche(high), low ^ (low >> 28)};
}

inline Digest digest_9_to_16(const Byte* input, std::size_t size) {
    const Word first = read64(input), last = read64(input + size - 8);
    const Word b = secret_pair(48) ^ last;
    const Wide product = static_cast<Wide>(secret_pair(32) ^ first ^ last) * kPrime64[0];
    Word high = high_half(product) + b + (b & 0xFFFFFFFFu) * (kPrime32[1] - 1);
    const Word low = (low_half(product) + (static_cast<Word>(size - 1) << 54)) ^ __builtin_bswap64(high);
    const Wide scaled = static_cast<Wide>(low) * kPrime64[1];
    high = high_half(scaled) + high * kPrime64[1];
    return {avalanche(high), avalanche(low_half(scaled))};
}

inline Word mixed(const Byte* input, std::size_t secret) {
    return folded_product(read64(input) ^ secret64(secret), read64(input + 8) ^ secret64(secret + 8));
}

// Two chunks of 16 bytes go into the two accumulators, each also into the other's.
inline void mix_two(Word* sums, const Byte* one, const Byte* other, std::size_t secret) {
    sums[0] = (sums[0] + mixed(one, secret)) ^ (read64(other) + read64(other + 8));
    sums[1] = (sums[1] + mixed(other, secret + 16)) ^ (read64(one) + read64(one + 8));
}

inline Digest digest_17_to_240(const Byte* input, std::size_t size) {
    Word sums[2] = {size * kPrime64[0], 0};
    if (size <= 128) {
        for (std::size_t i = (size - 1) / 32 + 1; i-- > 0;)
            mix_two(sums, input + i * 16, input + size - i * 16 - 16, i * 32);
    } else {
        for (std::size_t i = 0; i < 4; ++i) mix_two(sums, input + i * 32, input + i * 32 + 16, i * 32);
        sums[0] = avalanche(sums[0]);
        sums[1] = avalanche(sums[1]);
        for (std::size_t i = 4; i < size / 32; ++i)
            mix_two(sums, input + i * 32, input + i * 32 + 16, (i - 4) * 32 + 3);
        mix_two(sums, input + size - 16, input + size - 32, 103);
    }
    const Word high = sums[0] * kPrime64[0] + sums[1] * kPrime64[3] + size * kPrime64[1];
    return {Word{0} - avalanche(high), avalanche(sums[0] + sums[1])};
}

constexpr std::size_t kStripe = 64;
constexpr std::size_t kStripesInBlock = (kSecretSize - kStripe) / 8;
constexpr std::size_t kBlock = kStripesInBlock * kStripe;

inline void add_stripe(Word* sums, const Byte* stripe, std::size_t secret) {
    for (std::size_t i = 0; i < 8; i += 2) {
        const Word even = read64(stripe + i * 8), odd = read64(stripe + i * 8 + 8);
        const Word even_key = even ^ secret64(secret + i * 8), odd_key = odd ^ secret64(secret + i * 8 + 8);
        sums[i] += odd + (even_key & 0xFFFFFFFFu) * (even_key >> 32);
        sums[i + 1] += even + (odd_key & 0xFFFFFFFFu) * (odd_key >> 32);
    }
}

inline Word merged(const Word* sums, Word start, std::size_t secret) {
    for (std::size_t i = 0; i < 8; i += 2)
        start += folded_product(sums[i] ^ secret64(secret + i * 8), sums[i + 1] ^ secret64(secret + i * 8 + 8));
    return avalanche(start);
}

inline Digest digest_from_241(const Byte* input, std::size_t size) {
    Word sums[8] = {kPrime32[2], kPrime64[0], kPrime64[1], kPrime64[2],
                    kPrime64[3], kPrime32[1], kPrime64[4], kPrime32[0]};
    std::size_t place = 0;
    // The last block is no round, even if it is full.
    for (; size - place > kBlock; place += kBlock) {
        for (std::size_t i = 0; i < kStripesInBlock; ++i) add_stripe(sums, input + place + i * kStripe, i * 8);
        for (std::size_t i = 0; i < 8; ++i)
            sums[i] = (sums[i] ^ (sums[i] >> 47) ^ secret64(kSecretSize - kStripe + i * 8)) * kPrime32[0];
    }
    const std::size_t num_stripes = (size - place - 1) / kStripe;
    for (std::size_t i = 0; i < num_stripes; ++i) add_stripe(sums, input + place + i * kStripe, i * 8);
    add_stripe(sums, input + size - kStripe, kSecretSize - 71);
    return {merged(sums, ~(size * kPrime64[1]), kSecretSize - 75), merged(sums, size * kPrime64[0], 11)};
}

inline Digest digest_of(const Byte* input, std::size_t size) {
    if (size == 0) return {avalanche_of_xxh64(secret_pair(80)), avalanche_of_xxh64(secret_pair(64))};
    if (size <= 3) return digest_1_to_3(input, size);
    if (size <= 8) return digest_4_to_8(input, size);
    if (size <= 16) return digest_9_to_16(input, size);
    return size <= 240 ? digest_17_to_240(input, size) : digest_from_241(input, size);
}

}  // namespace xxh3

#endif
