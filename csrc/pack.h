// What an update did to the bits of a tensor, packed: with the new bits it gives the old ones. Included by loops.cpp alone.
//
// Values of a format have places in their order, those below a floor one place, and a value has gone d places: few where
// the new one is large, as an update has one size and places lie as far apart as values are large. So the exponent of the
// new value says how many bits d has, in zigzag, and a number for a block says how that is meant:
//
//   width(new) = offset - exponent(new), within 1 .. kMost        floor = exponent offset - kFloor, with mantissa 0
//   d 0: the bits are the same      all bits of the width set: the old bits stand among those kept as they are
//
// What does not give the old bits in this way is kept as it is, so nothing has to be known of -0, NaN, or rounding. A record
// is a sequence of blocks of kBlockPacked elements at most:
//
//   head | bits of the elements, from the lowest bit of 64-bit words on | old bits that are kept, in order, up to 8 bytes
//
// In the head is a sum of the new bits: only they give the old ones.
// The bits of 4 or 2 elements are put together in vectors; per word of these, and not per element, they are appended.
#pragma once

#include <algorithm>
#include <memory>

#include "cpu.h"
#include "lanes.h"

namespace ires {
namespace IRES_ISA {
namespace {

constexpr int kTogether = 32;  // elements at a time, at the end of a block with zeros: as many as any vectors have

struct PackHead {
    int32_t offset;  // or one of the next two
    uint32_t words, kept, n;
    uint64_t sum;
};
constexpr int32_t kSame = -1, kPlain = -2;

// Of each lane the low half times the high half.
IRES_HD U64 product(U64 x) {
#if IRES_LANES == 16
    return bit_cast<U64>(_mm512_mul_epu32(bit_cast<__m512i>(x), bit_cast<__m512i>(U64(x >> 32))));
#elif IRES_LANES == 8
    return bit_cast<U64>(_mm256_mul_epu32(bit_cast<__m256i>(x), bit_cast<__m256i>(U64(x >> 32))));
#elif defined(__SSE2__)
    return bit_cast<U64>(_mm_mul_epu32(bit_cast<__m128i>(x), bit_cast<__m128i>(U64(x >> 32))));
#else
    return (x & 0xffffffffu) * (x >> 32);
#endif
}

// Of 64-bit words, each with a key of its place: the halves of what that makes of it multiplied, and itself. As NH of UMAC,
// it is the same by chance for one in 2^32 of what differs.
inline uint64_t sum_of(const void* p, int64_t bytes) {
    constexpr int kLanes = W / 2;
    constexpr uint64_t kKey = 0x9e3779b97f4a7c15u;
    U64 keys, sums{};
    for (int k = 0; k < kLanes; ++k) keys[k] = kKey * uint64_t(k + 1);
    const char* at = static_cast<const char*>(p);
    const auto add = [&](U64 x) {
        sums += product(x ^ keys) + (x >> 32 | x << 32);
        keys += kKey * kLanes;
    };
    int64_t i = 0;
    for (; i + int64_t(sizeof(U64)) <= bytes; i += sizeof(U64)) add(load_raw<U64>(at + i));
    uint64_t sum = uint64_t(bytes);
    for (; i < bytes; i += 8) {
        uint64_t x = 0;
        memcpy(&x, at + i, size_t(std::min<int64_t>(8, bytes - i)));
        const uint64_t key = kKey * uint64_t(i / 8 + 1), y = x ^ key;
        sum += (y & 0xffffffffu) * (y >> 32) + (x >> 32 | x << 32);
    }
    for (int k = 0; k < kLanes; ++k) sum += sums[k];
    return sum;
}

// Vectors of its lanes: they are computed with as unsigned numbers, which may wrap around.
template <class T> struct Vectors;
template <> struct Vectors<int16_t> { using Unsigned = U16x2; using Signed = S16x2; };
template <> struct Vectors<int32_t> { using Unsigned = U; using Signed = I; };

// A format: its bits are a sign and a magnitude of T.
template <class T, int kMantissa> struct Packing {
    using V = typename Vectors<T>::Unsigned;
    using S = typename Vectors<T>::Signed;
    using N = std::make_unsigned_t<T>;
    static constexpr int kBits = 8 * sizeof(T), kLanes = sizeof(V) / sizeof(T), kGroup = 8 / sizeof(T), kGroups = kTogether / kGroup;
    // With these bf16 weights of std .02 take the fewest bits after updates of 7e-5 to 1.4e-3; 1 more or less is 1 % at most.
    static constexpr int kMost = kMantissa + 4, kFloor = kMantissa + 6;
    static constexpr T kMagnitude = std::numeric_limits<T>::max(), kSign = std::numeric_limits<T>::min();

    static N floor(int32_t offset) { return N(std::min<int64_t>(int64_t(std::max(0, offset - kFloor)) << kMantissa, kMagnitude)); }

    IRES_HD static V sign(V x) { return bit_cast<V>(S(bit_cast<S>(x) >> (kBits - 1))); }  // of all bits
    IRES_HD static V place(V bits, N floor) {
        const V m = (bits & N(kMagnitude)) - floor, above = m & ~sign(m), s = sign(bits);
        return (above ^ s) - s;
    }
    IRES_HD static V width(V now, N offset) {
        const S w = bit_cast<S>(V(offset - ((now & N(kMagnitude)) >> kMantissa))), low = S{} + T(1), high = S{} + T(kMost);
        const S more = w < low ? low : w;
        return bit_cast<V>(S(more > high ? high : more));
    }
    IRES_HD static V mask(V width) {
#if IRES_LANES < 16  // no vector shifts of 16 bits by different numbers
        if constexpr (sizeof(T) == 2) {
            const U w = bit_cast<U>(width), one = U{} + 1, low = (one << (w & 0xffffu)) - 1, high = (one << (w >> 16)) - 1;
            return bit_cast<V>(U(low | high << 16));
        }
#endif
        return ((V{} + N(1)) << width) - N(1);
    }
    IRES_HD static V before(V now, V place, V code, N floor) {
        const V at = place + ((code >> 1) ^ (V{} - (code & N(1)))), s = sign(at);
        const V moved = (((at ^ s) - s) + floor) | (s & N(kSign));
        return code == N(0) ? now : moved;
    }

    // Calls `take` with the number of each lane that is set.
    template <class Take> IRES_HD static void for_set(V lanes, const Take& take) {
#if IRES_LANES == 16
        constexpr int kStep = 1;
        uint32_t left;
        if constexpr (sizeof(T) == 2) left = _mm512_movepi16_mask(bit_cast<__m512i>(lanes));
        else left = _mm512_movepi32_mask(bit_cast<__m512i>(lanes));
#elif IRES_LANES == 8
        constexpr int kStep = sizeof(T);
        uint32_t left = uint32_t(_mm256_movemask_epi8(bit_cast<__m256i>(lanes)));
#elif defined(__SSE2__)
        constexpr int kStep = sizeof(T);
        uint32_t left = uint32_t(_mm_movemask_epi8(bit_cast<__m128i>(lanes)));
#else
        constexpr int kStep = 1;
        uint32_t left = 0;
        for (int k = 0; k < kLanes; ++k) left |= uint32_t(lanes[k] & 1) << k;
#endif
        while (left != 0) {
            const int at = __builtin_ctz(left);
            take(at / kStep);
            left &= ~(((uint32_t(1) << kStep) - 1) << at);
        }
    }

    // Groups of lanes in 64 bits each: their bits together, and how many these are.
    struct Groups { U64 bits, width; };
    IRES_HD static Groups join(V code, V width) {
        if constexpr (sizeof(T) == 2) {
            const U c = bit_cast<U>(code), w = bit_cast<U>(width), low = w & 0xffffu;
            return join_pairs(bit_cast<U64>(U((c & 0xffffu) | (c >> 16) << low)), bit_cast<U64>(U(low + (w >> 16))));
        } else {
            return join_pairs(bit_cast<U64>(code), bit_cast<U64>(width));
        }
    }
    IRES_HD static Groups join_pairs(U64 c, U64 w) {
        const U64 low = w & 0xffffffffu;
        return {(c & 0xffffffffu) | (c >> 32) << low, low + (w >> 32)};
    }
    // The codes again, out of bits that others may follow.
    IRES_HD static V split(U64 bits, V width) {
        const U64 w = sums(width), low = w & 0xffffffffu;
        const U64 pairs = (bits & (((U64{} + 1) << low) - 1)) | (bits >> low) << 32;
        V codes;
        if constexpr (sizeof(T) == 2) {
            const U p = bit_cast<U>(pairs), first = bit_cast<U>(width) & 0xffffu;
            codes = bit_cast<V>(U((p & (((U{} + 1) << first) - 1)) | (p >> first) << 16));
        } else {
            codes = bit_cast<V>(pairs);
        }
        return codes & mask(width);
    }
    // Of two halves of a group the bits of each.
    IRES_HD static U64 sums(V width) {
        if constexpr (sizeof(T) == 2) {
            const U w = bit_cast<U>(width);
            return bit_cast<U64>(U((w & 0xffffu) + (w >> 16)));
        } else {
            return bit_cast<U64>(width);
        }
    }

    // The offset that takes the fewest bits for some of the elements.
    static int32_t offset(const T* old, const T* now, int64_t n) {
        constexpr int kMostSamples = 64;
        C from[kMostSamples], to[kMostSamples];
        int32_t exponent[kMostSamples], wanted[kMostSamples];
        int samples = 0, moved = 0;
        for (int64_t i = 0, step = (n - 1) / kMostSamples + 1; i < n; i += step, ++samples) {
            from[samples] = signed_place(old[i]), to[samples] = signed_place(now[i]);
            exponent[samples] = int32_t((now[i] & kMagnitude) >> kMantissa);
            const uint64_t d = uint64_t(std::abs(from[samples] - to[samples]));
            if (d != 0) wanted[moved++] = exponent[samples] + 65 - __builtin_clzll(d);
        }
        int32_t best = 1;
        if (moved == 0) return best;
        std::nth_element(wanted, wanted + moved * 7 / 10, wanted + moved);
        const int32_t middle = wanted[moved * 7 / 10];
        C least = cost(best, from, to, exponent, samples);
        for (int32_t offset = std::max(1, middle - 3); offset <= middle + 4; ++offset) {
            const C bits = cost(offset, from, to, exponent, samples);
            if (bits < least) least = bits, best = offset;
        }
        return best;
    }
    using C = std::conditional_t<sizeof(T) == 2, int32_t, int64_t>;
    static C signed_place(T bits) { return bits < 0 ? -C(bits & kMagnitude) : C(bits); }
    static C cost(int32_t offset, const C* from, const C* to, const int32_t* exponent, int n) {
        const C f = C(floor(offset));
        C bits = 0;
        for (int i = 0; i < n; ++i) {
            const C a = std::max<C>(std::abs(from[i]) - f, 0), b = std::max<C>(std::abs(to[i]) - f, 0);
            const C d = (from[i] < 0 ? -a : a) - (to[i] < 0 ? -b : b);
            const int width = std::min(std::max(offset - exponent[i], 1), kMost);
            const bool fits = from[i] == to[i] || (a > 0 && d != 0 && 2 * std::abs(d) < (C(1) << width) - 1);
            bits += width + (fits ? 0 : kBits);
        }
        return bits;
    }

    // Of n elements, with room for 2 sizeof(T) n + 64 bytes. Returns how many it takes.
    static int64_t pack(const T* old, const T* now, int64_t n, char* out) {
        PackHead head{kSame, 0, 0, uint32_t(n), sum_of(now, n * int64_t(sizeof(T)))};
        if (memcmp(old, now, size_t(n) * sizeof(T)) == 0) {
            memcpy(out, &head, sizeof head);
            return sizeof head;
        }
        static thread_local const std::unique_ptr<T[]> kept(new T[kBlockPacked]);
        head.offset = offset(old, now, n);
        const N shift = N(head.offset), low = floor(head.offset);
        char* to = out + sizeof head;
        uint64_t word = 0, filled = 0;
        int64_t i = 0;
        const auto step = [&](const T* a, const T* b) {
            alignas(64) uint64_t bits[kGroups], widths[kGroups];
            for (int v = 0; v < kTogether; v += kLanes) {
                const V was = load_raw<V>(a + v), is = load_raw<V>(b + v), at = place(is, low), d = place(was, low) - at;
                const V z = (d << 1) ^ sign(d), w = width(is, shift), all = mask(w), code = z & all;
                const V fails = bit_cast<V>((code != z) | (code == all) | (before(is, at, code, low) != was));
                const Groups groups = join(code | (all & fails), w);
                memcpy(bits + v / kGroup, &groups.bits, sizeof(V));
                memcpy(widths + v / kGroup, &groups.width, sizeof(V));
                for_set(fails, [&](int k) { kept[head.kept++] = a[v + k]; });
            }
            for (int g = 0; g < kGroups; ++g) {  // without branches, which nobody could predict
                const uint64_t next = filled + widths[g], rest = bits[g] >> 1 >> (63 - filled);
                word |= bits[g] << filled;
                memcpy(to, &word, 8);
                const uint64_t full = next / 64;  // 1 or 0
                word = (rest & (0 - full)) | (word & (full - 1));
                to += full * 8;
                filled = next % 64;
            }
        };
        for (; i + kTogether <= n; i += kTogether) step(old + i, now + i);
        if (i < n) {
            T a[kTogether] = {}, b[kTogether] = {};
            memcpy(a, old + i, size_t(n - i) * sizeof(T));
            memcpy(b, now + i, size_t(n - i) * sizeof(T));
            step(a, b);
        }
        const uint64_t last[2] = {word, 0};  // with one more, as two are read at a time
        memcpy(to, last, 16);
        to += 16;
        head.words = uint32_t((to - out - int64_t(sizeof head)) / 8);
        if (used(head) >= int64_t(sizeof head) + whole(n)) {
            head = {kPlain, 0, 0, head.n, head.sum};
            memcpy(out + sizeof head, old, size_t(n) * sizeof(T));
        } else {
            memcpy(to, kept.get(), head.kept * sizeof(T));
        }
        memcpy(out, &head, sizeof head);
        return used(head);
    }

    static int64_t whole(int64_t bytes_or_n) { return (bytes_or_n * int64_t(sizeof(T)) + 7) / 8 * 8; }
    static int64_t used(const PackHead& head) {
        if (head.offset == kSame) return sizeof head;
        return int64_t(sizeof head) + (head.offset == kPlain ? whole(head.n) : 8 * int64_t(head.words) + whole(head.kept));
    }

    // Makes old elements of new ones, in their place.
    static void unpack(const PackHead& head, const char* body, T* now) {
        const int64_t n = head.n;
        if (head.offset == kSame) return;
        if (head.offset == kPlain) {
            memcpy(now, body, size_t(n) * sizeof(T));
            return;
        }
        const N shift = N(head.offset), low = floor(head.offset);
        const char* kept = body + 8 * int64_t(head.words);
        uint64_t at = 0;
        const auto step = [&](T* b) {
            alignas(64) uint64_t bits[kGroups], counts[kGroups];
            for (int v = 0; v < kTogether; v += kLanes) {
                const U64 halves = sums(width(load_raw<V>(b + v), shift)), sum = (halves & 0xffffffffu) + (halves >> 32);
                memcpy(counts + v / kGroup, &sum, sizeof(V));
            }
            for (int g = 0; g < kGroups; ++g) {
                uint64_t two[2];
                memcpy(two, body + at / 64 * 8, 16);
                bits[g] = two[0] >> at % 64 | two[1] << 1 << (63 - at % 64);
                at += counts[g];
            }
            for (int v = 0; v < kTogether; v += kLanes) {
                const V is = load_raw<V>(b + v), w = width(is, shift), all = mask(w);
                const V code = split(load_raw<U64>(bits + v / kGroup), w), was = before(is, place(is, low), code, low);
                memcpy(b + v, &was, sizeof was);
                for_set(bit_cast<V>(code == all), [&](int k) {
                    memcpy(b + v + k, kept, sizeof(T));
                    kept += sizeof(T);
                });
            }
        };
        int64_t i = 0;
        for (; i + kTogether <= n; i += kTogether) step(now + i);
        if (i < n) {
            T b[kTogether] = {};
            memcpy(b, now + i, size_t(n - i) * sizeof(T));
            step(b);
            memcpy(now + i, b, size_t(n - i) * sizeof(T));
        }
    }
};

template <class T, int kMantissa> int64_t pack_all(const void* old, const void* now, int64_t n, char* out) {
    char* to = out;
    for (int64_t i = 0; i < n; i += kBlockPacked)
        to += Packing<T, kMantissa>::pack(static_cast<const T*>(old) + i, static_cast<const T*>(now) + i,
                                          std::min(kBlockPacked, n - i), to);
    return to - out;
}

// Calls `take` with the head of each block, what follows it, and where its elements begin, until one is false.
template <class T, int kMantissa, class Take> bool for_blocks(const char* record, const void* now, int64_t n, const Take& take) {
    T* at = static_cast<T*>(const_cast<void*>(now));
    for (T* const end = at + n; at < end;) {
        PackHead head;
        memcpy(&head, record, sizeof head);
        if (!take(head, record + sizeof head, at)) return false;
        record += Packing<T, kMantissa>::used(head);
        at += head.n;
    }
    return true;
}

template <class T, int kMantissa> void unpack_all(const char* record, void* now, int64_t n) {
    for_blocks<T, kMantissa>(record, now, n, [](const PackHead& head, const char* body, T* at) {
        Packing<T, kMantissa>::unpack(head, body, at);
        return true;
    });
}

template <class T, int kMantissa> bool fits_all(const char* record, const void* now, int64_t n) {
    return for_blocks<T, kMantissa>(record, now, n, [](const PackHead& head, const char*, const T* at) {
        return sum_of(at, int64_t(head.n) * int64_t(sizeof(T))) == head.sum;
    });
}

int64_t pack(DType type, const void* old, const void* now, int64_t n, char* out) {
    switch (type) {
        case DType::bf16: return pack_all<int16_t, 7>(old, now, n, out);
        case DType::f16: return pack_all<int16_t, 10>(old, now, n, out);
        case DType::f32: return pack_all<int32_t, 23>(old, now, n, out);
        default: return 0;
    }
}

void unpack(DType type, const char* record, void* now, int64_t n) {
    switch (type) {
        case DType::bf16: return unpack_all<int16_t, 7>(record, now, n);
        case DType::f16: return unpack_all<int16_t, 10>(record, now, n);
        case DType::f32: return unpack_all<int32_t, 23>(record, now, n);
        default: return;
    }
}

bool fits(DType type, const char* record, const void* now, int64_t n) {
    switch (type) {
        case DType::bf16: return fits_all<int16_t, 7>(record, now, n);
        case DType::f16: return fits_all<int16_t, 10>(record, now, n);
        case DType::f32: return fits_all<int32_t, 23>(record, now, n);
        default: return false;
    }
}

}  // namespace
}  // namespace IRES_ISA
}  // namespace ires
