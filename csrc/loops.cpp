// The CPU loops, compiled once per instruction set (setup.py passes IRES_ISA and the matching -march).
//
// Two ways through, the same arithmetic (arith.h). Hot mixes of types run fused: registers from load to store. Every
// other mix, several residuals, f64 and stochastic rounding go by blocks of f32 (or f64) that stay in L1.
#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "decode.h"
#include "encode.h"
#include "lanes.h"
#include "words.h"

namespace ires {
namespace IRES_ISA {
namespace {

constexpr int64_t kTallyBlock = 4096;  // elements summed in f32 lanes before the sums go on in f64

// ---------------------------------------------------------------------------------------------------------------------
// The tally of a block: f32 lanes, then f64. A block whose sums are not finite holds something worth a slow look, and
// so does one whose squares may have underflowed.
struct Sums {
    F dot{}, norm2{};
    I updates{}, lost{}, suspects{};

    IRES_HD void add(F target, F out, F update) {
        const F moved = out - target;
        dot += moved * update;
        norm2 += update * update;
        const I is_update = update != 0.0f;  // all ones where true
        updates -= is_update;
        lost -= is_update & (out == target);
    }
    // A stochastic store that ends at the largest finite value may have come from beyond it, which no sum shows.
    template <class T> IRES_HD void suspect(F out) {
        const F largest = F{} + widen(T{Format<T>::kMax});
        suspects |= (out == largest) | (out == -largest);
    }
    // False: the block must be counted by `tally_slowly` instead.
    bool flush(Tally* tally) const {
        double d = 0, n = 0;
        int64_t u = 0, l = 0;
        for (int i = 0; i < W; ++i) {
            d += dot[i];
            n += norm2[i];
            u += updates[i];
            l += lost[i];
            if (suspects[i]) return false;
        }
        if (!std::isfinite(d) || !std::isfinite(n) || (u > 0 && n < 1e-25)) return false;
        tally->dot += d;
        tally->norm2 += n;
        tally->updates += uint64_t(u);
        tally->lost += uint64_t(l);
        return true;
    }
};

void tally_slowly(const Operation& op, const Run& run, Tally* tally);

// ---------------------------------------------------------------------------------------------------------------------
// Fused loops.
template <class T> struct TypeOf;
template <> struct TypeOf<double> { static constexpr DType value = DType::f64; };
template <> struct TypeOf<float> { static constexpr DType value = DType::f32; };
template <> struct TypeOf<f16_t> { static constexpr DType value = DType::f16; };
template <> struct TypeOf<bf16_t> { static constexpr DType value = DType::bf16; };
template <> struct TypeOf<e4m3_t> { static constexpr DType value = DType::e4m3; };
template <> struct TypeOf<e5m2_t> { static constexpr DType value = DType::e5m2; };

template <class Op, Order order, class Out, class T0, class T1 = void, class T2 = void> struct Fused {
    static constexpr int kInputs = Op::kInputs;

    static bool matches(const Operation& op, const Run& run) {
        if (op.code != Op::kCode || op.inputs != kInputs || run.out_type != TypeOf<Out>::value) return false;
        if (run.in_types[0] != TypeOf<T0>::value) return false;
        if constexpr (kInputs > 1)
            if (run.in_types[1] != TypeOf<T1>::value) return false;
        if constexpr (kInputs > 2)
            if (run.in_types[2] != TypeOf<T2>::value) return false;
        return true;
    }

    // put(out, pair, k) stores the pair of elements k and on, and returns what it stored, widened.
    template <class Put, class P0, class P1, class P2>
    IRES_HD static void step(const Put& put, int64_t k, Out* out, P0 p0, P1 p1, P2 p2, F factor, Sums* sums) {
        F a[kInputs], b[kInputs];
        const auto get = [&](int i, Pair x) {
            a[i] = x.a;
            b[i] = x.b;
        };
        get(0, load_pair<order>(p0));
        if constexpr (kInputs > 1) get(1, load_pair<order>(p1));
        if constexpr (kInputs > 2) get(2, load_pair<order>(p2));
        const F ua = Op::update(factor, a), ub = Op::update(factor, b);
        const Pair stored = put(out, Pair{Op::result(a, ua), Op::result(b, ub)}, k);
        if (sums) {
            constexpr bool from_zero = Op::kCode == OpCode::subtract;
            sums->add(from_zero ? F{} : a[0], stored.a, ua);
            sums->add(from_zero ? F{} : b[0], stored.b, ub);
            if constexpr (Put::kStochastic) {
                sums->template suspect<Out>(stored.a);
                sums->template suspect<Out>(stored.b);
            }
        }
    }

    template <bool kTally, class Put>
    static void loop(const Put& put, int64_t n, Out* out, const T0* p0, const T1* p1, const T2* p2, F factor, Sums* sums) {
        constexpr int64_t kStep = 2 * W;
        Sums* const counted = kTally ? sums : nullptr;
        int64_t i = 0;
        const auto at = [&](int64_t k) {
            if constexpr (kInputs == 3) step(put, k, out + k, p0 + k, p1 + k, p2 + k, factor, counted);
            if constexpr (kInputs == 2) step(put, k, out + k, p0 + k, p1 + k, p2, factor, counted);
            if constexpr (kInputs == 1) step(put, k, out + k, p0 + k, p1, p2, factor, counted);
        };
        for (; i + 2 * kStep <= n; i += 2 * kStep) {
            prefetch(p0 + i, 2 * kStep);
            if constexpr (kInputs > 1) prefetch(p1 + i, 2 * kStep);
            if constexpr (kInputs > 2) prefetch(p2 + i, 2 * kStep);
            at(i);
            at(i + kStep);
        }
        for (; i + kStep <= n; i += kStep) at(i);
        if (i == n) return;
        // The last few: the same step on padded copies, so that there is one arithmetic and no scalar twin.
        const size_t rest = size_t(n - i);
        Out out_pad[kStep] = {};
        T0 pad0[kStep] = {};
        memcpy(static_cast<void*>(pad0), p0 + i, rest * sizeof(T0));
        if constexpr (kInputs == 1) {
            step(put, i, out_pad, pad0, p1, p2, factor, counted);
        } else {
            T1 pad1[kStep] = {};
            memcpy(static_cast<void*>(pad1), p1 + i, rest * sizeof(T1));
            if constexpr (kInputs == 2) {
                step(put, i, out_pad, pad0, pad1, p2, factor, counted);
            } else {
                T2 pad2[kStep] = {};
                memcpy(static_cast<void*>(pad2), p2 + i, rest * sizeof(T2));
                step(put, i, out_pad, pad0, pad1, pad2, factor, counted);
            }
        }
        memcpy(static_cast<void*>(out + i), out_pad, rest * sizeof(Out));
    }

    // Elements [i, i + n) of the run.
    template <class Put>
    static void part(const Operation& op, const Run& run, int64_t i, int64_t n, const Put& put, Tally* tally) {
        const F factor = (op.code == OpCode::subtract ? 1.0f : float(op.factors[0])) - F{};  // + would make +0 of -0
        Out* out = static_cast<Out*>(run.out) + i;
        const T0* p0 = static_cast<const T0*>(run.in[0]) + i;
        const T1* p1 = nullptr;
        const T2* p2 = nullptr;
        if constexpr (kInputs > 1) p1 = static_cast<const T1*>(run.in[1]) + i;
        if constexpr (kInputs > 2) p2 = static_cast<const T2*>(run.in[2]) + i;
        if (!tally) return loop<false>(put, n, out, p0, p1, p2, factor, nullptr);
        Sums sums;
        loop<true>(put, n, out, p0, p1, p2, factor, &sums);
        if (sums.flush(tally)) return;
        const void* in[3] = {p0, p1, p2};
        tally_slowly(op, Run{n, run.index + uint64_t(i), run.stream, run.out_type, run.in_types, out, in}, tally);
    }

    struct PutNearest {
        static constexpr bool kStochastic = false;
        IRES_HD Pair operator()(Out* out, Pair x, int64_t) const { return store_pair<order>(out, x); }
    };
    struct PutStochastic {
        static constexpr bool kStochastic = true;
        const uint32_t* words;
        IRES_HD Pair operator()(Out* out, Pair x, int64_t k) const { return store_pair_stochastic<order>(out, x, words + k); }
    };

    static void nearest(const Operation& op, const Run& run, Tally* tally) {
        const PutNearest put;
        const int64_t block = tally ? kTallyBlock : run.n;
        for (int64_t i = 0; i < run.n; i += block) part(op, run, i, std::min(block, run.n - i), put, tally);
    }

    static void stochastic(const Operation& op, const Run& run, Tally* tally) {
        BlockOfWords words;
        for (int64_t i = 0; i < run.n; i += kBlock) {
            const int64_t n = std::min(kBlock, run.n - i);
            const uint64_t index = run.index + uint64_t(i);
            const uint32_t* w = order == Order::even_odd ? words.even_odd(op.seed, run.stream, index, n)
                                                         : words.in_order(op.seed, run.stream, index, n);
            part(op, run, i, n, PutStochastic{w}, tally);
        }
    }

    static constexpr bool kStochastic = sizeof(Out) == 2;
    static bool can_be_stochastic(const Run& run) { return order == Order::halves || (run.index & 3) == 0; }
};

using FusedFn = void (*)(const Operation&, const Run&, Tally*);

template <class... Kernels> FusedFn find(const Operation& op, const Run& run) {
    FusedFn found = nullptr;
    const auto choose = [&](auto kernel) {
        using Kernel = decltype(kernel);
        if (!Kernel::matches(op, run)) return false;
        if (!op.stochastic) {
            found = &Kernel::nearest;
        } else if constexpr (Kernel::kStochastic) {
            found = Kernel::can_be_stochastic(run) ? &Kernel::stochastic : nullptr;
        }
        return true;
    };
    (choose(Kernels{}) || ...);
    return found;
}

FusedFn find_fused(const Operation& op, const Run& run) {
    constexpr Order halves = Order::halves, even_odd = Order::even_odd;
    switch (op.code) {
        case OpCode::subtract:
            return find<Fused<Subtract, even_odd, bf16_t, bf16_t, bf16_t>, Fused<Subtract, halves, float, bf16_t, bf16_t>,
                        Fused<Subtract, halves, f16_t, f16_t, f16_t>, Fused<Subtract, halves, float, f16_t, f16_t>,
                        Fused<Subtract, halves, float, float, float>>(op, run);
        case OpCode::add:
            return find<Fused<AddOne, even_odd, bf16_t, bf16_t, bf16_t>, Fused<AddOne, halves, bf16_t, bf16_t, float>,
                        Fused<AddOne, even_odd, bf16_t, bf16_t, e4m3_t>, Fused<AddOne, halves, f16_t, f16_t, f16_t>,
                        Fused<AddOne, halves, f16_t, f16_t, float>, Fused<AddOne, halves, f16_t, f16_t, e4m3_t>,
                        Fused<AddOne, halves, float, float, float>>(op, run);
        case OpCode::scale:
            return find<Fused<Scale, even_odd, bf16_t, bf16_t>, Fused<Scale, halves, f16_t, f16_t>,
                        Fused<Scale, halves, float, float>>(op, run);
        case OpCode::add_difference:
            return find<Fused<AddDifference, even_odd, bf16_t, bf16_t, bf16_t, bf16_t>,
                        Fused<AddDifference, halves, bf16_t, bf16_t, float, float>,
                        Fused<AddDifference, halves, f16_t, f16_t, f16_t, f16_t>,
                        Fused<AddDifference, halves, float, float, float, float>>(op, run);
    }
    return nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks of C in L1.
template <class C, class T> void widen_block(const void* from, C* to, int64_t n) {
    const T* p = static_cast<const T*>(from);
    int64_t i = 0;
    if constexpr (std::is_same_v<C, float>) {
        for (; i + 2 * W <= n; i += 2 * W) {
            const Pair x = load_pair<Order::halves>(p + i);
            memcpy(to + i, &x, sizeof x);
        }
    }
    for (; i < n; ++i) {
        T x;
        memcpy(static_cast<void*>(&x), p + i, sizeof x);
        to[i] = C(widen(x));
    }
}

template <class C, class T> void nearest_block(const C* from, void* to, int64_t n) {
    T* p = static_cast<T*>(to);
    int64_t i = 0;
    if constexpr (std::is_same_v<C, float>) {
        for (; i + W <= n; i += W) store(p + i, load_raw<F>(from + i));
    }
    for (; i < n; ++i) {
        const T x = store_nearest<T>(from[i]);
        memcpy(static_cast<void*>(p + i), &x, sizeof x);
    }
}

template <class C, class T> void stochastic_block(const C* from, const uint32_t* words, void* to, int64_t n) {
    T* p = static_cast<T*>(to);
    int64_t i = 0;
    if constexpr (std::is_same_v<C, float> && sizeof(T) < sizeof(C)) {
        for (; i + W <= n; i += W) store_low<T>(p + i, stochastic_bits<T>(load_raw<F>(from + i), load_raw<U>(words + i)));
    }
    for (; i < n; ++i) {
        const T x = store_stochastic<T>(from[i], words[i]);
        memcpy(static_cast<void*>(p + i), &x, sizeof x);
    }
}

template <class C> struct Blocks {
    using Widen = void (*)(const void*, C*, int64_t);
    using Nearest = void (*)(const C*, void*, int64_t);
    using Stochastic = void (*)(const C*, const uint32_t*, void*, int64_t);
    // Indexed by DType. With C = float there is no f64 operand.
    static constexpr Widen widen[kDTypes] = {
        &widen_block<C, std::conditional_t<std::is_same_v<C, double>, double, float>>,
        &widen_block<C, float>, &widen_block<C, f16_t>, &widen_block<C, bf16_t>, &widen_block<C, e4m3_t>, &widen_block<C, e5m2_t>};
    static constexpr Nearest nearest[kDTypes] = {
        &nearest_block<C, std::conditional_t<std::is_same_v<C, double>, double, float>>,
        &nearest_block<C, float>, &nearest_block<C, f16_t>, &nearest_block<C, bf16_t>, &nearest_block<C, e4m3_t>, &nearest_block<C, e5m2_t>};
    static constexpr Stochastic stochastic[kDTypes] = {
        &stochastic_block<C, std::conditional_t<std::is_same_v<C, double>, double, float>>,
        &stochastic_block<C, float>, &stochastic_block<C, f16_t>, &stochastic_block<C, bf16_t>, &stochastic_block<C, e4m3_t>, &stochastic_block<C, e5m2_t>};
};

// v: the C value before the store; update: D of the report (only where a tally wants it).
template <class C>
void compute_block(const Operation& op, const Run& run, int64_t i, int64_t n, C* v, C* update, C* scratch, C* minuend) {
    const auto get = [&](int k, C* to) {
        const DType type = run.in_types[k];
        Blocks<C>::widen[int(type)](static_cast<const char*>(run.in[k]) + i * item_size(type), to, n);
    };
    get(0, v);
    switch (op.code) {
        case OpCode::scale: {
            const C s = C(op.factors[0]);
            for (int64_t j = 0; j < n; ++j) v[j] = mul(s, v[j]);
            return;
        }
        case OpCode::subtract:
            get(1, scratch);
            for (int64_t j = 0; j < n; ++j) v[j] = update[j] = sub(v[j], scratch[j]);
            return;
        case OpCode::add_difference:
            for (int k = 1; k < op.inputs; k += 2) {
                const C alpha = C(op.factors[k / 2]);
                get(k, minuend);
                get(k + 1, scratch);
                for (int64_t j = 0; j < n; ++j) {
                    const C one = mul(alpha, sub(minuend[j], scratch[j]));
                    update[j] = k == 1 ? one : add(update[j], one);
                    v[j] = add(v[j], one);
                }
            }
            return;
        case OpCode::add:
            for (int k = 1; k < op.inputs; ++k) {
                const C alpha = C(op.factors[k - 1]);
                get(k, scratch);
                for (int64_t j = 0; j < n; ++j) {
                    const C one = mul(alpha, scratch[j]);
                    update[j] = k == 1 ? one : add(update[j], one);
                    v[j] = add(v[j], one);
                }
            }
            return;
    }
}

// The least f32 magnitude, as bits, that the output type does not keep finite.
uint32_t overflow_bits(DType out) {
    switch (out) {
        case DType::f16: return Format<f16_t>::kOverflow;
        case DType::bf16: return Format<bf16_t>::kOverflow;
        case DType::e4m3: return Format<e4m3_t>::kOverflow;
        case DType::e5m2: return Format<e5m2_t>::kOverflow;
        default: return 0x7f800000u;
    }
}

template <class C> bool overflows(C v, DType out) {
    if (std::isnan(v)) return false;  // inf - inf of finite operands: counted as a NaN of the output
    if (out == DType::f64) return std::isinf(v);
    if constexpr (std::is_same_v<C, double>) {
        const float f = out == DType::f32 ? float(v) : narrow_to_odd(v);
        return (bit_cast<uint32_t>(f) & 0x7fffffffu) >= overflow_bits(out);
    } else {
        return (bit_cast<uint32_t>(v) & 0x7fffffffu) >= overflow_bits(out);
    }
}

// Counts one element at a time, in f64: for blocks that hold NaN, inf, an overflow, or squares that underflow.
template <class C> void tally_block(const Operation& op, const Run& run, int64_t i, int64_t n, Tally* tally) {
    alignas(64) C v[kBlock], update[kBlock], scratch[kBlock], minuend[kBlock], target[kBlock], out[kBlock];
    bool nan_in[kBlock] = {}, inf_in[kBlock] = {};
    for (int k = 0; k < op.inputs; ++k) {
        const DType type = run.in_types[k];
        Blocks<C>::widen[int(type)](static_cast<const char*>(run.in[k]) + i * item_size(type), scratch, n);
        for (int64_t j = 0; j < n; ++j) {
            nan_in[j] |= std::isnan(scratch[j]);
            inf_in[j] |= std::isinf(scratch[j]);
            if (k == 0) target[j] = op.code == OpCode::subtract ? C(0) : scratch[j];
        }
    }
    compute_block<C>(op, run, i, n, v, update, scratch, minuend);
    Blocks<C>::widen[int(run.out_type)](static_cast<const char*>(run.out) + i * item_size(run.out_type), out, n);
    for (int64_t j = 0; j < n; ++j) {
        tally->nan_in += nan_in[j];
        tally->inf_in += inf_in[j] && !nan_in[j];
        tally->nan_out += std::isnan(out[j]);
        tally->overflow += !nan_in[j] && !inf_in[j] && overflows(v[j], run.out_type);
        const bool is_update = update[j] != C(0) && !std::isnan(update[j]);
        tally->updates += is_update;
        tally->lost += is_update && out[j] == target[j];
        const double moved = double(out[j]) - double(target[j]), d = double(update[j]);
        if (std::isfinite(moved) && std::isfinite(d)) {
            tally->dot += moved * d;
            tally->norm2 += d * d;
        }
    }
}

// The sums of a block whose v and update are at hand; false if it must be counted slowly. Arrays have kBlock elements.
bool tally_fast(const Operation& op, const Run& run, int64_t i, int64_t n, float* v, float* update, Tally* tally) {
    alignas(64) float target[kBlock], out[kBlock];
    const auto get = [&](DType type, const void* from, float* to) {
        Blocks<float>::widen[int(type)](static_cast<const char*>(from) + i * item_size(type), to, n);
        std::fill(to + n, to + (n + W - 1) / W * W, 0.0f);
    };
    get(run.out_type, run.out, out);
    get(run.in_types[0], run.in[0], target);
    std::fill(v + n, v + (n + W - 1) / W * W, 0.0f);
    std::fill(update + n, update + (n + W - 1) / W * W, 0.0f);
    const uint32_t limit = overflow_bits(run.out_type);
    Sums sums;
    I beyond{};
    for (int64_t j = 0; j < n; j += W) {
        beyond |= (load_raw<U>(v + j) & 0x7fffffffu) >= limit;
        sums.add(op.code == OpCode::subtract ? F{} : load_raw<F>(target + j), load_raw<F>(out + j), load_raw<F>(update + j));
    }
    for (int k = 0; k < W; ++k)
        if (beyond[k]) return false;
    return sums.flush(tally);
}

bool in_double(const Operation& op, const Run& run) {
    bool any = run.out_type == DType::f64;
    for (int k = 0; k < op.inputs; ++k) any |= run.in_types[k] == DType::f64;
    return any;
}

void tally_slowly(const Operation& op, const Run& run, Tally* tally) {
    for (int64_t i = 0; i < run.n; i += kBlock) {
        const int64_t n = std::min(kBlock, run.n - i);
        in_double(op, run) ? tally_block<double>(op, run, i, n, tally) : tally_block<float>(op, run, i, n, tally);
    }
}

template <class C> void run_blocks(const Operation& op, const Run& run, Tally* tally) {
    alignas(64) C v[kBlock], update[kBlock], scratch[kBlock], minuend[kBlock];
    BlockOfWords words;
    const bool narrows = item_size(run.out_type) < int(sizeof(C));
    for (int64_t i = 0; i < run.n; i += kBlock) {
        const int64_t n = std::min(kBlock, run.n - i);
        compute_block<C>(op, run, i, n, v, update, scratch, minuend);
        void* out = static_cast<char*>(run.out) + i * item_size(run.out_type);
        if (op.stochastic && narrows) {
            const uint32_t* w = words.in_order(op.seed, run.stream, run.index + uint64_t(i), n);
            Blocks<C>::stochastic[int(run.out_type)](v, w, out, n);
        } else {
            Blocks<C>::nearest[int(run.out_type)](v, out, n);
        }
        if (!tally) continue;
        if constexpr (std::is_same_v<C, float>)
            if (tally_fast(op, run, i, n, v, update, tally)) continue;
        tally_block<C>(op, run, i, n, tally);
    }
}

void run(const Operation& op, const Run& run, Tally* tally) {
    if (FusedFn fused = find_fused(op, run)) return fused(op, run, tally);
    in_double(op, run) ? run_blocks<double>(op, run, tally) : run_blocks<float>(op, run, tally);
}

}  // namespace
}  // namespace IRES_ISA
}  // namespace ires

#include "fit.h"  // which takes its numbers by blocks as well
#include "pack.h"
#include "scaled.h"

namespace ires {
namespace IRES_ISA {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// The bytes that a run touches, with xor for arithmetic. 64 elements a step; sizes in bytes an element.
template <int kOut, int... kIn> struct Memory {
    static bool run(const Run& run, int inputs) {
        constexpr int sizes[] = {kIn...};
        if (inputs != int(sizeof...(kIn)) || item_size(run.out_type) != kOut) return false;
        for (int k = 0; k < inputs; ++k)
            if (item_size(run.in_types[k]) != sizes[k]) return false;
        constexpr int kVectors = 16 / W;  // per 64 bytes
        for (int64_t i = 0; i + 64 <= run.n; i += 64) {
            U x[kOut * kVectors] = {};
            int k = 0;
            const auto read = [&](auto size) {
                const char* p = static_cast<const char*>(run.in[k++]) + i * size();
                for (int l = 0; l < size(); ++l) __builtin_prefetch(p + kPrefetch + 64 * l);
                for (int v = 0; v < size() * kVectors; ++v) x[v % (kOut * kVectors)] ^= load_raw<U>(p + v * 4 * W);
            };
            (read(std::integral_constant<int, kIn>{}), ...);
            memcpy(static_cast<char*>(run.out) + i * kOut, x, sizeof x);
        }
        return true;
    }
};

bool memory(const Run& run, int inputs) {
    return Memory<2, 2, 2, 2>::run(run, inputs) || Memory<4, 4, 4, 4>::run(run, inputs) ||
           Memory<2, 2, 2>::run(run, inputs) || Memory<4, 4, 4>::run(run, inputs) || Memory<4, 2, 2>::run(run, inputs) ||
           Memory<2, 2, 4>::run(run, inputs) || Memory<2, 2, 1>::run(run, inputs) || Memory<2, 2>::run(run, inputs) ||
           Memory<4, 4>::run(run, inputs) || Memory<2, 2, 1, 1>::run(run, inputs) || Memory<4, 4, 1, 1>::run(run, inputs);
}

}  // namespace

extern const Loops loops;
const Loops loops = {&run, &run_scaled, &memory, &decode, &encode, &measure, &keep, &count_stored, &fit,
                     &pack, &unpack, &fits};

}  // namespace IRES_ISA
}  // namespace ires
