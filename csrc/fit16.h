// The sums of fit.h where all three models are stored as bf16, as nearly all are, or as f16: 4 times as fast.
// Included by fit.h.
//
// A block is summed in f32 lanes, of 64 products each, which then go on in f64: that differs from sums in f64 by 1e-6 of
// themselves at most. A block in which a value is not finite, or squares could underflow, is left to `fit_block`.
// Integers are exact: they are counted in 16-bit lanes, and steps between values by their bits.
#pragma once

#include "lanes.h"

namespace ires {
namespace IRES_ISA {
namespace {

constexpr int64_t kFitBlock = 64 * W;
constexpr int64_t kFitPart = int64_t(1) << 14;  // elements until counts of 8 and 16 bits are emptied: a multiple of blocks

// How many of the bytes that are added have bit k, for each k. Seven of eight additions are carry-save: 5 operations a
// vector, where 8 comparisons took 24.
class BitCounts {
public:
    void add(const U (&v)[8]) {
        U two[2], four[2], eight;
        for (int half = 0; half < 2; ++half) {
            const U* x = v + 4 * half;
            two[0] = carry(ones_, x[0], x[1]);
            two[1] = carry(ones_, x[2], x[3]);
            four[half] = carry(twos_, two[0], two[1]);
        }
        eight = carry(fours_, four[0], four[1]);
        for (int k = 0; k < 8; ++k) eights_[k] += (eight >> uint32_t(k)) & 0x01010101u;
    }
    uint64_t count(int k) const {
        const auto bit = [k](U x) { return (x >> uint32_t(k)) & 0x01010101u; };
        return 8 * bytes(eights_[k]) + 4 * bytes(bit(fours_)) + 2 * bytes(bit(twos_)) + bytes(bit(ones_));
    }

private:
    // A full adder in every bit: leaves the sum in `a` and returns the carry.
    IRES_HD static U carry(U& a, U b, U c) {
        const U ab = a ^ b, carried = (a & b) | (ab & c);
        a = ab ^ c;
        return carried;
    }
    static uint64_t bytes(U x) {
        x = (x & 0x00ff00ffu) + ((x >> 8) & 0x00ff00ffu);
        x = (x & 0xffffu) + (x >> 16);
        uint64_t sum = 0;
        for (int i = 0; i < W; ++i) sum += x[i];
        return sum;
    }

    U ones_{}, twos_{}, fours_{}, eights_[8] = {};
};

// Where values come in their order: 0 for both zeros.
template <class T> IRES_HD S16x2 places(const T* p) {
    static_assert(sizeof(T) == 2, "of 16 bits");
    const S16x2 bits = load_raw<S16x2>(p), sign = bits >> 15;
    return ((bits & int16_t(0x7fff)) ^ sign) - sign;
}

// Counts of a part, all of whose blocks are finite.
class Steps {
public:
    template <class T> void add_block(const T* target, const T* instruct, const T* base) {
        constexpr int64_t kStep = 2 * W;
        for (int64_t j = 0; j < kFitBlock; j += 16 * kStep) {
            U changes[8];
            for (int k = 0; k < 8; ++k) {
                const int64_t at = j + 2 * k * kStep;
                const U low = steps(target + at, instruct + at, base + at);
                const U high = steps(target + at + kStep, instruct + at + kStep, base + at + kStep);
                U v = low | high << 8;
                v |= (v >> 1) & 0x7f7f7f7fu;  // below a bit that is set all are
                v |= (v >> 2) & 0x3f3f3f3fu;
                changes[k] = v | ((v >> 4) & 0x0f0f0f0fu);
            }
            counts_.add(changes);
        }
        elements_ += kFitBlock;
    }
    void add_to(Fit* fit) const {
        fit->elements += elements_;
        for (int k = 0; k < kFitSteps; ++k) fit->within[k] += elements_ - counts_.count(k);
        for (int i = 0; i < 2 * W; ++i) {
            fit->both += uint64_t(both_[i]);
            fit->conflicts += uint64_t(conflicts_[i]);
        }
    }

private:
    // How many steps each base value is from that of instruct, 255 at most.
    template <class T> IRES_HD U steps(const T* target, const T* instruct, const T* base) {
        const S16x2 t = places(target), x = places(instruct), y = places(base);
        const S16x2 both = (t != y) & (x != y);
        both_ -= both;
        conflicts_ -= both & ((t < y) ^ (x < y));
        const S16x2 high = x > y ? x : y, low = x > y ? y : x;
        const U16x2 far = bit_cast<U16x2>(high) - bit_cast<U16x2>(low), most = U16x2{} + uint16_t(255);
        return bit_cast<U>(far < most ? far : most);
    }

