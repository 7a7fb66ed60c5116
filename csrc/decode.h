// Codes and scales -> f32, a run of a quantized tensor at a time (coded.h), by vectors. Included by loops.cpp alone.
//
// A row goes by cells, the columns that share a scale. Their scales are widened together, kCells at a time; a cell is
// then one loop. Products of nibbles come from a table of 16 that is made for each cell: one rounding each, as by
// definition. What does not start at a whole vector, and codes whose blocks are in an order of their own, go one by one.
#pragma once

#include <algorithm>

#include "coded.h"
#include "lanes.h"

namespace ires {
namespace IRES_ISA {
namespace {

constexpr int kCells = 64;
constexpr float kNearlyLargest = 0x1p119f;

// ---------------------------------------------------------------------------------------------------------------------
// Scales and zeros of cells in one row of the grid.
struct alignas(64) Cells {
    float scale[kCells + 2 * W], zero[kCells + 2 * W];
};

template <class T> void widen_scales(const char* from, int64_t n, float* to) {
    alignas(64) T padded[kCells + 2 * W] = {};
    memcpy(static_cast<void*>(padded), from, size_t(n) * sizeof(T));
    for (int64_t i = 0; i < n; i += 2 * W) {
        const Pair x = load_pair<Order::halves>(padded + i);
        memcpy(to + i, &x, sizeof x);
    }
}

// `n` cells of the row from column `cell` of the grid on.
void find_cells(const Coded& c, int64_t row, int64_t cell, int64_t n, Cells& cells) {
    const int64_t matrix = row / c.rows, first = (matrix * grid_rows(c) + row % c.rows / c.block_rows) * grid_columns(c) + cell;
    const char* const from = c.scale + first * scale_bytes(c.scale_type);
    float* const s = cells.scale;
    if (n <= 2) {  // blocks of whole rows: nothing to widen together
        for (int64_t i = 0; i < n; ++i) s[i] = stored_scale(c, first + i);
    } else {
        switch (c.scale_type) {
            case ScaleType::f32: memcpy(s, from, size_t(n) * 4); break;
            case ScaleType::f16: widen_scales<f16_t>(from, n, s); break;
            case ScaleType::bf16: widen_scales<bf16_t>(from, n, s); break;
            case ScaleType::e4m3: widen_scales<e4m3_t>(from, n, s); break;
            case ScaleType::e8m0:
                for (int64_t i = 0; i < n; ++i) s[i] = widen_e8m0(uint8_t(from[i]));
                break;
        }
    }
    if (c.second != Second::none) {
        const float second = read_at<float>(c.over, c.seconds == 1 ? 0 : matrix);
        if (c.second == Second::times)
            for (int64_t i = 0; i < n; ++i) s[i] = mul(s[i], second);
        else
            for (int64_t i = 0; i < n; ++i) s[i] = divided(s[i], second);
    }
    if (c.zero_type != ZeroType::none)
        for (int64_t i = 0; i < n; ++i) cells.zero[i] = zero_of(c, row, cell + i);
}

// ---------------------------------------------------------------------------------------------------------------------
// Bytes.
IRES_HD F widen_i8(const char* p) {
#if IRES_LANES == 16
    return bit_cast<F>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_raw<__m128i>(p))));
#elif IRES_LANES == 8
    return bit_cast<F>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__SSE4_1__)
    return bit_cast<F>(_mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(read_at<int32_t>(p, 0)))));
#else
    F x;
    for (int i = 0; i < W; ++i) x[i] = float(int8_t(p[i]));
    return x;
#endif
}

// e4m3 as a 256th of what it stands for, which is what its bits are as an f16's.
IRES_HD Pair load_256th(const char* p) {
    const S16x2 w = extend8(load_raw<S8x2>(p));
    const S16x2 h = ((w << 7) & int16_t(0xbfff)) | (((w & 0x7f) == 0x7f) & 0x7c00);
    const f16_t* halves = reinterpret_cast<const f16_t*>(&h);
    return {load(halves), load(halves + W)};
}

