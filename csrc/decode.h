// Codes and scales -> f32, a run of a quantized tensor at a time (coded.h), by vectors. Included by loops.cpp alone.
//
// A row goes by cells, the columns that share a scale. Their scales are widened together, kCells at a time; a cell is
// then one loop. What does not start at a whole vector, and codes whose blocks are in an order of their own, go one by one.
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

IRES_HD U extend_u8(const char* p) {
#if IRES_LANES == 8
    return bit_cast<U>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif IRES_LANES == 4 && defined(__SSE4_1__)
    return bit_cast<U>(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(read_at<int32_t>(p, 0))));
#else
    return __builtin_convertvector(load_raw<U8>(p), U);
#endif
}

// e4m3 as a 256th of what it stands for, which is what its bits are as an f16's.
template <Order order> IRES_HD Pair load_256th(const char* p) {
    S8x2 bytes = load_raw<S8x2>(p);
    if constexpr (order == Order::even_odd) bytes = evens_first(bytes, std::make_integer_sequence<int, 2 * W>{});
    const S16x2 w = extend8(bytes);
    const S16x2 h = ((w << 7) & int16_t(0xbfff)) | (((w & 0x7f) == 0x7f) & 0x7c00);
    const f16_t* halves = reinterpret_cast<const f16_t*>(&h);
    return {load(halves), load(halves + W)};
}

#if IRES_LANES == 16
// Of every magnitude of e4m3, as bf16, which holds it: the low and the high byte.
struct alignas(64) Magnitudes {
    uint8_t low[128] = {}, high[128] = {};
    constexpr Magnitudes() {
        for (int code = 0; code < 128; ++code) {
            int exponent = code >> 3, fraction = code & 7;
            if (exponent == 0) {
                for (exponent = 1; fraction != 0 && fraction < 8; fraction *= 2) --exponent;
                fraction &= 7;
            }
            int bits = (exponent + 120) << 7 | fraction << 4;
            if (code == 0) bits = 0;
            if (code == 127) bits = 0x7ff0;  // the NaN that the other loops make of it: tiles change no bit
            low[code] = uint8_t(bits);
            high[code] = uint8_t(bits >> 8);
        }
    }
};
constexpr Magnitudes kMagnitudes;

// What has AVX-512 and can look bytes up in a table of 128, all but the first of such CPUs, needs half the instructions
// for e4m3: 64 codes at a time.
struct Lookup {
    __m512i low[2], high[2];
    static bool here() { return __builtin_cpu_supports("avx512vbmi"); }
    Lookup() {
        for (int k = 0; k < 2; ++k) {
            low[k] = _mm512_load_si512(kMagnitudes.low + 64 * k);
            high[k] = _mm512_load_si512(kMagnitudes.high + 64 * k);
        }
    }

    // By the low 7 bits of each byte. Not the intrinsic: a function of that instruction set is inlined nowhere else.
    IRES_HD static __m512i at(const __m512i (&table)[2], __m512i index) {
        asm("vpermi2b %2, %1, %0" : "+v"(index) : "v"(table[0]), "v"(table[1]));
        return index;
    }

    // As bf16. In even_odd order these follow each other, 32 in each; in halves order unpacking words puts them so.
    template <Order order> IRES_HD void at(const char* codes, U (&out)[2]) const {
        const __m512i raw = _mm512_loadu_si512(codes), sign = _mm512_set1_epi8(char(0x80));
        __m512i x;
        if constexpr (order == Order::even_odd) x = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), raw);
        else x = _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), raw);
        const __m512i a = at(low, x), b = _mm512_ternarylogic_epi32(at(high, x), x, sign, 0xf8);  // | x & sign
        out[0] = bit_cast<U>(_mm512_unpacklo_epi8(a, b));
        out[1] = bit_cast<U>(_mm512_unpackhi_epi8(a, b));
    }
};
#elif IRES_LANES == 8
// The same, 32 codes at a time: their bits are shifted into place. Subnormal numbers, whose magnitudes are 0 to 7, differ
// from that by what tables say.
struct Lookup {
    static bool here() { return true; }

