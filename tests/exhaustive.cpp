// Exhaustive checks of the CPU loops against definitions that share no code with them. Compiled and run by
// tests/backends/test_exhaustive.py; `exhaustive STRIDE` looks at every STRIDE-th f32 pattern and base (1: all of them).
//
//   widen:      every 8- and 16-bit pattern, against its value computed with ldexp
//   nearest:    every f32 pattern into bf16, f16, e4m3fn, e5m2: the nearer neighbour, the even code on a tie
//   stochastic: every f32 pattern with the words 0, ~0 and one of its own: 128-bit integer arithmetic
//   identity:   every pair of bf16 numbers: where does base + (instruct - base) give instruct back (property P1)?
//
// Each instruction set that the CPU runs is checked. Prints one line a check and the number of failures last.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu.h"

using namespace ires;

namespace {

struct Small {
    const char* name;
    DType type;
    int bits, significand, min_exponent;
    bool has_infinity;
};
const Small kSmall[] = {
    {"bf16", DType::bf16, 16, 7, -126, true},
    {"f16", DType::f16, 16, 10, -14, true},
    {"e4m3fn", DType::e4m3, 8, 3, -6, false},
    {"e5m2", DType::e5m2, 8, 2, -14, true},
};

uint32_t nan_code(const Small& s) { return s.has_infinity ? 0 : (1u << (s.bits - 1)) - 1; }
bool is_nan_code(const Small& s, uint32_t code) {
    const uint32_t magnitude = code & ((1u << (s.bits - 1)) - 1);
    if (!s.has_infinity) return magnitude == nan_code(s);
    const uint32_t infinity = ((1u << (s.bits - 1 - s.significand)) - 1) << s.significand;
    return magnitude > infinity;
}
uint32_t first_not_finite(const Small& s) {
    return s.has_infinity ? ((1u << (s.bits - 1 - s.significand)) - 1) << s.significand : (1u << (s.bits - 1)) - 1;
}
// The value of a finite magnitude code, exact in double.
double value(const Small& s, uint32_t code) {
    const int field = int(code >> s.significand);
    const int fraction = int(code & ((1u << s.significand) - 1));
    if (field == 0) return std::ldexp(fraction, s.min_exponent - s.significand);
    return std::ldexp((1 << s.significand) + fraction, s.min_exponent - s.significand + field - 1);
}

// One call of the loops: scaling by one is a conversion.
void convert(const std::string& isa, DType from, const void* in, DType to, void* out, int64_t n, bool stochastic, uint64_t seed) {
    const double one = 1;
    const Operation op{OpCode::scale, 1, &one, stochastic, seed};
    std::vector<Item> items{{n, 0, out, to, {in}, {from}, {}, {}}};
    run(op, items, 0, 1, isa, nullptr);
}

std::atomic<int64_t> failures{0};
void fail(const std::string& isa, const char* what, const Small& s, uint32_t pattern, uint32_t got, uint32_t wanted) {
    if (failures++ < 20) std::printf("FAIL %s %s %s: %08x gave %x, wanted %x\n", isa.c_str(), what, s.name, pattern, got, wanted);
}

uint32_t code_at(const Small& s, const std::vector<uint8_t>& raw, size_t i) {
    return s.bits == 8 ? raw[i] : uint32_t(raw[2 * i]) | uint32_t(raw[2 * i + 1]) << 8;
}

void check_widen(const std::string& isa, const Small& s) {
    const size_t n = size_t(1) << s.bits;
    std::vector<uint8_t> raw(n * size_t(s.bits / 8));
    for (size_t i = 0; i < n; ++i) {
        raw[s.bits == 8 ? i : 2 * i] = uint8_t(i);
        if (s.bits == 16) raw[2 * i + 1] = uint8_t(i >> 8);
    }
    std::vector<float> out(n);
    convert(isa, s.type, raw.data(), DType::f32, out.data(), int64_t(n), false, 0);
    for (uint32_t code = 0; code < n; ++code) {
        const uint32_t magnitude = code & (uint32_t(n) / 2 - 1), got = bit_cast<uint32_t>(out[code]);
        if (is_nan_code(s, code)) {
            if (!std::isnan(out[code])) fail(isa, "widen", s, code, got, 0x7fc00000);
            continue;
        }
        const double v = magnitude == first_not_finite(s) ? INFINITY : value(s, magnitude);
        const uint32_t wanted = bit_cast<uint32_t>(float(v)) | (code == magnitude ? 0u : 0x80000000u);
        if (got != wanted) fail(isa, "widen", s, code, got, wanted);
    }
}

// The definition of rounding to nearest, for positive magnitudes taken in increasing order.
class NearestByValue {
public:
    explicit NearestByValue(const Small& s) : s_(s) {}
    uint32_t operator()(double x) {
        const uint32_t last = first_not_finite(s_) - 1;
        while (lo_ < last && value(s_, lo_ + 1) <= x) ++lo_;
        const double lo = value(s_, lo_);
        // The step beyond the largest finite value is as wide as the one before it.
        const double hi = lo_ < last ? value(s_, lo_ + 1) : lo + (lo - value(s_, lo_ - 1));
        const double middle = (lo + hi) / 2;
        const bool up = x > middle || (x == middle && (lo_ & 1));
        return up && (lo_ < last || s_.has_infinity) ? lo_ + 1 : lo_;
    }

private:
    const Small& s_;
    uint32_t lo_ = 0;
};

// The definition of the stochastic store: significand as an integer, dropped bits plus the word's top bits.
uint32_t stochastic_by_integers(const Small& s, double x, uint32_t word) {
    if (std::isinf(x)) return s.has_infinity ? first_not_finite(s) : first_not_finite(s) - 1;
    int exponent;
    const double fraction = std::frexp(x, &exponent);  // x = fraction * 2^exponent, fraction in [0.5, 1)
    const unsigned __int128 significand = static_cast<unsigned __int128>(std::ldexp(fraction, 24));
    // In units of the target's step at x, x is significand * 2^-drop.
    const int step = std::max(exponent - 1, s.min_exponent) - s.significand;
    const int drop = step - (exponent - 24);
    unsigned __int128 kept = 0;  // a drop of 90 bits leaves nothing, whatever the word
    if (drop <= 32) kept = (significand + (word >> (32 - drop))) >> drop;
    else if (drop < 90) kept = (significand + (static_cast<unsigned __int128>(word) << (drop - 32))) >> drop;
    const double rounded = std::ldexp(double(kept), step);
    // Back to a code by search: the codes of magnitudes are ordered as their values.
    uint32_t lo = 0, hi = first_not_finite(s) - 1;
    if (rounded >= value(s, hi)) return hi;
    while (lo < hi) {
        const uint32_t mid = (lo + hi + 1) / 2;
        if (value(s, mid) <= rounded) lo = mid;
        else hi = mid - 1;
    }
    return lo;
}

void check_narrow(const std::string& isa, const Small& s, uint64_t stride, uint32_t first, uint64_t count, bool stochastic) {
    constexpr size_t kBlock = 1 << 14;
    std::vector<uint32_t> patterns(kBlock);
    std::vector<uint8_t> raw(kBlock * 2);
    NearestByValue nearest(s);
    const uint64_t seed = 0x123456789abcdef0ull;
    uint64_t next = first;
    const uint64_t end = first + count;
    const uint32_t sign_code = 1u << (s.bits - 1);
    while (next < end) {
        size_t n = 0;
        for (; n < kBlock && next < end; next += stride) patterns[n++] = uint32_t(next);
        convert(isa, DType::f32, patterns.data(), s.type, raw.data(), int64_t(n), stochastic, seed);
        for (size_t i = 0; i < n; ++i) {
            const uint32_t got = code_at(s, raw, i), magnitude = patterns[i] & 0x7fffffffu;
            if (magnitude > 0x7f800000u) {
                if (!is_nan_code(s, got)) fail(isa, "NaN", s, patterns[i], got, nan_code(s));
                continue;
            }
            const double x = bit_cast<float>(magnitude);
            uint32_t wanted;
            if (stochastic) wanted = stochastic_by_integers(s, x, philox(seed, 0, i >> 2).w[i & 3]);
            else if (std::isinf(x)) wanted = s.has_infinity ? first_not_finite(s) : first_not_finite(s) - 1;
            else wanted = nearest(x);
            if (patterns[i] >> 31) wanted |= sign_code;
            if (got != wanted) fail(isa, stochastic ? "stochastic" : "nearest", s, patterns[i], got, wanted);
        }
    }
}

// Splits the f32 patterns of both signs over two threads; each walks its magnitudes upwards.
void narrow_both_signs(const std::string& isa, const Small& s, uint64_t stride, bool stochastic) {
    std::vector<std::thread> team;
    for (uint32_t sign : {0u, 0x80000000u})
        team.emplace_back([&, sign] { check_narrow(isa, s, stride, sign, 0x80000000ull, stochastic); });
    for (std::thread& t : team) t.join();
}

// docs/numerics.md: base + (instruct - base) is instruct for finite numbers, unless the difference overflows f32, the base's
// exponent lies 17 or more above the instruct's, or the instruct is -0 (it becomes +0).
struct Identity {
    uint64_t restored = 0, far = 0, far_restored = 0, overflow = 0, negative_zero = 0, not_finite = 0;
};

int exponent_of(uint32_t bf16_bits) { return std::max(int(bf16_bits >> 7 & 0xff), 1); }

// All instructs for one base, with the tensor loops.
void identity_of_base(const std::string& isa, uint32_t base_bits, Identity* sum) {
    static thread_local std::vector<uint16_t> base(65536), instruct(65536), out(65536);
    for (uint32_t i = 0; i < 65536; ++i) {
        instruct[i] = uint16_t(i);
        base[i] = out[i] = uint16_t(base_bits);
    }
    const double one = 1;
    const Operation op{OpCode::add_difference, 3, &one, false, 0};
    const DType bf16 = DType::bf16;
    std::vector<Item> items{
        {65536, 0, out.data(), bf16, {out.data(), instruct.data(), base.data()}, {bf16, bf16, bf16}, {}, {}}};
    run(op, items, 0, 1, isa, nullptr);
    const float b = bit_cast<float>(base_bits << 16);
    for (uint32_t i = 0; i < 65536; ++i) {
        const float x = bit_cast<float>(i << 16);
        const bool restored = out[i] == i, far = x != 0.0f && exponent_of(base_bits) - exponent_of(i) >= 17;
        uint32_t wanted = i;
        if (!std::isfinite(x) || !std::isfinite(b)) {
            ++sum->not_finite;
        } else if (i == 0x8000) {
            ++sum->negative_zero;
            wanted = 0;
        } else if (!std::isfinite(x - b)) {
            ++sum->overflow;
        } else if (far) {
            ++sum->far;
            sum->far_restored += restored;
        } else {
            sum->restored += restored;
        }
        const bool promised = std::isfinite(x - b) && !far;
        if (promised && out[i] != wanted && failures++ < 20)
            std::printf("FAIL %s identity: base %04x instruct %04x gave %04x\n", isa.c_str(), base_bits, i, out[i]);
    }
}

void check_identity(const std::string& isa, uint64_t stride) {
    std::atomic<uint64_t> next{0};
    std::vector<Identity> sums(2);
    std::vector<std::thread> team;
    for (Identity& sum : sums)
        team.emplace_back([&] {
            for (uint64_t b; (b = next.fetch_add(stride)) < 65536;) identity_of_base(isa, uint32_t(b), &sum);
        });
    for (std::thread& t : team) t.join();
    Identity s;
    for (const Identity& o : sums) {
        s.restored += o.restored;
        s.far += o.far;
        s.far_restored += o.far_restored;
        s.overflow += o.overflow;
        s.negative_zero += o.negative_zero;
        s.not_finite += o.not_finite;
    }
    std::printf("%s identity: restored %llu; exponents 17 or more apart %llu, of which restored %llu; difference overflows "
                "%llu; -0 %llu; not finite %llu\n",
                isa.c_str(), (unsigned long long)s.restored, (unsigned long long)s.far, (unsigned long long)s.far_restored,
                (unsigned long long)s.overflow, (unsigned long long)s.negative_zero, (unsigned long long)s.not_finite);
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t stride = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 65537;
    for (const std::string& isa : isas()) {
        for (const Small& s : kSmall) {
            check_widen(isa, s);
            narrow_both_signs(isa, s, stride, false);
            narrow_both_signs(isa, s, stride == 1 ? 17 : stride, true);
            std::printf("%s %s: widen, nearest, stochastic checked\n", isa.c_str(), s.name);
        }
        check_identity(isa, stride == 1 ? 1 : 997);
        std::fflush(stdout);
    }
    std::printf("failures %lld\n", (long long)failures.load());
    return failures ? 1 : 0;
}