// Returns how many were done: whole vectors, and none where the scale is too large for a multiplication by 256.
template <CodeType type, bool kZero> int64_t decode_bytes(const char* codes, int64_t n, float scale, float zero, float* out) {
    int64_t i = 0;
    if constexpr (type == CodeType::e4m3) {
        if (!(scale < kNearlyLargest && scale > -kNearlyLargest)) return 0;
        const float s = scale * 256.0f;  // exact
        for (; i + 2 * W <= n; i += 2 * W) {
            const Pair x = load_256th(codes + i), y = {x.a * s, x.b * s};
            memcpy(out + i, &y, sizeof y);
        }
    } else if constexpr (type == CodeType::e5m2) {
        for (; i + 2 * W <= n; i += 2 * W) {
            const Pair x = load_pair<Order::halves>(reinterpret_cast<const e5m2_t*>(codes + i)), y = {x.a * scale, x.b * scale};
            memcpy(out + i, &y, sizeof y);
        }
    } else {
        for (; i + W <= n; i += W) {
            F x = widen_i8(codes + i);
            if constexpr (type == CodeType::u8_less_128) x = x + (x < 0.0f ? F{} + 128.0f : F{} - 128.0f);
            if constexpr (kZero) x = x - zero;
            const F y = x * scale;
            memcpy(out + i, &y, sizeof y);
        }
    }
    return i;
}

// ---------------------------------------------------------------------------------------------------------------------
// Nibbles: `products` has what each stands for. `codes` begins with a whole byte; returns how many were done.
#if IRES_LANES == 16
struct Products {
    __m512 all;
    Products(const float (&table)[16], float scale, float zero, bool has_zero) {
        __m512 x = _mm512_loadu_ps(table);
        if (has_zero) x = _mm512_sub_ps(x, _mm512_set1_ps(zero));
        all = _mm512_mul_ps(x, _mm512_set1_ps(scale));
    }
    template <bool kHighFirst> int64_t decode(const char* codes, int64_t n, float* out) const {
        const __m512i low = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
        const __m512i high = _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4);
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {
            const __m512i first = _mm512_set1_epi32(read_at<int32_t>(codes + i / 2, 0));
            const __m512i both = _mm512_mask_set1_epi32(first, 0xff00, read_at<int32_t>(codes + i / 2, 1));
            const __m512i index = _mm512_srlv_epi32(both, kHighFirst ? high : low);
            _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, all));
        }
        return i;
    }
};
#elif IRES_LANES == 8
struct Products {
    __m256 low_half, high_half;
    Products(const float (&table)[16], float scale, float zero, bool has_zero) {
        __m256 x = _mm256_loadu_ps(table), y = _mm256_loadu_ps(table + 8);
        if (has_zero) {
            x = _mm256_sub_ps(x, _mm256_set1_ps(zero));
            y = _mm256_sub_ps(y, _mm256_set1_ps(zero));
        }
        low_half = _mm256_mul_ps(x, _mm256_set1_ps(scale));
        high_half = _mm256_mul_ps(y, _mm256_set1_ps(scale));
    }
    template <bool kHighFirst> int64_t decode(const char* codes, int64_t n, float* out) const {
        const __m256i low = _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0), high = _mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4);
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) {
            const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(read_at<int32_t>(codes + i / 2, 0)), kHighFirst ? high : low);
            const __m256 x = _mm256_permutevar8x32_ps(low_half, index), y = _mm256_permutevar8x32_ps(high_half, index);
            _mm256_storeu_ps(out + i, _mm256_blendv_ps(x, y, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28))));
        }
        return i;
    }
};
#else
struct Products {
    float all[16];
    Products(const float (&table)[16], float scale, float zero, bool has_zero) {
        for (int i = 0; i < 16; ++i) all[i] = mul(has_zero ? sub(table[i], zero) : table[i], scale);
    }
    template <bool kHighFirst> int64_t decode(const char* codes, int64_t n, float* out) const {
        int64_t i = 0;
        for (; i + 2 <= n; i += 2) {
            const uint8_t byte = uint8_t(codes[i / 2]);
            out[i] = all[kHighFirst ? byte >> 4 : byte & 15];
            out[i + 1] = all[kHighFirst ? byte & 15 : byte >> 4];
        }
        return i;
    }
};
#endif

// ---------------------------------------------------------------------------------------------------------------------
// One cell: columns [column, column + n) of a row, whose codes are `codes`.
template <CodeType type, bool kZero>
IRES_HD void decode_cell(const Coded& c, const char* codes, int64_t column, int64_t n, float scale, float zero, float* out) {
    const auto one = [&](int64_t i) {
        const float code = code_of(c, codes, column + i);
        out[i] = mul(kZero ? sub(code, zero) : code, scale);
    };
    int64_t i = 0;
    if constexpr (type == CodeType::nibbles) {
        if (column % 2 != 0) one(i++);
        const Products products(c.table, scale, zero, kZero);
        const char* const p = codes + (column + i) / 2;
        i += c.high_first ? products.template decode<true>(p, n - i, out + i) : products.template decode<false>(p, n - i, out + i);
    } else {
        i = decode_bytes<type, kZero>(codes + column, n, scale, zero, out);
    }
    for (; i < n; ++i) one(i);
}