    template <Order order> IRES_HD void at(const char* codes, U (&out)[2]) const {
        const auto all = [](int byte) { return _mm256_set1_epi8(char(byte)); };
        const auto table = [](int64_t bytes) { return _mm256_set_epi64x(bytes, 0, bytes, 0); };  // entries 8 to 15
        const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        __m256i x;
        if constexpr (order == Order::even_odd) x = _mm256_permute4x64_epi64(raw, 0xd8);
        else x = _mm256_permutevar8x32_epi32(raw, _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0));
        const __m256i m = _mm256_and_si256(x, all(0x7f));
        const __m256i nan = _mm256_cmpeq_epi8(m, all(0x7f));
        const __m256i index = _mm256_add_epi8(m, all(0x78));  // from 0x80 on it finds 0
        __m256i low = _mm256_and_si256(_mm256_slli_epi16(m, 4), all(0xf0));
        __m256i high = _mm256_add_epi8(_mm256_and_si256(_mm256_srli_epi16(m, 4), all(0x07)), all(0x3c));
        low = _mm256_add_epi8(low, _mm256_shuffle_epi8(table(int64_t(0xf0e0d0c09060f000)), index));
        high = _mm256_add_epi8(high, _mm256_shuffle_epi8(table(int64_t(0x00000000ffffffc4)), index));
        high = _mm256_and_si256(_mm256_or_si256(high, nan), all(0x7f));
        high = _mm256_or_si256(high, _mm256_and_si256(x, all(0x80)));
        out[0] = bit_cast<U>(_mm256_unpacklo_epi8(low, high));
        out[1] = bit_cast<U>(_mm256_unpackhi_epi8(low, high));
    }
};
#endif

#if IRES_LANES >= 8
// Half of these, widened.
template <Order order> IRES_HD Pair widen_looked_up(U x) {
    if constexpr (order == Order::even_odd) return {bit_cast<F>(U(x << 16)), bit_cast<F>(U(x & 0xffff0000u))};
#if IRES_LANES == 16
    const __m512i zero = _mm512_setzero_si512(), words = bit_cast<__m512i>(x);
    return {bit_cast<F>(_mm512_unpacklo_epi16(zero, words)), bit_cast<F>(_mm512_unpackhi_epi16(zero, words))};
#else
    const __m256i zero = _mm256_setzero_si256(), words = bit_cast<__m256i>(x);
    return {bit_cast<F>(_mm256_unpacklo_epi16(zero, words)), bit_cast<F>(_mm256_unpackhi_epi16(zero, words))};
#endif
}
#endif

// Cells one after the other, each whole; returns how many were done, and of a format without a faster loop none.
template <CodeType type>
int64_t decode_cells([[maybe_unused]] const char* codes, [[maybe_unused]] int64_t width, [[maybe_unused]] int64_t count,
                     [[maybe_unused]] const float* scale, [[maybe_unused]] float* out) {
#if IRES_LANES >= 8
    if constexpr (type == CodeType::e4m3) {
        if (width % (4 * W) != 0 || !Lookup::here()) return 0;
        const Lookup lookup;
        for (int64_t k = 0; k < count; ++k) {
            for (int64_t i = k * width; i < (k + 1) * width; i += 4 * W) {
                __builtin_prefetch(codes + i + kPrefetch);
                U x[2];
                lookup.at<Order::halves>(codes + i, x);
                for (int half = 0; half < 2; ++half) {
                    const Pair y = widen_looked_up<Order::halves>(x[half]), z = {y.a * scale[k], y.b * scale[k]};
                    memcpy(out + i + 2 * W * half, &z, sizeof z);
                }
            }
        }
        return count;
    }
#endif
    return 0;
}

// Returns how many were done: whole vectors, and none where the scale is too large for a multiplication by 256.
template <CodeType type, bool kZero> int64_t decode_bytes(const char* codes, int64_t n, float scale, float zero, float* out) {
    int64_t i = 0;
    if constexpr (type == CodeType::e4m3) {
        const int64_t whole = n - n % (4 * W);
        i = whole * decode_cells<type>(codes, whole, whole > 0, &scale, out);
        if (!(scale < kNearlyLargest && scale > -kNearlyLargest)) return i;
        const float s = scale * 256.0f;  // exact
        for (; i + 2 * W <= n; i += 2 * W) {
            const Pair x = load_256th<Order::halves>(codes + i), y = {x.a * s, x.b * s};
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
// Nibbles: a table of 16, and W of it at a time by the low 4 bits of each lane of an index.
#if IRES_LANES == 16
struct Table {
    __m512 all;
    explicit Table(const float* x) : all(_mm512_loadu_ps(x)) {}
    F at(U index) const { return bit_cast<F>(_mm512_permutexvar_ps(bit_cast<__m512i>(index), all)); }
};
IRES_HD U spread(const char* codes) {  // 8 bytes over 16 lanes
    return bit_cast<U>(_mm512_mask_set1_epi32(_mm512_set1_epi32(read_at<int32_t>(codes, 0)), 0xff00, read_at<int32_t>(codes, 1)));
}
#elif IRES_LANES == 8
struct Table {
    __m256 low, high;
    explicit Table(const float* x) : low(_mm256_loadu_ps(x)), high(_mm256_loadu_ps(x + 8)) {}
    F at(U index) const {
        const __m256i i = bit_cast<__m256i>(index);
        const __m256 a = _mm256_permutevar8x32_ps(low, i), b = _mm256_permutevar8x32_ps(high, i);
        return bit_cast<F>(_mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28))));
    }
};
IRES_HD U spread(const char* codes) { return U{} + read_at<uint32_t>(codes, 0); }  // 4 bytes over 8 lanes
#else
struct Table {
    float all[16];
    explicit Table(const float* x) { memcpy(all, x, sizeof all); }
    F at(U index) const {
        F x;
        for (int i = 0; i < W; ++i) x[i] = all[index[i] & 15u];
        return x;
    }
};
IRES_HD U spread(const char* codes) { return U{} + read_at<uint16_t>(codes, 0); }  // 2 bytes over 4 lanes
#endif

