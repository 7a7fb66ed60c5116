// Random words by vectors: Philox (arith.h) on one counter a 64-bit lane, whose high half may hold anything. Included by loops.cpp alone.
#pragma once

#include "lanes.h"

namespace ires {
namespace IRES_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // elements of an L1 block

// The low halves of the lanes times m.
IRES_HD U64 multiply(U64 a, uint32_t m) {
#if IRES_LANES == 16
    return bit_cast<U64>(_mm512_mul_epu32(bit_cast<__m512i>(a), _mm512_set1_epi64(m)));
#elif IRES_LANES == 8
    return bit_cast<U64>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(m)));
#elif defined(__SSE2__)
    return bit_cast<U64>(_mm_mul_epu32(bit_cast<__m128i>(a), _mm_set1_epi64x(m)));
#else
    return (a & 0xffffffffu) * uint64_t(m);
#endif
}

// Two lanes' low halves, one after the other.
IRES_HD U64 join(U64 first, U64 second) { return (first & 0xffffffffu) | (second << 32); }

// put(i, w): w[0..3] are the words of the elements 4 i .. 4 (i + W / 2) - 1, counted from the counter `first`, by
// their index modulo 4.
template <class Put> IRES_HD void for_words(uint64_t seed, uint64_t stream, uint64_t first, int64_t counters, const Put& put) {
    constexpr int kLanes = W / 2;
    U64 lane;
    for (int j = 0; j < kLanes; ++j) lane[j] = uint64_t(j);
    for (int64_t i = 0; i < counters; i += kLanes) {
        const U64 counter = (lane + (first + uint64_t(i))) & (~uint64_t(0) >> 2);
        U64 c[4] = {counter, counter >> 32, U64{} + stream, U64{} + (stream >> 32)};
        uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const U64 p0 = multiply(c[0], kPhiloxM0), p1 = multiply(c[2], kPhiloxM1);
            c[0] = (p1 >> 32) ^ c[1] ^ uint64_t(k0);
            c[2] = (p0 >> 32) ^ c[3] ^ uint64_t(k1);
            c[1] = p1;
            c[3] = p0;
            k0 += kPhiloxW0;
            k1 += kPhiloxW1;
        }
        put(i, c);
    }
}

// The words of a block's elements. Room for the lanes in front of and behind them.
struct BlockOfWords {
    alignas(64) uint32_t w[kBlock + 4 * W];

    // Returns the word of element `index`, those of the n - 1 next behind it.
    const uint32_t* in_order(uint64_t seed, uint64_t stream, uint64_t index, int64_t n) {
        const uint64_t skip = index & 3;
        for_words(seed, stream, index >> 2, (int64_t(skip) + n + 3) >> 2, [&](int64_t i, const U64* c) {
            const U64 w01 = join(c[0], c[1]), w23 = join(c[2], c[3]);
            alignas(64) uint64_t pairs[W];
            for (int j = 0; j < W / 2; ++j) {
                pairs[2 * j] = w01[j];
                pairs[2 * j + 1] = w23[j];
            }
            memcpy(w + 4 * i, pairs, sizeof pairs);
        });
        return w + skip;
    }

    // For an index that is a multiple of 4: W words of elements 0, 2, .. then W of 1, 3, .., and so on.
    const uint32_t* even_odd(uint64_t seed, uint64_t stream, uint64_t index, int64_t n) {
        for_words(seed, stream, index >> 2, (n + 3) >> 2, [&](int64_t i, const U64* c) {
            const U64 even = join(c[0], c[2]), odd = join(c[1], c[3]);
            memcpy(w + 4 * i, &even, sizeof even);
            memcpy(w + 4 * i + W, &odd, sizeof odd);
        });
        return w;
    }
};

}  // namespace
}  // namespace IRES_ISA
}  // namespace ires
