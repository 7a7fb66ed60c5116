// Vectors of one instruction set: loads that widen, stores that round. Included by loops.cpp alone, once per instruction set.
//
// Vectors are the compiler's own (`vector_size`), so one source serves AVX-512, AVX2, SSE and NEON; only the f16
// conversions need intrinsics. A pair of vectors holds 2W consecutive elements in one of two orders:
//   halves:   0 .. W-1 | W .. 2W-1
//   even_odd: 0, 2, .. | 1, 3, ..    two bf16 in one u32 lane widen by a shift and a mask: no shuffle, no pack
#pragma once

#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "arith.h"

#ifndef IRES_ISA
#define IRES_ISA portable
#endif

namespace ires {

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define IRES_LANES 16
#elif defined(__AVX2__)
#define IRES_LANES 8
#else
#define IRES_LANES 4
#endif

namespace IRES_ISA {
namespace {

constexpr int W = IRES_LANES;  // f32 lanes of a vector
typedef float F __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint64_t U64 __attribute__((vector_size(4 * W)));
typedef uint16_t U16 __attribute__((vector_size(2 * W)));
typedef uint16_t U16x2 __attribute__((vector_size(4 * W)));
typedef int16_t S16x2 __attribute__((vector_size(4 * W)));
typedef uint8_t U8 __attribute__((vector_size(W)));
typedef int8_t S8x2 __attribute__((vector_size(2 * W)));

enum class Order { halves, even_odd };

constexpr int64_t kPrefetch = 1024;  // bytes ahead: worth 10-20 % where memory is the bound

}  // namespace
}  // namespace IRES_ISA

template <> struct BitsOf<IRES_ISA::F> { using type = IRES_ISA::U; };
template <> struct Lanes<IRES_ISA::U> {
    using Float = IRES_ISA::F;
    using U = IRES_ISA::U;
    using I = IRES_ISA::I;
    IRES_HD static U less(U x, U y) { return bit_cast<U>(bit_cast<I>(x) < bit_cast<I>(y)); }
    IRES_HD static U is_nan(Float x) { return bit_cast<U>(x != x); }
#if IRES_LANES == 16
    IRES_HD static U select(U mask, U yes, U no) { return bit_cast<I>(mask) != 0 ? yes : no; }
#else
    IRES_HD static U select(U mask, U yes, U no) { return (mask & yes) | (~mask & no); }
#endif
};

namespace IRES_ISA {
namespace {

template <class V> IRES_HD V load_raw(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

// ---------------------------------------------------------------------------------------------------------------------
// W elements <-> one vector of f32. gcc takes vectors narrower than 16 bytes apart, so SSE widens by intrinsics.
#if IRES_LANES == 4 && defined(__SSE4_1__)
IRES_HD U extend16(const void* p) { return bit_cast<U>(_mm_cvtepu16_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)))); }
IRES_HD S16x2 extend8(S8x2 v) { return bit_cast<S16x2>(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&v)))); }
#else
IRES_HD U extend16(const void* p) { return __builtin_convertvector(load_raw<U16>(p), U); }
#if IRES_LANES == 8  // gcc takes the vector in two
IRES_HD S16x2 extend8(S8x2 v) { return bit_cast<S16x2>(_mm256_cvtepi8_epi16(bit_cast<__m128i>(v))); }
#else
IRES_HD S16x2 extend8(S8x2 v) { return __builtin_convertvector(v, S16x2); }
#endif
#endif

template <class T> IRES_HD F load(const T* p) {
    static_assert(sizeof(T) == 2, "pairs of vectors are loaded of f8");
    return widen_bits<T>(extend16(p));
}
// The low bits of each lane.
template <class T> IRES_HD void store_low(T* p, U lanes) {
    using Narrow = std::conditional_t<sizeof(T) == 2, U16, U8>;
    const Narrow bits = __builtin_convertvector(lanes, Narrow);
    memcpy(static_cast<void*>(p), &bits, sizeof bits);
}
template <class T> IRES_HD void store(T* p, F x) { store_low(p, nearest_bits<T>(x)); }
// The value a store of x leaves behind, widened again.
template <class T> IRES_HD F rounded(F x) { return widen_bits<T>(nearest_bits<T>(x)); }

template <> IRES_HD F load<float>(const float* p) { return load_raw<F>(p); }
template <> IRES_HD void store<float>(float* p, F x) { memcpy(p, &x, sizeof x); }
template <> IRES_HD F rounded<float>(F x) { return x; }