template <CodeType type, bool kZero>
void decode_row(const Coded& c, int64_t row, int64_t column, int64_t n, float* out) {
    const char* const codes = row_of_codes(c, row);
    if (c.group) {
        for (int64_t i = 0; i < n; ++i) out[i] = number(c, row, column + i);
        return;
    }
    Cells cells;
    for (int64_t i = 0; i < n;) {
        const int64_t first = (column + i) / c.block_columns, last = (column + n - 1) / c.block_columns;
        const int64_t count = std::min<int64_t>(kCells, last - first + 1);
        find_cells(c, row, first, count, cells);
        const bool apart = c.block_columns >= 128;  // cells that are whole cache lines
        const int64_t ahead = std::min((first + count) * c.block_columns - (column + i), n - i);
        if (!apart) prefetch(codes + (column + i) * code_bits(type) / 8, ahead * code_bits(type) / 8);
        for (int64_t k = 0; k < count; ++k) {
            const int64_t length = std::min((first + k + 1) * c.block_columns - (column + i), n - i);
            if (apart) prefetch(codes + (column + i) * code_bits(type) / 8, length * code_bits(type) / 8);
            decode_cell<type, kZero>(c, codes, column + i, length, cells.scale[k], kZero ? cells.zero[k] : 0.0f, out + i);
            i += length;
        }
    }
}

using DecodeRow = void (*)(const Coded&, int64_t, int64_t, int64_t, float*);

DecodeRow find_decode_row(const Coded& c) {
    const bool zero = c.zero_type != ZeroType::none;
    switch (c.type) {
        case CodeType::e4m3: return &decode_row<CodeType::e4m3, false>;
        case CodeType::e5m2: return &decode_row<CodeType::e5m2, false>;
        case CodeType::i8: return zero ? &decode_row<CodeType::i8, true> : &decode_row<CodeType::i8, false>;
        case CodeType::u8_less_128:
            return zero ? &decode_row<CodeType::u8_less_128, true> : &decode_row<CodeType::u8_less_128, false>;
        default: return zero ? &decode_row<CodeType::nibbles, true> : &decode_row<CodeType::nibbles, false>;
    }
}

// Numbers [first, first + n) of the tensor as it is stored.
void decode_stored(const Coded& c, int64_t first, int64_t n, float* out) {
    const DecodeRow decode_row = find_decode_row(c);
    for (int64_t done = 0; done < n;) {
        const int64_t row = (first + done) / c.columns, column = (first + done) % c.columns;
        const int64_t length = std::min(c.columns - column, n - done);
        decode_row(c, row, column, length, out + done);
        done += length;
    }
}

// The same of the transposed matrices. Lines, columns of what is stored, go by bands of kBand, so that what is decoded
// of a row is used whole; kRows rows at a time, so that what is written are whole cache lines.
constexpr int64_t kBand = 32, kRows = 16;

void decode_transposed(const Coded& c, int64_t first, int64_t n, float* out) {
    const DecodeRow decode_row = find_decode_row(c);
    alignas(64) float rows[kRows][kBand];
    for (int64_t done = 0; done < n;) {
        const int64_t line = (first + done) / c.rows, from = (first + done) % c.rows;  // lines of all matrices
        const int64_t matrix = line / c.columns, column = line % c.columns;
        // Whole lines as far as they go together; else what there is of one.
        const bool whole = from == 0 && n - done >= c.rows;
        const int64_t lines = whole ? std::min({kBand - column % kBand, c.columns - column, (n - done) / c.rows}) : 1;
        const int64_t to = whole ? c.rows : std::min(c.rows, from + n - done);
        float* const at = out + done - from;
        for (int64_t row = from; row < to; row += kRows) {
            const int64_t height = std::min(kRows, to - row);
            for (int64_t k = 0; k < height; ++k) decode_row(c, matrix * c.rows + row + k, column, lines, rows[k]);
            if (height == kRows) {
                for (int64_t l = 0; l < lines; ++l)
                    for (int64_t k = 0; k < kRows; ++k) at[l * c.rows + row + k] = rows[k][l];
            } else {
                for (int64_t l = 0; l < lines; ++l)
                    for (int64_t k = 0; k < height; ++k) at[l * c.rows + row + k] = rows[k][l];
            }
        }
        done += whole ? lines * c.rows : to - from;
    }
}

void decode(const Coded& c, int64_t first, int64_t n, float* out) {
    c.transposed ? decode_transposed(c, first, n, out) : decode_stored(c, first, n, out);
}

}  // namespace
}  // namespace IRES_ISA
}  // namespace ires
