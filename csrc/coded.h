// Quantized tensors: how their bytes stand for numbers, one at a time. The definition that decode.h vectorises, and what a
// thread of a GPU does. See docs/numerics.md.
//
//   number = RN((code - zero) * scale)    code: a small integer or float, exact in f32; zero: a small integer, or none
//   scale  = widened, or RN(scale * second), or RN(scale / second)
//
// What is stored are matrices [rows, columns], one after the other, with a grid of scales over each: one for every block
// of [block_rows, block_columns], cut at the edges. Rows of codes begin at whole bytes. Floats have no zero.
#pragma once

#include "arith.h"

namespace ires {

// The orders are part of the Python binding (backends/coded.py).
enum class CodeType : int { e4m3, e5m2, i8, u8_less_128, nibbles };
enum class ScaleType : int { f32, f16, bf16, e4m3, e8m0 };
enum class ZeroType : int { none, i8, nibbles_less_8, bytes_less_128 };  // the last two packed down the rows, into u32
enum class Second : int { none, times, over };

struct Coded {
    CodeType type;
    bool high_first;   // of the two nibbles of a byte; otherwise the low one is
    bool transposed;   // the numbers are [columns, rows] of what is stored
    float table[16];   // what nibbles stand for
    int64_t matrices, rows, columns, row_bytes;
    int64_t block_rows, block_columns;
    ScaleType scale_type;
    ZeroType zero_type;
    Second second;
    int64_t seconds;  // 1, or one for each matrix
    const char* codes;
    int64_t skipped;  // bytes of codes in front of `codes`
    const char* scale;
    const char* zero;
    const char* over;  // f32: the second scale
    const char* group;  // i32: the block column of each column; null or below 0: column / block_columns
};

IRES_HD int64_t grid_columns(const Coded& c) { return (c.columns + c.block_columns - 1) / c.block_columns; }
IRES_HD int64_t grid_rows(const Coded& c) { return (c.rows + c.block_rows - 1) / c.block_rows; }

IRES_HD int code_bits(CodeType type) { return type == CodeType::nibbles ? 4 : 8; }
IRES_HD int scale_bytes(ScaleType type) { return type == ScaleType::f32 ? 4 : type <= ScaleType::bf16 ? 2 : 1; }

template <class T> IRES_HD T read_at(const char* p, int64_t i) {
    T x;
    memcpy(static_cast<void*>(&x), p + i * int64_t(sizeof(T)), sizeof x);
    return x;
}

IRES_HD float widen_e8m0(uint32_t b) { return bit_cast<float>(b == 0 ? 0x00400000u : b == 255 ? 0x7fc00000u : b << 23); }

IRES_HD float stored_scale(const Coded& c, int64_t i) {
    switch (c.scale_type) {
        case ScaleType::f32: return read_at<float>(c.scale, i);
        case ScaleType::f16: return widen(read_at<f16_t>(c.scale, i));
        case ScaleType::bf16: return widen(read_at<bf16_t>(c.scale, i));
        case ScaleType::e4m3: return widen(read_at<e4m3_t>(c.scale, i));
        default: return widen_e8m0(read_at<uint8_t>(c.scale, i));
    }
}

IRES_HD float divided(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

// `row` counts through all matrices.
IRES_HD float scale_of(const Coded& c, int64_t row, int64_t cell_column) {
    const int64_t matrix = row / c.rows;
    const float s = stored_scale(c, (matrix * grid_rows(c) + row % c.rows / c.block_rows) * grid_columns(c) + cell_column);
    if (c.second == Second::none) return s;
    const float second = read_at<float>(c.over, c.seconds == 1 ? 0 : matrix);
    return c.second == Second::times ? mul(s, second) : divided(s, second);
}

IRES_HD float zero_of(const Coded& c, int64_t row, int64_t cell_column) {
    const int64_t cell_row = row % c.rows / c.block_rows, columns = grid_columns(c);
    if (c.zero_type == ZeroType::none) return 0.0f;
    if (c.zero_type == ZeroType::i8)
        return float(read_at<int8_t>(c.zero, (row / c.rows * grid_rows(c) + cell_row) * columns + cell_column));
    const int64_t per = c.zero_type == ZeroType::nibbles_less_8 ? 8 : 4, bits = 32 / per;  // of a word
    const int64_t line = row / c.rows * grid_rows(c) + cell_row;
    const uint32_t word = read_at<uint32_t>(c.zero, line / per * columns + cell_column);
    const int code = int(word >> (line % per * bits) & ((1u << bits) - 1u));
    return float(code - (1 << (bits - 1)));
}

IRES_HD int64_t cell_column_of(const Coded& c, int64_t column) {
    const int64_t group = c.group ? read_at<int32_t>(c.group, column) : -1;
    return group < 0 ? column / c.block_columns : group;
}

IRES_HD const char* row_of_codes(const Coded& c, int64_t row) { return c.codes + (row * c.row_bytes - c.skipped); }

IRES_HD uint32_t nibble(const Coded& c, uint8_t byte, int64_t column) {
    return (column & 1) != int64_t(c.high_first) ? byte >> 4 : byte & 15u;
}

// The code as a number, before anything is taken from it. `table` is c.table, or a copy that is nearer.
IRES_HD float code_of(const Coded& c, const float* table, const char* codes, int64_t column) {
    switch (c.type) {
        case CodeType::e4m3: return widen(read_at<e4m3_t>(codes, column));
        case CodeType::e5m2: return widen(read_at<e5m2_t>(codes, column));
        case CodeType::i8: return float(read_at<int8_t>(codes, column));
        case CodeType::u8_less_128: return float(int(read_at<uint8_t>(codes, column)) - 128);
        default: return table[nibble(c, read_at<uint8_t>(codes, column / 2), column)];
    }
}

IRES_HD float number(const Coded& c, const float* table, int64_t row, int64_t column) {
    const int64_t cell = cell_column_of(c, column);
    float code = code_of(c, table, row_of_codes(c, row), column);
    if (c.zero_type != ZeroType::none) code = sub(code, zero_of(c, row, cell));
    return mul(code, scale_of(c, row, cell));
}

}  // namespace ires
