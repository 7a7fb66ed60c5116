// The numerics contract in code: storage types <-> compute type C, rounding, Philox, one functor per operation.
//
//   C is float, or double when any operand or the output is f64. Every arithmetic step is one IEEE-754 operation in C,
//   round to nearest even, never contracted; the result is rounded once more, into the storage type. See docs/numerics.md.
//
// Host and device share this file. Host code must be compiled with -ffp-contract=off; device code uses the _rn
// intrinsics, which are never contracted, and the GPU's own conversions, which give the same bits. All conversions are
// branch-free so that host compilers vectorise them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define IRES_HD __host__ __device__ __forceinline__
#define IRES_UNROLL _Pragma("unroll")
#define IRES_ROLLED _Pragma("unroll 1")
#else
#define IRES_HD inline __attribute__((always_inline))
#define IRES_UNROLL
#define IRES_ROLLED
#endif

namespace ires {

// The order is part of the Python binding (backends/native.py).
enum class DType : int { f64, f32, f16, bf16, e4m3, e5m2 };
enum class OpCode : int { subtract, add, scale, add_difference };
constexpr int kDTypes = 6;

// Storage types with no C++ arithmetic of their own.
struct f16_t { uint16_t bits; };
struct bf16_t { uint16_t bits; };
struct e4m3_t { uint8_t bits; };   // f8_e4m3fn: no infinity, S.1111.111 is NaN
struct e5m2_t { uint8_t bits; };

template <class T> IRES_HD uint32_t storage_bits(T x) { return x.bits; }

template <class To, class From>
IRES_HD To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <> IRES_HD uint32_t storage_bits<float>(float x) { return bit_cast<uint32_t>(x); }

// ---------------------------------------------------------------------------------------------------------------------
// One IEEE operation each. On the host V may be a scalar or a compiler vector.
#if defined(__CUDA_ARCH__)
IRES_HD float sub(float a, float b) { return __fsub_rn(a, b); }
IRES_HD float add(float a, float b) { return __fadd_rn(a, b); }
IRES_HD float mul(float a, float b) { return __fmul_rn(a, b); }
IRES_HD double sub(double a, double b) { return __dsub_rn(a, b); }
IRES_HD double add(double a, double b) { return __dadd_rn(a, b); }
IRES_HD double mul(double a, double b) { return __dmul_rn(a, b); }
#else
template <class V> IRES_HD V sub(V a, V b) { return a - b; }
template <class V> IRES_HD V add(V a, V b) { return a + b; }
template <class V> IRES_HD V mul(V a, V b) { return a * b; }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Storage formats. kSig: stored significand bits. kMinExp: exponent of the smallest normal. kMax: bits of the largest
// finite magnitude. kInf: bits an infinity is stored as. kNaN: bits of our NaN. kOverflow: the least f32 magnitude
// that rounding to nearest does not keep finite (as bits; e4m3fn saturates there).
template <class T> struct Format;
template <> struct Format<float> {
    using Bits = uint32_t;
    static constexpr int kSig = 23, kMinExp = -126;
    static constexpr uint32_t kMax = 0x7f7fffff, kInf = 0x7f800000, kNaN = 0x7fc00000;
};
template <> struct Format<bf16_t> {
    using Bits = uint16_t;
    static constexpr int kSig = 7, kMinExp = -126;
    static constexpr uint32_t kMax = 0x7f7f, kInf = 0x7f80, kNaN = 0x7fc0, kOverflow = 0x7f7f8000;
};
template <> struct Format<f16_t> {
    using Bits = uint16_t;
    static constexpr int kSig = 10, kMinExp = -14;
    static constexpr uint32_t kMax = 0x7bff, kInf = 0x7c00, kNaN = 0x7e00, kOverflow = 0x477ff000;   // 65520
};
template <> struct Format<e5m2_t> {
    using Bits = uint8_t;
    static constexpr int kSig = 2, kMinExp = -14;
    static constexpr uint32_t kMax = 0x7b, kInf = 0x7c, kNaN = 0x7f, kOverflow = 0x47700000;          // 61440
};
template <> struct Format<e4m3_t> {
    using Bits = uint8_t;
    static constexpr int kSig = 3, kMinExp = -6;
    static constexpr uint32_t kMax = 0x7e, kInf = 0x7e, kNaN = 0x7f, kOverflow = 0x43e80001;          // above 464
};

// ---------------------------------------------------------------------------------------------------------------------
// Widening: exact. Lanes hold storage bits in the low end of a u32; U is uint32_t or, on the host, a compiler vector of
// them, and F the float type beside it. Subnormals go through an addition at a fixed exponent rather than a
// multiplication of an f32 subnormal, which costs an assist on many CPUs.
// Lanes<U> says which float type lies beside U and how to compare: a mask is all ones or zero. `less` is for lanes below
// 2^31, compared as signed, because older instruction sets compare no other way.
template <class U> struct Lanes;
template <> struct Lanes<uint32_t> {
    using Float = float;
    IRES_HD static uint32_t less(uint32_t x, uint32_t y) { return int32_t(x) < int32_t(y) ? ~0u : 0u; }
    IRES_HD static uint32_t is_nan(float x) { return x != x ? ~0u : 0u; }
    IRES_HD static uint32_t select(uint32_t mask, uint32_t yes, uint32_t no) { return mask ? yes : no; }
};
template <class F> struct BitsOf;
template <> struct BitsOf<float> { using type = uint32_t; };
template <class U> IRES_HD U splat(uint32_t x) { return U{} + x; }

template <class T, class U>
IRES_HD typename Lanes<U>::Float widen_bits(U bits) {
    using F = typename Lanes<U>::Float;
    if constexpr (Format<T>::kSig == 7) {  // bf16
        return bit_cast<F>(U(bits << 16));
    } else {
        constexpr int kBits = 8 * sizeof(typename Format<T>::Bits), kSig = Format<T>::kSig, kMinExp = Format<T>::kMinExp;
        constexpr uint32_t kFirstSpecial = Format<T>::kMax + 1;
        constexpr uint32_t kOne = uint32_t(127 + kMinExp) << 23;  // 2^kMinExp
        const U sign = (bits >> (kBits - 1)) << 31, magnitude = bits & ((1u << (kBits - 1)) - 1u);
        const U shifted = magnitude << (23 - kSig);
        const U normal = shifted + (uint32_t(126 + kMinExp) << 23);
        const U subnormal = bit_cast<U>(F(bit_cast<F>(U(shifted + kOne)) - bit_cast<float>(kOne)));
        const U finite = Lanes<U>::select(Lanes<U>::less(magnitude, splat<U>(1u << kSig)), subnormal, normal);
        const U special = ~Lanes<U>::less(magnitude, splat<U>(kFirstSpecial)) & 0x7f800000u;
        return bit_cast<F>(U(finite | special | sign));
    }
}

// Two neighbours at once, the way a GPU converts: the first one's storage bits in the low half of 2 * width bits.
struct Two { float a, b; };

IRES_HD Two widen_two_f16(uint32_t halves) {
#if defined(__CUDA_ARCH__)
    Two x;
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(x.a), "=f"(x.b)
        : "r"(halves));
    return x;
#else
    return {widen_bits<f16_t>(halves & 0xffffu), widen_bits<f16_t>(halves >> 16)};
#endif
}

