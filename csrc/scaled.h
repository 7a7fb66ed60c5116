// Operations on codes of e4m3 with scales, from codes to results in registers: what decode.h and loops.cpp do one after the
// other, with the same bits. Included by loops.cpp alone.
//
// A run goes by the rows of the weights, and a row by cells, in each of which an operand has one scale. What does not
// fill whole vectors, and scales that are too large, go through memory.
#pragma once

namespace ires {
namespace IRES_ISA {
namespace {

// In place of a type of numbers: codes with scales.
struct Scaled {};

struct ScaledCodes {
    const char* p;
    float scale;
};
template <Order order> IRES_HD Pair load_pair(ScaledCodes x) {
    const Pair y = load_256th<order>(x.p);
    const float s = x.scale * 256.0f;
    return {y.a * s, y.b * s};
}
IRES_HD void prefetch(ScaledCodes x, int64_t elements) { prefetch(x.p, elements); }

// An operand that the operation does not have.
struct None {};
IRES_HD void prefetch(None, int64_t) {}

template <class T> IRES_HD const T* after(const T* p, int64_t i) { return p + i; }
IRES_HD ScaledCodes after(ScaledCodes x, int64_t i) { return {x.p + i, x.scale}; }
IRES_HD None after(None, int64_t) { return {}; }

#if IRES_LANES >= 8
struct LookedUp {
    U bits;
    float scale;
};
template <Order order> IRES_HD Pair load_pair(LookedUp x) {
    const Pair y = widen_looked_up<order>(x.bits);
    return {y.a * x.scale, y.b * x.scale};
}

// The next two pairs of an operand.
template <class P> struct Two { P first, second; };
template <Order, class P> IRES_HD Two<P> next_two(const Lookup&, P p) { return {p, after(p, 2 * W)}; }
template <Order order> IRES_HD Two<LookedUp> next_two(const Lookup& lookup, ScaledCodes x) {
    U bits[2];
    lookup.at<order>(x.p, bits);
    return {{bits[0], x.scale}, {bits[1], x.scale}};
}
#endif

// One run of an operation; `from` has what its inputs are decoded from.
template <class Op, Order order, class Out, class T0, class T1, class T2 = None> class OfScaled {
public:
    static bool matches(const Operation& op, const Run& run, const Decoded* from) {
        if (op.code != Op::kCode || op.inputs != Op::kInputs || op.stochastic || run.out_type != TypeOf<Out>::value) return false;
        if (!suits<T0>(run, from, 0) || !suits<T1>(run, from, 1) || !suits<T2>(run, from, 2)) return false;
        const Decoded& one = from[kFirst];
        for (int k = 0; k < op.inputs; ++k) {
            if (!from[k].coded) continue;
            const Coded &a = *one.coded, &b = *from[k].coded;
            if (a.columns != b.columns || a.block_columns != b.block_columns) return false;
            if (one.first % a.columns != from[k].first % a.columns) return false;
        }
        return true;
    }

    OfScaled(const Operation& op, const Run& run, const Decoded* from, Tally* tally) : op_(op), run_(run), from_(from), tally_(tally) {}

    void all() {
        const Coded& c = *from_[kFirst].coded;
        for (int64_t i = 0; i < run_.n;) {
            const int64_t column = (from_[kFirst].first + i) % c.columns, cell = column / c.block_columns;
            const int64_t stop = std::min((cell + kCells) * c.block_columns, c.columns);
            const int64_t n = std::min({stop - column, run_.n - i, kTallyBlock});
            cells(i, n, column, cell);
            i += n;
        }
    }

private:
    static constexpr bool kIs[] = {std::is_same_v<T0, Scaled>, std::is_same_v<T1, Scaled>, std::is_same_v<T2, Scaled>};
    static constexpr int kFirst = kIs[0] ? 0 : kIs[1] ? 1 : 2;  // input that is codes

    template <class T> static bool suits(const Run& run, const Decoded* from, int k) {
        if constexpr (std::is_same_v<T, None>) return true;
        else if constexpr (!std::is_same_v<T, Scaled>) return !from[k].coded && run.in_types[k] == TypeOf<T>::value;
        else return from[k].coded && from[k].coded->type == CodeType::e4m3 && !from[k].coded->transposed;
    }

    template <class T> auto input(int k, int64_t i, float scale) const {
        if constexpr (std::is_same_v<T, None>) return None{};
        else if constexpr (!std::is_same_v<T, Scaled>) return static_cast<const T*>(run_.in[k]) + i;
        else return ScaledCodes{from_[k].coded->codes + (from_[k].first + i - from_[k].coded->skipped), scale};
    }

    // Elements [i, i + n), which lie in one row, from `column` and the cell `cell` of it on.
    void cells(int64_t i, int64_t n, int64_t column, int64_t cell) {
        const Coded& c = *from_[kFirst].coded;
        const int64_t count = (column + n - 1) / c.block_columns - cell + 1, step = 2 * W;
        bool whole = n % step == 0 && (count == 1 || (c.block_columns - column % c.block_columns) % step == 0) &&
                     (count <= 2 || c.block_columns % step == 0);
        Cells of[Op::kInputs];
        for (int k = 0; k < Op::kInputs; ++k) {
            if (!kIs[k]) continue;
            find_cells(*from_[k].coded, (from_[k].first + i) / c.columns, cell, count, of[k]);
            bool small = true;
            for (int64_t m = 0; m < count; ++m) small &= std::abs(of[k].scale[m]) < kNearlyLargest;
            whole &= small;
        }
        if (!whole) return in_memory(i, n);
        Sums sums;
        tally_ ? walk<true>(i, n, column, of, &sums) : walk<false>(i, n, column, of, nullptr);
        if (!tally_ || sums.flush(tally_)) return;
        with_numbers(i, n, [&](const Run& run) { tally_slowly(op_, run, tally_); });
    }

    template <bool kTally> void walk(int64_t i, int64_t n, int64_t column, const Cells (&of)[Op::kInputs], Sums* sums) {
#if IRES_LANES >= 8
        if (Lookup::here()) return walk_with<kTally>(Lookup(), i, n, column, of, sums);
#endif
        walk_with<kTally>(None{}, i, n, column, of, sums);
    }

    template <bool kTally, class Tables>
    void walk_with(const Tables& tables, int64_t i, int64_t n, int64_t column, const Cells (&of)[Op::kInputs], Sums* sums) {
        const int64_t width = from_[kFirst].coded->block_columns;
        const F factor = (op_.code == OpCode::subtract ? 1.0f : float(op_.factors[0])) - F{};  // + would make +0 of -0
        const auto scale = [&](int k, int64_t m) { return kIs[k] ? of[k < Op::kInputs ? k : 0].scale[m] : 0.0f; };
        Sums found;
        Sums* const counted = kTally ? &found : nullptr;
        for (int64_t done = 0, m = 0; done < n; ++m) {
            const int64_t length = std::min(width - (column + done) % width, n - done), at = i + done;
            const auto p0 = input<T0>(0, at, scale(0, m));
            const auto p1 = input<T1>(1, at, scale(1, m));
            const auto p2 = input<T2>(2, at, scale(2, m));
            cell_of(tables, length, static_cast<Out*>(run_.out) + at, p0, p1, p2, factor, counted);
            done += length;
        }
        if (kTally) *sums = found;
    }

    // A whole number of pairs.
    template <class Tables, class P0, class P1, class P2>
    IRES_HD static void cell_of([[maybe_unused]] const Tables& tables, int64_t n, Out* out, P0 p0, P1 p1, P2 p2, F factor, Sums* sums) {
        const typename Step::PutNearest put;
        int64_t i = 0;
        const auto fetch = [&](int64_t count) {
            prefetch(after(p0, i), count);
            prefetch(after(p1, i), count);
            prefetch(after(p2, i), count);
        };
#if IRES_LANES >= 8
        if constexpr (std::is_same_v<Tables, Lookup>) {
            for (; i + 4 * W <= n; i += 4 * W) {
                fetch(4 * W);
                const auto x = next_two<order>(tables, after(p0, i));
                const auto y = next_two<order>(tables, after(p1, i));
                const auto z = next_two<order>(tables, after(p2, i));
                Step::step(put, 0, out + i, x.first, y.first, z.first, factor, sums);
                Step::step(put, 0, out + i + 2 * W, x.second, y.second, z.second, factor, sums);
            }
        }
#endif
        for (; i < n; i += 2 * W) {
            fetch(2 * W);
            Step::step(put, 0, out + i, after(p0, i), after(p1, i), after(p2, i), factor, sums);
        }
    }

    // Calls with(run) for elements [i, i + n) of this one, with numbers in place of codes.
    template <class With> void with_numbers(int64_t i, int64_t n, const With& with) {
        alignas(64) float numbers[Op::kInputs][kTallyBlock];
        const void* in[3];
        DType types[3];
        for (int k = 0; k < Op::kInputs; ++k) {
            in[k] = kIs[k] ? static_cast<const void*>(numbers[k]) : static_cast<const char*>(run_.in[k]) + i * item_size(run_.in_types[k]);
            types[k] = kIs[k] ? DType::f32 : run_.in_types[k];
            if (kIs[k]) decode(*from_[k].coded, from_[k].first + i, n, numbers[k]);
        }
        with(Run{n, run_.index + uint64_t(i), run_.stream, run_.out_type, types, static_cast<Out*>(run_.out) + i, in});
    }

    void in_memory(int64_t i, int64_t n) {
        with_numbers(i, n, [&](const Run& run) { IRES_ISA::run(op_, run, tally_); });
    }

    using Step = Fused<Op, order, Out, float, float, float>;
    const Operation& op_;
    const Run& run_;
    const Decoded* const from_;
    Tally* const tally_;
};

template <class... Kernels> bool run_first(const Operation& op, const Run& run, const Decoded* from, Tally* tally) {
    return ((Kernels::matches(op, run, from) && (Kernels(op, run, from, tally).all(), true)) || ...);
}

// False: there is no such loop.
bool run_scaled(const Operation& op, const Run& run, const Decoded* from, Tally* tally) {
    constexpr Order halves = Order::halves, even_odd = Order::even_odd;
    return run_first<OfScaled<AddDifference, even_odd, bf16_t, bf16_t, Scaled, Scaled>,
                     OfScaled<AddDifference, even_odd, bf16_t, bf16_t, Scaled, bf16_t>,
                     OfScaled<AddDifference, halves, float, float, Scaled, Scaled>,
                     OfScaled<AddDifference, halves, float, Scaled, Scaled, Scaled>,
                     OfScaled<Subtract, halves, float, Scaled, Scaled>>(op, run, from, tally);
}

}  // namespace
}  // namespace IRES_ISA
}  // namespace ires