    BitCounts counts_;
    S16x2 both_{}, conflicts_{};
    uint64_t elements_ = 0;
};

// What a store of x leaves behind, where no NaN comes; what overflows is infinite.
template <class T> IRES_HD F nearest_finite(F x) {
    if constexpr (!std::is_same_v<T, bf16_t>) return rounded<T>(x);
    const U b = bit_cast<U>(x);
    return bit_cast<F>(U((b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u));
}
template <class T> IRES_HD F moved_by(F t, F update, float alpha) {
    return (nearest_finite<T>(t + alpha * update) - t) * update;
}

// The sums of a block in f32 lanes.
struct BlockSums {
    F base{}, drift{}, update{}, cross{}, moved[kFitAlphas] = {};

    IRES_HD void add(F d, F u, F y) {
        base += y * y;
        drift += d * d;
        update += u * u;
        cross += d * u;
    }
};

// Calls each(t, x, y) for every vector of a block.
template <class T, class Each> IRES_HD void for_block(const T* target, const T* instruct, const T* base, const Each& each) {
    constexpr Order order = std::is_same_v<T, bf16_t> ? Order::even_odd : Order::halves;
    for (int64_t j = 0; j < kFitBlock; j += 2 * W) {
        const Pair t = load_pair<order>(target + j), x = load_pair<order>(instruct + j), y = load_pair<order>(base + j);
        each(t.a, x.a, y.a);
        each(t.b, x.b, y.b);
    }
}

IRES_HD bool is_finite(F x) {
    const I is = (x - x) == F{};
    int32_t all = -1;
    for (int i = 0; i < W; ++i) all &= is[i];
    return all != 0;
}
IRES_HD float lanes_sum(F x) {
    float sum = 0;
    for (int i = 0; i < W; ++i) sum += x[i];
    return sum;
}

// Whether a sum of squares is as good as zero and yet the values are not all zero: then some may have underflowed.
template <class T> IRES_HD bool is_too_small(F squares, const T* values, const T* others) {
    return lanes_sum(squares) < 1e-30f && memcmp(values, others, size_t(kFitBlock) * sizeof *values) != 0;
}

// Adds a block to `total`; false, and nothing added, where it needs f64. One alpha goes along, others go by themselves.
template <class T> bool add_block(const T* t, const T* x, const T* y, const float* alphas, int count, FitSums* total) {
    static constexpr T kZeros[kFitBlock] = {};
    BlockSums sums;
    const float alpha = count ? alphas[0] : 0;
    F moved{};
    for_block(t, x, y, [&](F t, F x, F y) {
        const F u = x - y;
        sums.add(t - y, u, y);
        moved += moved_by<T>(t, u, alpha);
    });
    sums.moved[0] = moved;
    F all = sums.base + sums.drift + sums.update + moved;
    for (int a = 1; a < count; ++a) {
        moved = F{};
        for_block(t, x, y, [&](F t, F x, F y) { moved += moved_by<T>(t, x - y, alphas[a]); });
        all += sums.moved[a] = moved;
    }
    if (!is_finite(all) || is_too_small(sums.base, y, kZeros) || is_too_small(sums.drift, t, y) ||
        is_too_small(sums.update, x, y))
        return false;
    const auto add = [](Wide& sum, F x) {
        const Halves h = wide(x);
        sum += h.a + h.b;
    };
    add(total->base, sums.base);
    add(total->drift, sums.drift);
    add(total->update, sums.update);
    add(total->cross, sums.cross);
    for (int a = 0; a < count; ++a) add(total->moved[a], sums.moved[a]);
    return true;
}

// n elements, a multiple of kFitBlock.
template <class T> void fit_part(const T* target, const T* instruct, const T* base, int64_t n, const float* alphas, int count,
                                 FitSums* total, Fit* fit) {
    Steps steps;
    for (int64_t j = 0; j < n; j += kFitBlock) {
        const T *t = target + j, *x = instruct + j, *y = base + j;
        if (add_block(t, x, y, alphas, count, total)) steps.add_block(t, x, y);
        else fit_block<T, T>(t, x, y, kFitBlock, alphas, count, total, fit);
    }
    steps.add_to(fit);
}

}  // namespace
}  // namespace IRES_ISA
}  // namespace ires