template <class T> IRES_HD Two widen_two(uint32_t bits) {
    if constexpr (Format<T>::kSig == 7) {  // bf16
        return {bit_cast<float>(bits << 16), bit_cast<float>(bits & 0xffff0000u)};
    } else if constexpr (Format<T>::kSig == 10) {
        return widen_two_f16(bits);
    } else {
        // An f8 is the head of an f16: e5m2 exactly; e4m3fn but for a factor of 2^8 in the exponent's bias and for its NaN,
        // whose exponent is not all ones there.
        const uint32_t heads = (bits & 0xffu) << 8 | (bits & 0xff00u) << 16;
        if constexpr (Format<T>::kSig == 2) return widen_two_f16(heads);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
        uint32_t halves;
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(bits)));
        return widen_two_f16(halves);
#else
        const uint32_t nan = ((heads & 0x7f007f00u) + 0x01000100u) & 0x80008000u;
        const Two x = widen_two_f16((heads & 0x80008000u) | ((heads >> 1) & 0x3f803f80u) | nan >> 1);
        return {mul(x.a, 256.0f), mul(x.b, 256.0f)};
#endif
    }
}

IRES_HD float widen(float x) { return x; }
IRES_HD double widen(double x) { return x; }
template <class T> IRES_HD float widen(T x) {
#if defined(__CUDA_ARCH__)
    return widen_two<T>(x.bits).a;
#else
    return widen_bits<T>(uint32_t(x.bits));
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// The store, nearest: one rounding, ties to even.

// The bits of x rounded to bf16, left in the high half; the low half is not cleared.
template <class F>
IRES_HD typename BitsOf<F>::type nearest_bf16_high(F x) {
    using U = typename BitsOf<F>::type;
    const U b = bit_cast<U>(x);
    const U rounded = b + 0x7fffu + ((b >> 16) & 1u);
    return rounded | (Lanes<U>::is_nan(x) & 0x7fc00000u);
}

// Storage bits of x in the low end of a u32. f16, e5m2, e4m3fn: below the smallest normal, the rounding is done by one
// f32 addition whose ulp is the target's smallest subnormal.
template <class T, class F>
IRES_HD typename BitsOf<F>::type nearest_bits(F x) {
    using U = typename BitsOf<F>::type;
    if constexpr (Format<T>::kSig == 7) {  // bf16
        return nearest_bf16_high(x) >> 16;
    } else {
        constexpr int kSig = Format<T>::kSig, kMinExp = Format<T>::kMinExp, kDrop = 23 - kSig;
        constexpr uint32_t kSignShift = 32 - 8 * sizeof(typename Format<T>::Bits);
        constexpr uint32_t kMagic = uint32_t(127 + kMinExp - kSig + 23) << 23;
        const U b = bit_cast<U>(x), m = b & 0x7fffffffu;
        const U half_less_one_ulp = ((m >> kDrop) & 1u) + ((1u << (kDrop - 1)) - 1u);
        const U normal = ((m + half_less_one_ulp) >> kDrop) - (uint32_t(126 + kMinExp) << kSig);
        const U subnormal = bit_cast<U>(F(bit_cast<F>(m) + bit_cast<float>(kMagic))) - kMagic;
        U out = Lanes<U>::select(Lanes<U>::less(m, splat<U>(uint32_t(127 + kMinExp) << 23)), subnormal, normal);
        out = Lanes<U>::select(Lanes<U>::less(m, splat<U>(Format<T>::kOverflow)), out, splat<U>(Format<T>::kInf));
        out |= Lanes<U>::is_nan(x) & Format<T>::kNaN;
        return out | ((b & 0x80000000u) >> kSignShift);
    }
}

// f64 -> f32, rounded to odd: a later rounding of the result to 22 bits or fewer is then the one rounding of x.
// (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008.)
IRES_HD float narrow_to_odd(double x) {
    const float y = float(x);
    uint32_t b = bit_cast<uint32_t>(y);
    const double back = double(y), ax = x < 0 ? -x : x, ab = back < 0 ? -back : back;
    b = ab > ax ? b - 1 : b;             // truncate: also inf -> the largest finite f32
    b = back != x && x == x ? b | 1u : b;
    return bit_cast<float>(b);
}

// An e5m2 that was rounded by an instruction which saturates, as f32 x to nearest: ours overflows.
IRES_HD uint32_t unsaturated(uint32_t bits, float x) {
    const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7fffffffu;
    const bool over = magnitude >= Format<e5m2_t>::kOverflow && magnitude <= 0x7f800000u;
    return over ? (bits & 0x80u) | Format<e5m2_t>::kInf : bits;
}

// Two neighbours at once, as widen_two takes them.
template <class T> IRES_HD uint32_t nearest_two(float a, float b) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == 2) {
        uint32_t bits;
        if constexpr (Format<T>::kSig == 7) asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(bits) : "f"(a), "f"(b));
        else asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(bits) : "f"(a), "f"(b));
        return bits;
    }
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    if constexpr (sizeof(T) == 1) {
        uint16_t bits;
        if constexpr (Format<T>::kSig == 3) asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(bits) : "f"(a), "f"(b));
        else asm("cvt.rn.satfinite.e5m2x2.f32 %0, %2, %1;" : "=h"(bits) : "f"(a), "f"(b));
        if constexpr (Format<T>::kSig == 3) return bits;
        else return unsaturated(bits & 0xffu, a) | unsaturated(bits >> 8, b) << 8;
    }
