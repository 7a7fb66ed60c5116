// The conversions of csrc/arith.h against NVIDIA's own headers, whose functions run on a CPU too. Compiled and run by
// tests/backends/test_nvidia_oracle.py; `nvidia_oracle STRIDE` looks at every STRIDE-th f32 pattern (1: all of them), and always at
// those around which rounding turns: any high half, and a low half that is a power of two or next to one.
//
//   widen:    every 8- and 16-bit pattern, alone and in pairs as a GPU converts
//   nearest:  f32 into bf16, f16, e4m3fn (saturating) and e5m2 (overflowing; also from NVIDIA's saturating result, which is
//             what the GPU's instruction gives), alone and in pairs
//   double:   f64 around every 17 * STRIDE-th f32 pattern: the pattern and the neighbouring f64 on either side
//
// Prints the number of comparisons of each and the number of failures last.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "arith.h"

using namespace ires;

namespace {

uint64_t compared = 0, failures = 0;

void check(bool same, const char* what, uint64_t pattern, uint64_t got, uint64_t wanted) {
    ++compared;
    if (same) return;
    if (++failures <= 20)
        std::printf("%s of %#llx: got %#llx, wanted %#llx\n", what, (unsigned long long)pattern, (unsigned long long)got,
                    (unsigned long long)wanted);
}

bool same_float(float a, float b) { return (a != a && b != b) || bit_cast<uint32_t>(a) == bit_cast<uint32_t>(b); }

float nvidia_widen(bf16_t x) { return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{x.bits})); }
float nvidia_widen(f16_t x) { return __half2float(__half(__half_raw{x.bits})); }
float nvidia_widen(e4m3_t x) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E4M3))); }
float nvidia_widen(e5m2_t x) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.bits, __NV_E5M2))); }

template <class T> T nvidia_nearest(float x);
template <> bf16_t nvidia_nearest<bf16_t>(float x) { return {__nv_bfloat16_raw(__float2bfloat16_rn(x)).x}; }
template <> f16_t nvidia_nearest<f16_t>(float x) { return {__half_raw(__float2half_rn(x)).x}; }
template <> e4m3_t nvidia_nearest<e4m3_t>(float x) { return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)}; }
template <> e5m2_t nvidia_nearest<e5m2_t>(float x) { return {__nv_cvt_float_to_fp8(x, __NV_NOSAT, __NV_E5M2)}; }

template <class T> T nvidia_nearest(double x);
template <> bf16_t nvidia_nearest<bf16_t>(double x) { return {__nv_bfloat16_raw(__double2bfloat16(x)).x}; }
template <> f16_t nvidia_nearest<f16_t>(double x) { return {__half_raw(__double2half(x)).x}; }
template <> e4m3_t nvidia_nearest<e4m3_t>(double x) { return {__nv_cvt_double_to_fp8(x, __NV_SATFINITE, __NV_E4M3)}; }
template <> e5m2_t nvidia_nearest<e5m2_t>(double x) { return {__nv_cvt_double_to_fp8(x, __NV_NOSAT, __NV_E5M2)}; }

// Any NaN is as good as any other.
template <class T> bool same_code(uint32_t a, T b) {
    if (a == b.bits) return true;
    const float x = nvidia_widen(T{typename Format<T>::Bits(a)}), y = nvidia_widen(b);
    return x != x && y != y;
}

template <class T> void widen_all(const char* name) {
    compared = 0;
    constexpr uint32_t kCodes = 1u << (8 * sizeof(T));
    for (uint32_t code = 0; code < kCodes; ++code) {
        const T x{typename Format<T>::Bits(code)};
        const float wanted = nvidia_widen(x);
        const uint32_t other = (code * 40503u + 12345u) % kCodes;
        const Two pair = widen_two<T>(code | other << (8 * sizeof(T))), riap = widen_two<T>(other | code << (8 * sizeof(T)));
        for (const float got : {widen(x), pair.a, riap.b})
            check(same_float(got, wanted), name, code, bit_cast<uint32_t>(got), bit_cast<uint32_t>(wanted));
    }
    std::printf("widen %s %llu\n", name, (unsigned long long)compared);
}

// Calls f(pattern) for every stride-th pattern and for the critical ones.
template <class F> void for_patterns(uint64_t stride, const F& f) {
    for (uint64_t pattern = 0; pattern < (uint64_t(1) << 32); pattern += stride) f(uint32_t(pattern));
    if (stride == 1) return;
    for (uint32_t high = 0; high < 0x10000u; ++high)
        for (uint32_t bit = 1; bit < 0x10000u; bit *= 2)
            for (const uint32_t low : {bit - 1, bit, bit + 1, 0x10000u - bit}) f(high << 16 | (low & 0xffffu));
}

template <class T> void nearest_all(const char* name, uint64_t stride) {
    compared = 0;
    constexpr int kBits = 8 * sizeof(T);
    constexpr uint32_t kMask = (1u << kBits) - 1;
    float other = 1.0f;
    for_patterns(stride, [&](uint32_t pattern) {
        const float x = bit_cast<float>(pattern);
        const T wanted = nvidia_nearest<T>(x);
        const uint32_t pair = nearest_two<T>(x, other), riap = nearest_two<T>(other, x);
        for (const uint32_t got : {uint32_t(store_nearest<T>(x).bits), pair & kMask, riap >> kBits & kMask})
            check(same_code(got, wanted), name, pattern, got, wanted.bits);
        if constexpr (kBits == 8 && Format<T>::kSig == 2) {
            const uint32_t got = unsaturated(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2), x);
            check(same_code(got, wanted), name, pattern, got, wanted.bits);
        }
        other = x;
    });
    std::printf("nearest %s %llu\n", name, (unsigned long long)compared);
}

template <class T> void double_all(const char* name, uint64_t stride) {
    compared = 0;
    for_patterns(stride, [&](uint32_t pattern) {
        const double middle = bit_cast<float>(pattern);
        for (const double x : {middle, std::nextafter(middle, -INFINITY), std::nextafter(middle, INFINITY)}) {
            const T wanted = nvidia_nearest<T>(x);
            const uint32_t got = store_nearest<T>(x).bits;
            check(same_code(got, wanted), name, bit_cast<uint64_t>(x), got, wanted.bits);
        }
    });
    std::printf("double %s %llu\n", name, (unsigned long long)compared);
}

template <class T> void all(const char* name, uint64_t stride) {
    widen_all<T>(name);
    nearest_all<T>(name, stride);
    double_all<T>(name, 17 * stride);
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t stride = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
    all<bf16_t>("bf16", stride);
    all<f16_t>("f16", stride);
    all<e4m3_t>("e4m3fn", stride);
    all<e5m2_t>("e5m2", stride);
    std::printf("failures %llu\n", (unsigned long long)failures);
    return failures != 0;
}