// Where the nibbles of spread bytes are.
IRES_HD U shifts(bool high_first) {
    U shift;
    for (int i = 0; i < W; ++i) shift[i] = uint32_t(4 * (i ^ int(high_first)) % 32);
    return shift;
}

// Whole vectors from a whole byte on; returns how many were done.
template <bool kZero>
IRES_HD int64_t decode_nibbles(const Table& table, U shift, const char* codes, int64_t n, float scale, float zero, float* out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        F x = table.at(spread(codes + i / 2) >> shift);
        if constexpr (kZero) x = x - zero;
        x = x * scale;
        memcpy(out + i, &x, sizeof x);
    }
    return i;
}

// Whole cells one after the other, from a whole byte on, of a width that is known: a loop for each would cost as much again.
template <bool kZero, int64_t kWidth>
void decode_narrow(const Table& table, U shift, const char* codes, int64_t count, const Cells& cells, float* out) {
    for (int64_t k = 0; k < count; ++k)
        decode_nibbles<kZero>(table, shift, codes + k * kWidth / 2, kWidth, cells.scale[k], kZero ? cells.zero[k] : 0.0f,
                              out + k * kWidth);
}

// ---------------------------------------------------------------------------------------------------------------------
// One cell: columns [column, column + n) of a row, whose codes are `codes`.
template <CodeType type, bool kZero>
IRES_HD void decode_cell(const Coded& c, const Table& table, U shift, const char* codes, int64_t column, int64_t n, float scale,
                         float zero, float* out) {
    const auto one = [&](int64_t i) {
        const float code = code_of(c, c.table, codes, column + i);
        out[i] = mul(kZero ? sub(code, zero) : code, scale);
    };
    int64_t i = 0;
    if constexpr (type == CodeType::nibbles) {
        if (column % 2 != 0) one(i++);
        i += decode_nibbles<kZero>(table, shift, codes + (column + i) / 2, n - i, scale, zero, out + i);
    } else {
        i = decode_bytes<type, kZero>(codes + column, n, scale, zero, out);
    }
    for (; i < n; ++i) one(i);
}

