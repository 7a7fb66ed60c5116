// How two updates of one base fit together: what `Fit` of cpu.h counts, of a run of elements. Included by loops.cpp alone.
//
//   drift = target - base, update = instruct - base       each one operation in f32, as of add_difference
//   moved = stored(target + alpha * update) - target      stored to nearest
// Products and sums of them are f64.
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

// The values of T in their order, as integers: 0 for both zeros. kExact: x is one of them.
template <class T, bool kExact> IRES_HD I place_of(F x) {
    constexpr uint32_t kSign = uint32_t(1) << (8 * sizeof(T) - 1);
    I bits;
    if constexpr (std::is_same_v<T, float>) bits = bit_cast<I>(x);
    else if constexpr (std::is_same_v<T, bf16_t> && kExact) bits = bit_cast<I>(x) >> 16;
    else bits = bit_cast<I>(nearest_bits<T>(x));
    const I size = bits & int32_t(kSign - 1);
    return (bits & int32_t(kSign)) != 0 ? -size : size;
}

// How many elements have the levels 0 .. kFitSteps - 1: in each lane fields of 4 bits, which are emptied in time.
struct Levels {
    static constexpr int kMost = 15;
    U fields{}, counts[kFitSteps] = {};
    int used = 0;

    IRES_HD void add(I level) {
        const U one = U{} + 1u;
        fields += level < kFitSteps ? one << bit_cast<U>(4 * (level & (kFitSteps - 1))) : U{};
        if (++used == kMost) empty();
    }
    IRES_HD void empty() {
        for (int k = 0; k < kFitSteps; ++k) counts[k] += (fields >> uint32_t(4 * k)) & 15u;
        fields = U{};
        used = 0;
    }
    void add_to(Fit* fit) {
        empty();
        uint64_t sum = 0;
        for (int k = 0; k < kFitSteps; ++k) {
            for (int i = 0; i < W; ++i) sum += counts[k][i];
            fit->within[k] += sum;
        }
    }
};

// A vector in f64, in two halves that a register holds each: as one vector of twice that size it took 15 % longer on AVX2.
typedef float Half __attribute__((vector_size(2 * W)));
typedef double Wide __attribute__((vector_size(4 * W)));
struct Halves { Wide a, b; };
IRES_HD Halves wide(F x) {
    Half h[2];
    memcpy(h, &x, sizeof x);
    return {__builtin_convertvector(h[0], Wide), __builtin_convertvector(h[1], Wide)};
}
IRES_HD void add_products(Wide& sum, const Halves& x, const Halves& y) {
    sum += x.a * y.a;
    sum += x.b * y.b;
}

struct FitSums {
    Wide base{}, drift{}, update{}, cross{}, moved[kFitAlphas] = {};
};

// n is a multiple of W. What is NaN counts for nothing.
template <class T, class In> void fit_block(const In* target, const In* instruct, const In* base, int64_t n, const float* alphas,
                                            int count, FitSums* total, Fit* fit) {
    FitSums sums = *total;  // in registers
    constexpr bool kExact = std::is_same_v<T, In>;
    const F zero{};
    I elements{}, both{}, conflicts{};
    Levels levels;
    for (int64_t j = 0; j < n; j += W) {
        const F t0 = load(target + j), x0 = load(instruct + j), y0 = load(base + j);
        const I measured = ((t0 - t0) + (x0 - x0) + (y0 - y0)) == zero;
        const F t = where(measured, t0), x = where(measured, x0), y = where(measured, y0);
        const F drift = t - y, update = x - y;
        const I changed = (drift != zero) & (update != zero);
        elements -= measured;
        both -= changed;
        conflicts -= changed & ((bit_cast<I>(drift) ^ bit_cast<I>(update)) < 0);

        // The bit length of the steps, from the exponent of their f32; more than 2^31 of them are negative here.
        const I from = place_of<T, kExact>(y), to = place_of<T, kExact>(x), steps = from < to ? to - from : from - to;
        const I length = (bit_cast<I>(__builtin_convertvector(steps, F)) >> 23) - 126;
        levels.add((measured == 0) | (steps < 0) ? I{} + kFitSteps : length > 0 ? length : I{});

        const Halves y2 = wide(y), d = wide(drift), u = wide(update);
        add_products(sums.base, y2, y2);
        add_products(sums.drift, d, d);
        add_products(sums.update, u, u);
        add_products(sums.cross, d, u);
        for (int a = 0; a < count; ++a) {
            const F stored = rounded<T>(t + alphas[a] * update);
            const F moved = where((stored - stored) == zero, stored - t);
            add_products(sums.moved[a], wide(moved), u);
        }
    }
    levels.add_to(fit);
    *total = sums;
    for (int i = 0; i < W; ++i) {
        fit->elements += uint64_t(elements[i]);
        fit->both += uint64_t(both[i]);
        fit->conflicts += uint64_t(conflicts[i]);
    }
}

}  // namespace
}  // namespace IRES_ISA
}  // namespace ires

#include "fit16.h"  // which leaves to `fit_block` what it cannot do

namespace ires {
namespace IRES_ISA {
namespace {

// Elements as they are, where all are stored as the target is, and there are vectors of them; else, and behind the last
// whole vector, widened blocks.
template <class T> void fit_as(const FitRun& run, Fit* fit) {
    alignas(64) float x[3][kBlock];
    FitSums sums;
    bool same = sizeof(T) > 1;
    for (int k = 0; k < 3; ++k) same &= run.in_types[k] == TypeOf<T>::value;
    for (int64_t i = 0; i < run.n;) {
        const int64_t n = std::min(same ? kFitPart : kBlock, run.n - i);
        if constexpr (sizeof(T) > 1) {
            if (same && n >= W) {
                const auto at = [&](int k) { return static_cast<const T*>(run.in[k]) + i; };
                if constexpr (sizeof(T) == 2) {
                    if (n >= kFitBlock) {
                        fit_part(at(0), at(1), at(2), n / kFitBlock * kFitBlock, run.alphas, run.count, &sums, fit);
                        i += n / kFitBlock * kFitBlock;
                        continue;
                    }
                }
                fit_block<T, T>(at(0), at(1), at(2), n / W * W, run.alphas, run.count, &sums, fit);
                i += n / W * W;
                continue;
            }
        }
        const int64_t whole = (n + W - 1) / W * W;
        for (int k = 0; k < 3; ++k) {
            const DType type = run.in_types[k];
            Blocks<float>::widen[int(type)](static_cast<const char*>(run.in[k]) + i * item_size(type), x[k], n);
            std::fill(x[k] + n, x[k] + whole, std::nanf(""));
        }
        fit_block<T, float>(x[0], x[1], x[2], whole, run.alphas, run.count, &sums, fit);
        i += n;
    }
    for (int i = 0; i < W / 2; ++i) {
        fit->base += sums.base[i], fit->drift += sums.drift[i], fit->update += sums.update[i], fit->cross += sums.cross[i];
        for (int a = 0; a < run.count; ++a) fit->moved[a] += sums.moved[a][i];
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