#endif
    return nearest_bits<T>(a) | nearest_bits<T>(b) << (8 * sizeof(T));
}

template <class T> IRES_HD T store_nearest(float x) {
#if defined(__CUDA_ARCH__)
    return T{typename Format<T>::Bits(nearest_two<T>(x, 0.0f))};
#else
    return T{typename Format<T>::Bits(nearest_bits<T>(x))};
#endif
}
template <> IRES_HD float store_nearest<float>(float x) { return x; }
template <class T> IRES_HD T store_nearest(double x) { return store_nearest<T>(narrow_to_odd(x)); }
template <> IRES_HD float store_nearest<float>(double x) { return float(x); }
template <> IRES_HD double store_nearest<double>(double x) { return x; }

// ---------------------------------------------------------------------------------------------------------------------
// The store, stochastic. The significand is aligned so that the bits the store drops form a 32-bit fraction; the
// element's random word is added to it and the carry, if any, goes into the kept bits. A finite value never becomes
// infinite: it stays at the largest finite one.
//
// Lanes as above; Wide is what holds the significand: U itself for f32, uint64_t for f64. `under` and `over` say how far
// the exponent lies below or above that of the target's smallest normal.
template <class Wide, class U> IRES_HD Wide shift_right(Wide x, U by, uint32_t bits) {
    return by < bits ? Wide(x >> (by & (bits - 1u))) : Wide(x & 0u);
}

