// How two updates of one base fit together: what `Fit` of cpu.h counts, of a run of elements. Included by loops.cpp alone.
//
//   drift = target - base, update = instruct - base           in f64 (of f32 and less it is one rounding at most)
//   moved = stored(target + alpha * update) - target          the store as add_difference does it, in f32, to nearest
//
// Only elements count whose three values are finite. An ulp is a step of the type that the target is stored in: how many
// of its values lie from base to instruct, each rounded to it.
#pragma once

#include "encode.h"
#include "lanes.h"
#include "words.h"

namespace ires {
namespace IRES_ISA {
namespace {

// The values of T in their order, as integers: 0 for both zeros.
template <class T> IRES_HD I place_of(F x) {
    if constexpr (std::is_same_v<T, float>) {
        const I bits = bit_cast<I>(x), size = bits & 0x7fffffff;
        return bits < 0 ? -size : size;
    } else {
        constexpr int kBits = 8 * int(sizeof(T));
        const I bits = bit_cast<I>(nearest_bits<T>(x)), size = bits & ((1 << (kBits - 1)) - 1);
        return (bits & (1 << (kBits - 1))) != 0 ? -size : size;
    }
}

// kBlock elements of each, of which those behind the last are NaN and so count for nothing.
template <class T> void fit_block(const float* target, const float* instruct, const float* base, int64_t n, const float* alphas,
                                  int count, D* sums, D* moved, Fit* fit) {
    const F zero{};
    I elements{}, both{}, conflicts{}, within[kFitSteps] = {};
    for (int64_t j = 0; j < n; j += W) {
        const F t0 = load_raw<F>(target + j), x0 = load_raw<F>(instruct + j), y0 = load_raw<F>(base + j);
        const I measured = ((t0 - t0) + (x0 - x0) + (y0 - y0)) == zero;
        const F t = where(measured, t0), x = where(measured, x0), y = where(measured, y0);
        const F drift = t - y, update = x - y;
        elements -= measured;
        both -= (drift != zero) & (update != zero);
        conflicts -= ((drift < zero) & (update > zero)) | ((drift > zero) & (update < zero));

        const I from = place_of<T>(y), to = place_of<T>(x);
        const U steps = bit_cast<U>(from < to ? to - from : from - to);  // modulo 2^32, which is more than there are
        for (int k = 0; k < kFitSteps; ++k) within[k] -= measured & (steps <= uint32_t((1 << k) - 1));

        const D wide_t = __builtin_convertvector(t, D), wide_y = __builtin_convertvector(y, D);
        const D d = wide_t - wide_y, u = __builtin_convertvector(x, D) - wide_y;
        sums[0] += wide_y * wide_y;
        sums[1] += d * d;
        sums[2] += u * u;
        sums[3] += d * u;
        for (int a = 0; a < count; ++a) {
            const F stored = rounded<T>(t + alphas[a] * update);
            const I is = (stored - stored) == zero;
            moved[a] += (__builtin_convertvector(where(is, stored), D) - __builtin_convertvector(where(is, t), D)) * u;
        }
    }
    for (int i = 0; i < W; ++i) {
        fit->elements += uint64_t(elements[i]);
        fit->both += uint64_t(both[i]);
        fit->conflicts += uint64_t(conflicts[i]);
        for (int k = 0; k < kFitSteps; ++k) fit->within[k] += uint64_t(within[k][i]);
    }
}

template <class T> void fit_as(const FitRun& run, Fit* fit) {
    alignas(64) float x[3][kBlock];
    D sums[4] = {}, moved[kFitAlphas] = {};
    for (int64_t i = 0; i < run.n; i += kBlock) {
        const int64_t n = std::min(kBlock, run.n - i), whole = (n + W - 1) / W * W;
        for (int k = 0; k < 3; ++k) {
            const DType type = run.in_types[k];
            Blocks<float>::widen[int(type)](static_cast<const char*>(run.in[k]) + i * item_size(type), x[k], n);
            std::fill(x[k] + n, x[k] + whole, std::nanf(""));
        }
        fit_block<T>(x[0], x[1], x[2], whole, run.alphas, run.count, sums, moved, fit);
    }
    for (int i = 0; i < W; ++i) {
        fit->base += sums[0][i], fit->drift += sums[1][i], fit->update += sums[2][i], fit->cross += sums[3][i];
        for (int a = 0; a < run.count; ++a) fit->moved[a] += moved[a][i];
    }
}

void fit(const FitRun& run, Fit* fit) {
    switch (run.out_type) {
        case DType::f32: return fit_as<float>(run, fit);
        case DType::f16: return fit_as<f16_t>(run, fit);
        case DType::bf16: return fit_as<bf16_t>(run, fit);
        case DType::e4m3: return fit_as<e4m3_t>(run, fit);
        case DType::e5m2: return fit_as<e5m2_t>(run, fit);
        case DType::f64: break;  // refused by whoever calls
    }
}

}  // namespace
}  // namespace IRES_ISA
}  // namespace ires