#if IRES_LANES == 16
#define IRES_F16_WIDEN(p) bit_cast<F>(_mm512_cvtph_ps(load_raw<__m256i>(p)))
#define IRES_F16_BITS(x) _mm512_cvtps_ph(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#elif IRES_LANES == 8 && defined(__F16C__)
#define IRES_F16_WIDEN(p) bit_cast<F>(_mm256_cvtph_ps(load_raw<__m128i>(p)))
#define IRES_F16_BITS(x) _mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#elif defined(__aarch64__)
#define IRES_F16_WIDEN(p) bit_cast<F>(vcvt_f32_f16(load_raw<float16x4_t>(p)))
#define IRES_F16_BITS(x) vcvt_f16_f32(bit_cast<float32x4_t>(x))
#endif
#if defined(IRES_F16_WIDEN)
template <> IRES_HD F load<f16_t>(const f16_t* p) { return IRES_F16_WIDEN(p); }
template <> IRES_HD void store<f16_t>(f16_t* p, F x) {
    const auto bits = IRES_F16_BITS(x);
    memcpy(static_cast<void*>(p), &bits, sizeof bits);
}
template <> IRES_HD F rounded<f16_t>(F x) {
    const auto bits = IRES_F16_BITS(x);
    return IRES_F16_WIDEN(&bits);
}
#endif

// 2W elements <-> a pair of vectors.
struct Pair { F a, b; };

template <int... I> IRES_HD S8x2 evens_first(S8x2 v, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(v, v, (2 * I % (2 * W) + I / W)...);
#else
    return __builtin_shuffle(v, S8x2{int8_t(2 * I % (2 * W) + I / W)...});
#endif
}

// An f8 is the head of an f16: e5m2 exactly, e4m3fn but for a factor of 2^8 in the exponent's bias and for its NaN, whose
// exponent is not all ones there. The f16 conversion then takes the subnormals in its stride.
template <Order order, class T> IRES_HD Pair load_f8(const T* p) {
    S8x2 bytes = load_raw<S8x2>(p);
    if constexpr (order == Order::even_odd) bytes = evens_first(bytes, std::make_integer_sequence<int, 2 * W>{});
    const S16x2 w = extend8(bytes);
    S16x2 h = w << 8;
    if constexpr (Format<T>::kSig == 3) h = ((w << 7) & int16_t(0xbfff)) | (((w & 0x7f) == 0x7f) & 0x7c00);
    const f16_t* halves = reinterpret_cast<const f16_t*>(&h);
    const float scale = Format<T>::kSig == 3 ? 256.0f : 1.0f;
    return {load(halves) * scale, load(halves + W) * scale};
}

template <Order order, class T> IRES_HD Pair load_pair(const T* p) {
    if constexpr (sizeof(T) == 1) {
        return load_f8<order>(p);
    } else if constexpr (order == Order::halves) {
        return {load(p), load(p + W)};
    } else {
        static_assert(sizeof(T) == 2 && Format<T>::kSig == 7, "even_odd is for bf16");
        const U w = load_raw<U>(p);
        return {bit_cast<F>(U(w << 16)), bit_cast<F>(U(w & 0xffff0000u))};
    }
}

// Returns what was stored, widened, for the tally; the compiler drops it where nobody looks.
template <Order order, class T> IRES_HD Pair store_pair(T* p, Pair x) {
    if constexpr (order == Order::halves) {
        store(p, x.a);
        store(p + W, x.b);
        return {rounded<T>(x.a), rounded<T>(x.b)};
    } else {
        static_assert(sizeof(T) == 2 && Format<T>::kSig == 7, "only bf16 is stored even_odd");
        const U a = nearest_bf16_high(x.a), b = nearest_bf16_high(x.b) & 0xffff0000u;
        const U w = (a >> 16) | b;
        memcpy(p, &w, sizeof w);
        return {bit_cast<F>(U(a & 0xffff0000u)), bit_cast<F>(b)};
    }
}

// The same, stochastic: a word for each lane, those of a then those of b.
template <Order order, class T> IRES_HD Pair store_pair_stochastic(T* p, Pair x, const uint32_t* words) {
    const U a = stochastic_bits<T>(x.a, load_raw<U>(words)), b = stochastic_bits<T>(x.b, load_raw<U>(words + W));
    if constexpr (order == Order::halves) {
        store_low(p, a);
        store_low(p + W, b);
    } else {
        const U w = a | (b << 16);
        memcpy(static_cast<void*>(p), &w, sizeof w);
    }
    return {widen_bits<T>(a), widen_bits<T>(b)};
}

template <class T> IRES_HD void prefetch(const T* p, int64_t elements) {
    const char* bytes = reinterpret_cast<const char*>(p) + kPrefetch;
    for (int64_t b = 0; b < elements * int64_t(sizeof(T)); b += 64) __builtin_prefetch(bytes + b);
}

}  // namespace
}  // namespace IRES_ISA
}  // namespace ires