template <class T, int kSigC, class Wide, class U>
IRES_HD U round_significand(Wide significand, U under, U over, U word) {
    using F = Format<T>;
    constexpr uint32_t kBits = kSigC > 32 ? 64 : 32;
    const U drop = under + uint32_t(kSigC - F::kSig);
    const U fraction = drop > 32u ? U(shift_right(significand, U(drop - 32u), kBits)) : U(U(significand) << ((32u - drop) & 31u));
    const U carry = U(fraction + word) < fraction ? (word & 0u) + 1u : word & 0u;
    // A normal's implicit bit sits in the kept part and adds the last one to the exponent.
    const U out = (over << F::kSig) + U(shift_right(significand, drop, kBits)) + carry;
    return out > F::kMax ? (out & 0u) + F::kMax : out;
}

// Storage bits of x in the low end of a u32.
template <class T, class F>
IRES_HD typename BitsOf<F>::type stochastic_bits(F x, typename BitsOf<F>::type word) {
    using U = typename BitsOf<F>::type;
    constexpr uint32_t kSignShift = 32 - 8 * sizeof(typename Format<T>::Bits);
    const U b = bit_cast<U>(x), m = b & 0x7fffffffu;
    U out;
    if constexpr (Format<T>::kSig == 7) {  // bf16 has f32's exponents: the bits as they are
        out = (m + (word >> 16)) >> 16;
        out = out > 0x7f7fu ? (out & 0u) + 0x7f7fu : out;
    } else {
        constexpr uint32_t kMinField = uint32_t(127 + Format<T>::kMinExp);
        const U field = m >> 23, zero = m & 0u;
        const U significand = (m & 0x7fffffu) | (field != 0u ? zero + 0x800000u : zero);
        const U f = field != 0u ? field : zero + 1u;
        const U under = f < kMinField ? U(kMinField - f) : zero, over = f > kMinField ? U(f - kMinField) : zero;
        out = round_significand<T, 23>(significand, under, over, word);
    }
    out = m == 0x7f800000u ? (out & 0u) + Format<T>::kInf : out;
    out = m > 0x7f800000u ? (out & 0u) + Format<T>::kNaN : out;
    return out | ((b & 0x80000000u) >> kSignShift);
}

