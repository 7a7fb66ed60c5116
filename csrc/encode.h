// f32 -> codes of 8 bits by the scales that are there, and the largest magnitude of each block. Included by loops.cpp alone.
//
// A code is that of RN(value / scale), rounded once more to what codes are; what none is large enough for gets the
// largest. As in backends/encoding.py.
#pragma once

#include <algorithm>
#include <cmath>

#include "decode.h"
#include "words.h"

namespace ires {
namespace IRES_ISA {
namespace {

// Calls part(row, column, n, done) for what each row has of the numbers [first, first + n).
template <class Part> void for_rows(const Coded& c, int64_t first, int64_t n, const Part& part) {
    for (int64_t done = 0; done < n;) {
        const int64_t column = (first + done) % c.columns, length = std::min(c.columns - column, n - done);
        part((first + done) / c.columns, column, length, done);
        done += length;
    }
}

// Calls part(cell, n, done) for what each cell of a row has of columns [column, column + n); `cell` counts within the row.
template <class Part> void for_cells(const Coded& c, int64_t column, int64_t n, const Part& part) {
    for (int64_t done = 0; done < n;) {
        const int64_t cell = (column + done) / c.block_columns;
        const int64_t length = std::min((cell + 1) * c.block_columns - (column + done), n - done);
        part(cell, length, done);
        done += length;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Integers: to nearest by an addition at whose magnitude an f32 has no fraction.
constexpr float kWhole = 0x1.8p23f;

IRES_HD F clamped(F x) {
    x = x > 127.0f ? F{} + 127.0f : x;
    x = x < -128.0f ? F{} - 128.0f : x;
    return x == x ? x : F{};
}
IRES_HD float clamped(float x) { return x > 127.0f ? 127.0f : x < -128.0f ? -128.0f : x == x ? x : 0.0f; }

IRES_HD uint8_t stochastic_i8(float x, uint32_t word) {
    const double sum = std::floor(double(clamped(x)) + double(word) * 0x1p-32);
    return x == x ? uint8_t(int8_t(sum > 127 ? 127 : sum)) : uint8_t(0);
}

// ---------------------------------------------------------------------------------------------------------------------
// The codes of n values that share a scale; `words` is null to round to nearest.
void encode_e4m3(const float* values, int64_t n, float scale, const uint32_t* words, uint8_t* out) {
    e4m3_t* const codes = reinterpret_cast<e4m3_t*>(out);
    int64_t i = 0;
    if (!words) {
        for (; i + W <= n; i += W) store(codes + i, load_raw<F>(values + i) / scale);
        for (; i < n; ++i) codes[i] = store_nearest<e4m3_t>(values[i] / scale);
    } else {
        for (; i + W <= n; i += W)
            store_low(codes + i, stochastic_bits<e4m3_t>(load_raw<F>(values + i) / scale, load_raw<U>(words + i)));
        for (; i < n; ++i) codes[i] = store_stochastic<e4m3_t>(values[i] / scale, words[i]);
    }
}

void encode_i8(const float* values, int64_t n, float scale, const uint32_t* words, uint8_t* out) {
    int64_t i = 0;
    if (!words) {
        for (; i + W <= n; i += W) {
            const F whole = clamped(load_raw<F>(values + i) / scale) + kWhole;
            store_low(reinterpret_cast<e4m3_t*>(out + i), bit_cast<U>(whole) & 0xffu);
        }
        for (; i < n; ++i) out[i] = uint8_t(bit_cast<uint32_t>(add(clamped(values[i] / scale), kWhole)));
    } else {
        for (; i < n; ++i) out[i] = stochastic_i8(values[i] / scale, words[i]);
    }
}

void encode(const Coded& c, int64_t first, int64_t n, const float* values, const Draw* draw, uint8_t* out) {
    const auto encode_some = c.type == CodeType::i8 ? &encode_i8 : &encode_e4m3;
    BlockOfWords block;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t size = std::min(kBlock, n - begin);
        const uint32_t* const words =
            draw ? block.in_order(draw->seed, draw->stream, uint64_t(first + begin), size) : nullptr;
        for_rows(c, first + begin, size, [&](int64_t row, int64_t column, int64_t length, int64_t done) {
            for_cells(c, column, length, [&](int64_t cell, int64_t count, int64_t at) {
                const int64_t i = done + at;
                encode_some(values + begin + i, count, scale_of(c, row, cell), words ? words + i : nullptr, out + begin + i);
            });
        });
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The largest finite magnitude; as bits, whose order is that of the numbers.
float largest_of(const float* values, int64_t n) {
    I most{};
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const I m = bit_cast<I>(load_raw<U>(values + i) & 0x7fffffffu);
        most = (m < 0x7f800000) & (m > most) ? m : most;
    }
    int32_t found = 0;
    for (int k = 0; k < W; ++k) found = std::max(found, int32_t(most[k]));
    for (; i < n; ++i) {
        const int32_t m = int32_t(bit_cast<uint32_t>(values[i]) & 0x7fffffffu);
        if (m < 0x7f800000) found = std::max(found, m);
    }
    return bit_cast<float>(found);
}

void measure(const Coded& c, int64_t first, int64_t n, const float* values, float* largest) {
    for_rows(c, first, n, [&](int64_t row, int64_t column, int64_t length, int64_t done) {
        const int64_t line = row / c.rows * grid_rows(c) + row % c.rows / c.block_rows;
        for_cells(c, column, length, [&](int64_t cell, int64_t count, int64_t at) {
            float& most = largest[line * grid_columns(c) + cell];
            most = std::max(most, largest_of(values + done + at, count));
        });
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// What new codes are, beside what there was. A number that is still what its code of before stands for keeps that code.
void keep(int64_t n, const float* values, const float* again, const uint8_t* before, uint8_t* codes) {
    for (int64_t i = 0; i < n; ++i) {
        const float v = values[i], a = again[i];
        const bool same = (v == a) | ((v != v) & (a != a));
        codes[i] = same ? before[i] : codes[i];
    }
}

typedef double D __attribute__((vector_size(8 * W)));

IRES_HD F where(I mask, F x) { return bit_cast<F>(bit_cast<U>(x) & bit_cast<U>(mask)); }

// Sums over the elements in which all is finite, W of them side by side.
Stored count_stored(int64_t n, const float* target, const float* update, const float* values, const float* stored) {
    D dot{}, norm2{}, noise{};
    Stored found;
    const F zero{};
    for (int64_t i = 0; i < n;) {
        const int64_t stop = std::min(n, i + int64_t(W) * (1 << 20));
        I lost{}, nan{};
        for (; i < stop; i += W) {
            F t{}, u{}, v{}, s{};
            const size_t size = size_t(std::min<int64_t>(W, n - i)) * sizeof(float);
            if (size == sizeof(F)) {
                t = load_raw<F>(target + i), u = load_raw<F>(update + i);
                v = load_raw<F>(values + i), s = load_raw<F>(stored + i);
            } else {  // the rest is 0, and counts for nothing
                memcpy(static_cast<void*>(&t), target + i, size), memcpy(static_cast<void*>(&u), update + i, size);
                memcpy(static_cast<void*>(&v), values + i, size), memcpy(static_cast<void*>(&s), stored + i, size);
            }
            lost -= (s == t) & (u != zero) & (u == u);
            nan -= s != s;
            const I is = (s - s) == zero, measured = is & ((t - t) == zero) & ((u - u) == zero), heard = is & ((v - v) == zero);
            const D moved = __builtin_convertvector(where(measured, s), D) - __builtin_convertvector(where(measured, t), D);
            const D by = __builtin_convertvector(where(measured, u), D);
            const D off = __builtin_convertvector(where(heard, s), D) - __builtin_convertvector(where(heard, v), D);
            dot += moved * by;
            norm2 += by * by;
            noise += off * off;
        }
        for (int k = 0; k < W; ++k) found.lost += uint64_t(lost[k]), found.nan_out += uint64_t(nan[k]);
    }
    for (int k = 0; k < W; ++k) found.dot += dot[k], found.norm2 += norm2[k], found.noise += noise[k];
    return found;
}

}  // namespace
}  // namespace IRES_ISA
}  // namespace ires