template <CodeType type, bool kZero>
void decode_row(const Coded& c, int64_t row, int64_t column, int64_t n, float* out) {
    const char* const codes = row_of_codes(c, row);
    if (c.group) {
        for (int64_t i = 0; i < n; ++i) out[i] = number(c, c.table, row, column + i);
        return;
    }
    const Table table(c.table);
    const U shift = shifts(c.high_first);
    Cells cells;
    for (int64_t i = 0; i < n;) {
        const int64_t first = (column + i) / c.block_columns, last = (column + n - 1) / c.block_columns;
        const int64_t count = std::min<int64_t>(kCells, last - first + 1);
        find_cells(c, row, first, count, cells);
        const bool apart = c.block_columns >= 128;  // cells that are whole cache lines
        const int64_t ahead = std::min((first + count) * c.block_columns - (column + i), n - i);
        if (!apart) prefetch(codes + (column + i) * code_bits(type) / 8, ahead * code_bits(type) / 8);
        int64_t k = 0;
        if (type == CodeType::nibbles && (c.block_columns == 16 || c.block_columns == 32) && (column + i) % c.block_columns == 0) {
            k = std::min(count, (n - i) / c.block_columns);
            const char* const p = codes + (column + i) / 2;
            if (c.block_columns == 16) decode_narrow<kZero, 16>(table, shift, p, k, cells, out + i);
            else decode_narrow<kZero, 32>(table, shift, p, k, cells, out + i);
            i += k * c.block_columns;
        }
        if (type == CodeType::e4m3 && c.block_columns % (4 * W) == 0 && (column + i) % c.block_columns == 0) {
            k = std::min(count, (n - i) / c.block_columns);
            k = decode_cells<type>(codes + column + i, c.block_columns, k, cells.scale, out + i);
            i += k * c.block_columns;
        }
        for (; k < count; ++k) {
            const int64_t length = std::min((first + k + 1) * c.block_columns - (column + i), n - i);
            if (apart) prefetch(codes + (column + i) * code_bits(type) / 8, length * code_bits(type) / 8);
            decode_cell<type, kZero>(c, table, shift, codes, column + i, length, cells.scale[k], kZero ? cells.zero[k] : 0.0f, out + i);
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

// ---------------------------------------------------------------------------------------------------------------------
// The same of the transposed matrices. Lines, columns of what is stored, go by bands of kBand, so that what is read of a
// row is used whole; kRows rows at a time, so that what is written are whole cache lines.
constexpr int64_t kBand = 32, kRows = 16;

typedef uint8_t Row __attribute__((vector_size(kRows)));

IRES_HD void interleave(Row a, Row b, Row& low, Row& high) {
#if defined(__clang__)
    low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
    low = __builtin_shuffle(a, b, Row{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
    high = __builtin_shuffle(a, b, Row{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#endif
}

// Bands of nibbles with a scale for each of the rows, and nothing else.
bool plain_bands(const Coded& c) {
    return c.type == CodeType::nibbles && !c.high_first && c.zero_type == ZeroType::none && !c.group &&
           c.block_columns % kBand == 0;
}

// Lines [from, to) of kRows rows from `row` on, in the band that begins at `column`: transposed as bytes, two lines in
// each. `out` is where the first of these rows is in line 0 of the band.
void decode_band(const Coded& c, const Table& table, int64_t row, int64_t column, int64_t from, int64_t to, float* out) {
    Row a[kRows], b[kRows];
    alignas(64) float scale[kRows];
    for (int64_t k = 0; k < kRows; ++k) {
        memcpy(&a[k], row_of_codes(c, row + k) + column / 2, kRows);
        scale[k] = scale_of(c, row + k, column / c.block_columns);
    }
    const auto round = [](const Row (&x)[kRows], Row (&y)[kRows]) {
        for (int64_t k = 0; k < kRows / 2; ++k) interleave(x[k], x[k + kRows / 2], y[2 * k], y[2 * k + 1]);
    };
    round(a, b);
    round(b, a);
    round(a, b);
    round(b, a);
    for (int64_t line = from; line < to; ++line) {
        const char* const bytes = reinterpret_cast<const char*>(&a[line / 2]);
        for (int64_t k = 0; k < kRows; k += W) {
            const U index = extend_u8(bytes + k);
            const F x = table.at(line % 2 ? U(index >> 4) : index) * load_raw<F>(scale + k);
            memcpy(out + line * c.rows + k, &x, sizeof x);
        }
    }
}

void decode_transposed(const Coded& c, int64_t first, int64_t n, float* out) {
    const DecodeRow decode_row = find_decode_row(c);
    const bool plain = plain_bands(c);
    const Table table(c.table);
    alignas(64) float rows[kRows][kBand];
    for (int64_t done = 0; done < n;) {
        const int64_t line = (first + done) / c.rows, from = (first + done) % c.rows;  // lines of all matrices
        const int64_t matrix = line / c.columns, column = line % c.columns, band = column - column % kBand;
        // Whole lines as far as they go together; else what there is of one.
        const bool whole = from == 0 && n - done >= c.rows;
        const int64_t lines = whole ? std::min({band + kBand - column, c.columns - column, (n - done) / c.rows}) : 1;
        const int64_t to = whole ? c.rows : std::min(c.rows, from + n - done);
        float* const at = out + done - from;
        int64_t row = from;
        if (plain && band + kBand <= c.columns)
            for (; row + kRows <= to; row += kRows)
                decode_band(c, table, matrix * c.rows + row, band, column - band, column - band + lines,
                            at + row - (column - band) * c.rows);
        for (; row < to; row += kRows) {
            const int64_t height = std::min(kRows, to - row);
            for (int64_t k = 0; k < height; ++k) decode_row(c, matrix * c.rows + row + k, column, lines, rows[k]);
            for (int64_t l = 0; l < lines; ++l)
                for (int64_t k = 0; k < height; ++k) at[l * c.rows + row + k] = rows[k][l];
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