template <class T> IRES_HD T store_stochastic(float x, uint32_t word) {
    return T{typename Format<T>::Bits(stochastic_bits<T>(x, word))};
}
template <> IRES_HD float store_stochastic<float>(float x, uint32_t) { return x; }

template <class T> IRES_HD T store_stochastic(double x, uint32_t word) {
    using Bits = typename Format<T>::Bits;
    constexpr int kMinExp = Format<T>::kMinExp;
    const uint64_t b = bit_cast<uint64_t>(x), m = b & 0x7fffffffffffffffull;
    const int field = int(m >> 52);
    const uint64_t significand = (m & 0xfffffffffffffull) | (field ? 0x10000000000000ull : 0ull);
    int exponent = field ? field - 1023 : -1022;
    exponent = exponent > 128 ? 128 : exponent;  // beyond every target; keeps `over` inside its bits
    const uint32_t under = exponent < kMinExp ? uint32_t(kMinExp - exponent) : 0u;
    const uint32_t over = exponent > kMinExp ? uint32_t(exponent - kMinExp) : 0u;
    uint32_t out = round_significand<T, 52>(significand, under, over, word);
    out = m == 0x7ff0000000000000ull ? Format<T>::kInf : out;
    out = m > 0x7ff0000000000000ull ? Format<T>::kNaN : out;
    return bit_cast<T>(Bits(out | uint32_t(b >> 63) << (8 * sizeof(Bits) - 1)));
}
template <> IRES_HD double store_stochastic<double>(double x, uint32_t) { return x; }

// ---------------------------------------------------------------------------------------------------------------------
// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments

struct Words { uint32_t w[4]; };

IRES_HD Words philox(uint64_t seed, uint64_t stream, uint64_t block) {
    uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32), c2 = uint32_t(stream), c3 = uint32_t(stream >> 32);
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    IRES_UNROLL
    for (int round = 0; round < 10; ++round) {
#if defined(__CUDA_ARCH__)  // nvcc makes more of the 64-bit product than one instruction
        const uint64_t p0 = uint64_t(__umulhi(kPhiloxM0, c0)) << 32 | kPhiloxM0 * c0;
        const uint64_t p1 = uint64_t(__umulhi(kPhiloxM1, c2)) << 32 | kPhiloxM1 * c2;
#else
        const uint64_t p0 = uint64_t(kPhiloxM0) * c0, p1 = uint64_t(kPhiloxM1) * c2;
#endif
        const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c1 = uint32_t(p1);
        c3 = uint32_t(p0);
        c0 = n0;
        c2 = n2;
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
    return Words{{c0, c1, c2, c3}};
}

// ---------------------------------------------------------------------------------------------------------------------
// The operations. `update` is D of the report: what the operation adds to its first operand. Adding several residuals
// is AddOne applied to each in turn, several differences AddDifference.
struct Subtract {  // a - b
    static constexpr OpCode kCode = OpCode::subtract;
    static constexpr int kInputs = 2;
    template <class V> IRES_HD static V update(V, const V* in) { return sub(in[0], in[1]); }
    template <class V> IRES_HD static V result(const V*, V update) { return update; }
};
struct AddOne {  // t + alpha * r
    static constexpr OpCode kCode = OpCode::add;
    static constexpr int kInputs = 2;
    template <class V> IRES_HD static V update(V alpha, const V* in) { return mul(alpha, in[1]); }
    template <class V> IRES_HD static V result(const V* in, V update) { return add(in[0], update); }
};
struct Scale {  // s * t
    static constexpr OpCode kCode = OpCode::scale;
    static constexpr int kInputs = 1;
    template <class V> IRES_HD static V update(V s, const V* in) { return mul(s, in[0]); }
    template <class V> IRES_HD static V result(const V*, V update) { return update; }
};
struct AddDifference {  // t + alpha * (x - y)
    static constexpr OpCode kCode = OpCode::add_difference;
    static constexpr int kInputs = 3;
    template <class V> IRES_HD static V update(V alpha, const V* in) { return mul(alpha, sub(in[1], in[2])); }
    template <class V> IRES_HD static V result(const V* in, V update) { return add(in[0], update); }
};

}  // namespace ires
