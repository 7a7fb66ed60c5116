// The body of the GPU kernels: what one thread of one block does. cuda.cu wraps it in kernels, tests/emulate.cpp in loops.
//
// A block computes one tile of one tensor. Where the tile is whole and every operand's address allows it, a thread takes
// `vector` neighbouring elements at a time, `unroll` times, by accesses of up to 16 bytes, loads first; elsewhere the same
// elements one by one. Three kinds of kernel: fixed types (the hot mixes, below), mixed types
// (a switch that goes the same way for all threads), and strided.
#pragma once

#include "schedule.h"

// Every access to a tensor: where, how many bytes, and what the address has to be a multiple of. tests/emulate.cpp looks.
#ifndef IRES_ACCESS
#define IRES_ACCESS(address, bytes, multiple) ((void)0)
#endif

namespace ires {
namespace gpu {

// ---------------------------------------------------------------------------------------------------------------------
// Memory <-> registers.
template <int kBytes> struct alignas(kBytes < 16 ? kBytes : 16) Raw {
    uint32_t w[kBytes / 4];
};

template <int kBytes> IRES_HD void load_raw(const char* p, uint32_t* w) {
    IRES_ACCESS(p, kBytes, alignof(Raw<kBytes>));
    const Raw<kBytes> raw = *reinterpret_cast<const Raw<kBytes>*>(p);
    IRES_UNROLL
    for (int j = 0; j < kBytes / 4; ++j) w[j] = raw.w[j];
}

template <int kBytes> IRES_HD void store_raw(char* p, const uint32_t* w) {
    IRES_ACCESS(p, kBytes, alignof(Raw<kBytes>));
    Raw<kBytes> raw;
    IRES_UNROLL
    for (int j = 0; j < kBytes / 4; ++j) raw.w[j] = w[j];
    *reinterpret_cast<Raw<kBytes>*>(p) = raw;
}

// One element at any address: byte by byte where it is not a multiple of the size, because a GPU traps there.
template <class T> IRES_HD T load_one(const char* p) {
    IRES_ACCESS(p, sizeof(T), 1);
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T) == 0) return *reinterpret_cast<const T*>(p);
    uint64_t bits = 0;
    IRES_UNROLL
    for (unsigned b = 0; b < sizeof(T); ++b) bits |= uint64_t(uint8_t(p[b])) << (8 * b);
    T x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

template <class T> IRES_HD void store_one(char* p, T x) {
    IRES_ACCESS(p, sizeof(T), 1);
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T) == 0) {
        *reinterpret_cast<T*>(p) = x;
        return;
    }
    uint64_t bits = 0;
    memcpy(&bits, &x, sizeof x);
    IRES_UNROLL
    for (unsigned b = 0; b < sizeof(T); ++b) p[b] = char(bits >> (8 * b));
}

// ---------------------------------------------------------------------------------------------------------------------
// Registers <-> C: V neighbouring elements.
template <class T, class C, int V> IRES_HD void unpack(const uint32_t* w, C (&x)[V]) {
    IRES_UNROLL
    for (int j = 0; j < V; ++j) {
        if constexpr (sizeof(T) == 8) {
            x[j] = bit_cast<double>(uint64_t(w[2 * j + 1]) << 32 | w[2 * j]);
        } else if constexpr (sizeof(T) == 4) {
            x[j] = C(bit_cast<float>(w[j]));
        } else if (j % 2 == 0) {
            const Two two = widen_two<T>(sizeof(T) == 2 ? w[j / 2] : w[j / 4] >> (j % 4 * 8) & 0xffffu);
            x[j] = C(two.a);
            x[j + 1] = C(two.b);
        }
    }
}

IRES_HD float single(float x) { return x; }
IRES_HD float single(double x) { return narrow_to_odd(x); }

template <class T, class C, int V> IRES_HD void pack_nearest(const C (&x)[V], uint32_t* w) {
    IRES_UNROLL
    for (int j = 0; j < V; ++j) {
        if constexpr (sizeof(T) == 8) {
            w[2 * j] = uint32_t(bit_cast<uint64_t>(x[j]));
            w[2 * j + 1] = uint32_t(bit_cast<uint64_t>(x[j]) >> 32);
        } else if constexpr (sizeof(T) == 4) {
            w[j] = bit_cast<uint32_t>(store_nearest<float>(x[j]));
        } else if (j % 2 == 0) {
            const uint32_t two = nearest_two<T>(single(x[j]), single(x[j + 1]));
            if (sizeof(T) == 2) w[j / 2] = two;
            else w[j / 4] = j % 4 ? w[j / 4] | two << 16 : two;
        }
    }
}

template <class T, class C, int V> IRES_HD void pack_stochastic(const C (&x)[V], const uint32_t (&random)[V], uint32_t* w) {
    constexpr int kPer = 4 / int(sizeof(T));  // elements of a register
    IRES_UNROLL
    for (int j = 0; j < V; ++j) {
        const uint32_t bits = storage_bits(store_stochastic<T>(x[j], random[j]));
        w[j / kPer] = j % kPer ? w[j / kPer] | bits << (j % kPer * 32 / kPer) : bits;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Random words of the elements at index, index + 1, …
constexpr uint64_t kCounterMask = ~uint64_t(0) >> 2;

template <int V> IRES_HD void random_words(uint64_t seed, uint64_t stream, uint64_t index, uint32_t (&out)[V]) {
    const uint64_t counter = index >> 2;
    uint32_t all[V + 4];
    const auto draw = [&](int block) {
        const Words words = philox(seed, stream, (counter + uint64_t(block)) & kCounterMask);
        IRES_UNROLL
        for (int j = 0; j < 4; ++j) all[4 * block + j] = words.w[j];
    };
    IRES_UNROLL
    for (int block = 0; block < V / 4; ++block) draw(block);
    if (index % 4 != 0) {
        draw(V / 4);
        IRES_UNROLL
        for (int j = 0; j < V + 3; ++j) all[j] = index & 1 ? all[j + 1] : all[j];
        IRES_UNROLL
        for (int j = 0; j < V; ++j) all[j] = index & 2 ? all[j + 2] : all[j];
    }
    IRES_UNROLL
    for (int j = 0; j < V; ++j) out[j] = all[j];
}

IRES_HD uint32_t random_word(uint64_t seed, uint64_t stream, uint64_t index) {
    const Words x = philox(seed, stream, index >> 2);
    const uint32_t low = index & 1 ? x.w[1] : x.w[0], high = index & 1 ? x.w[3] : x.w[2];
    return index & 2 ? high : low;
}

// Rounds V neighbouring elements and writes them to an address fit for it; one element to any address.
template <class T, bool kStochastic, class C, int V>
IRES_HD void put(char* out, const C (&x)[V], uint64_t seed, uint64_t stream, uint64_t index) {
    if constexpr (V == 1 && kStochastic) {
        store_one(out, store_stochastic<T>(x[0], random_word(seed, stream, index)));
    } else if constexpr (V == 1) {
        store_one(out, store_nearest<T>(x[0]));
    } else {
        uint32_t w[V * sizeof(T) / 4];
        if constexpr (kStochastic) {
            uint32_t random[V];
            random_words(seed, stream, index, random);
            pack_stochastic<T>(x, random, w);
        } else {
            pack_nearest<T>(x, w);
        }
        store_raw<V * sizeof(T)>(out, w);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The table.
struct Tile {
    uint32_t at;    // of its tensor in the words
    int64_t begin;  // first element; may lie in front of the tensor
    int64_t n;      // elements of the tensor
    uint64_t stream;
};

template <class Table> IRES_HD uint32_t tiles_up_to(const Table& table, uint32_t operands, uint32_t item) {
    return uint32_t(table.words[ends_at(operands) + item / 2] >> (item % 2 * 32));
}

template <class Table> IRES_HD Tile find_tile(const Table& table, uint32_t operands, uint32_t block, int elements) {
    uint32_t low = 0, high = table.head.items - 1;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (tiles_up_to(table, operands, middle) <= block) low = middle + 1;
        else high = middle;
    }
    if (low > 0) block -= tiles_up_to(table, operands, low - 1);
    const uint32_t at = items_at(operands, table.head.items) + low * item_words(operands);
    const uint64_t* rest = table.words + at + operands;
    return {at, int64_t(rest[1]) + int64_t(block) * elements, int64_t(rest[0]), rest[2]};
}

template <class Table> IRES_HD char* pointer(const Table& table, uint32_t at, uint32_t operand, int64_t bytes) {
    return reinterpret_cast<char*>(uintptr_t(table.words[at + operand])) + bytes;
}

template <class C, class Table> IRES_HD C factor_of(const Table& table, uint32_t operand) {
    if constexpr (sizeof(C) == 8) return bit_cast<double>(table.words[operand]);
    else return bit_cast<float>(uint32_t(table.words[operand]));
}

IRES_HD bool aligned(const char* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % uintptr_t(bytes) == 0; }

// ---------------------------------------------------------------------------------------------------------------------
// Fixed types. Absent inputs have the type of the first.
constexpr int smaller(int a, int b) { return a < b ? a : b; }

template <class T> struct TypeOf;
template <> struct TypeOf<float> { static constexpr DType value = DType::f32; };
template <> struct TypeOf<f16_t> { static constexpr DType value = DType::f16; };
template <> struct TypeOf<bf16_t> { static constexpr DType value = DType::bf16; };
template <> struct TypeOf<e4m3_t> { static constexpr DType value = DType::e4m3; };

template <class Op_, class Out_, class T0_, class T1_ = T0_, class T2_ = T0_> struct Mix {
    using Op = Op_;
    using Out = Out_;
    using T0 = T0_;
    using T1 = T1_;
    using T2 = T2_;
    static constexpr int kInputs = Op::kInputs;
    static constexpr bool kNarrows = sizeof(Out) < 4;
    // The widest accesses that leave no gaps between the threads' stores: gaps in loads are filled from the L1 cache.
    static constexpr int kNarrowest = smaller(sizeof(T0), smaller(sizeof(T1), sizeof(T2)));
    static constexpr int kVector = smaller(16 / int(sizeof(Out)), 16 / kNarrowest);
    static constexpr int kBytes = kVector * int(sizeof(T0) + (kInputs > 1) * sizeof(T1) + (kInputs > 2) * sizeof(T2));
    static constexpr int kUnroll = kBytes >= 32 ? 2 : 4;  // 64 to 96 bytes in flight a thread
    static constexpr int kTile = kThreads * kVector * kUnroll;
    static Fixed fixed() {
        const DType out = TypeOf<Out>::value, t0 = TypeOf<T0>::value, t1 = TypeOf<T1>::value, t2 = TypeOf<T2>::value;
        return {Op::kCode, kInputs + 1, {out, t0, t1, t2}, kVector, kUnroll};
    }
};

template <class... M> struct MixList {
    static std::vector<Fixed> fixed() { return {M::fixed()...}; }
};

using Hot = MixList<
    Mix<Subtract, bf16_t, bf16_t>, Mix<Subtract, float, bf16_t>, Mix<Subtract, f16_t, f16_t>, Mix<Subtract, float, f16_t>,
    Mix<Subtract, float, float>,
    Mix<AddOne, bf16_t, bf16_t, bf16_t>, Mix<AddOne, bf16_t, bf16_t, float>, Mix<AddOne, bf16_t, bf16_t, e4m3_t>,
    Mix<AddOne, f16_t, f16_t, f16_t>, Mix<AddOne, f16_t, f16_t, float>, Mix<AddOne, f16_t, f16_t, e4m3_t>,
    Mix<AddOne, float, float, float>,
    Mix<Scale, bf16_t, bf16_t>, Mix<Scale, f16_t, f16_t>, Mix<Scale, float, float>,
    Mix<AddDifference, bf16_t, bf16_t>, Mix<AddDifference, f16_t, f16_t>, Mix<AddDifference, float, float>>;

template <class Op, class C> IRES_HD C compute(C factor, const C* in) { return Op::result(in, Op::update(factor, in)); }

template <class M, bool kStochastic, class Table>
IRES_HD void fixed_tile(const Table& table, uint32_t block, uint32_t thread) {
    using Op = typename M::Op;
    using Out = typename M::Out;
    using T0 = typename M::T0;
    using T1 = typename M::T1;
    using T2 = typename M::T2;
    constexpr int V = M::kVector, kUnroll = M::kUnroll, kInputs = M::kInputs;
    const Tile tile = find_tile(table, kInputs + 1, block, M::kTile);
    const float factor = factor_of<float>(table, kInputs);
    const uint64_t seed = table.head.seed, index = table.head.offset + uint64_t(tile.begin);
    char* const out = pointer(table, tile.at, 0, tile.begin * int64_t(sizeof(Out)));
    const char* const in0 = pointer(table, tile.at, 1, tile.begin * int64_t(sizeof(T0)));
    const char* const in1 = kInputs > 1 ? pointer(table, tile.at, 2, tile.begin * int64_t(sizeof(T1))) : in0;
    const char* const in2 = kInputs > 2 ? pointer(table, tile.at, 3, tile.begin * int64_t(sizeof(T2))) : in0;

    const bool whole = tile.begin >= 0 && tile.begin + M::kTile <= tile.n;
    if (whole && aligned(out, access_bytes(sizeof(Out), V)) && aligned(in0, access_bytes(sizeof(T0), V)) &&
        aligned(in1, access_bytes(sizeof(T1), V)) && aligned(in2, access_bytes(sizeof(T2), V))) {
        uint32_t a[kUnroll][V * sizeof(T0) / 4], b[kUnroll][V * sizeof(T1) / 4], c[kUnroll][V * sizeof(T2) / 4];
        IRES_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
            const uint32_t i = (uint32_t(u) * kThreads + thread) * V;
            load_raw<V * sizeof(T0)>(in0 + i * sizeof(T0), a[u]);
            if constexpr (kInputs > 1) load_raw<V * sizeof(T1)>(in1 + i * sizeof(T1), b[u]);
            if constexpr (kInputs > 2) load_raw<V * sizeof(T2)>(in2 + i * sizeof(T2), c[u]);
        }
        IRES_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
            const uint32_t i = (uint32_t(u) * kThreads + thread) * V;
            float x0[V], x1[V], x2[V], y[V];
            unpack<T0>(a[u], x0);
            if constexpr (kInputs > 1) unpack<T1>(b[u], x1);
            if constexpr (kInputs > 2) unpack<T2>(c[u], x2);
            IRES_UNROLL
            for (int j = 0; j < V; ++j) {
                float in[3] = {x0[j]};
                if constexpr (kInputs > 1) in[1] = x1[j];
                if constexpr (kInputs > 2) in[2] = x2[j];
                y[j] = compute<Op>(factor, in);
            }
            put<Out, kStochastic>(out + i * sizeof(Out), y, seed, tile.stream, index + i);
        }
    } else {
        IRES_ROLLED
        for (int e = 0; e < kUnroll * V; ++e) {
            const uint32_t i = uint32_t(e) * kThreads + thread;
            if (tile.begin + int64_t(i) < 0 || tile.begin + int64_t(i) >= tile.n) continue;
            float in[3] = {widen(load_one<T0>(in0 + i * sizeof(T0)))};
            if constexpr (kInputs > 1) in[1] = widen(load_one<T1>(in1 + i * sizeof(T1)));
            if constexpr (kInputs > 2) in[2] = widen(load_one<T2>(in2 + i * sizeof(T2)));
            const float y[1] = {compute<Op>(factor, in)};
            put<Out, kStochastic>(out + i * sizeof(Out), y, seed, tile.stream, index + i);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Mixed types. An operation as its operands arrive one after another; k counts operands, the output among them.
template <class C, int V> struct Value {
    C v[V], minuend[V];

    IRES_HD void take(OpCode code, uint32_t k, C factor, const C (&x)[V]) {
        IRES_UNROLL
        for (int j = 0; j < V; ++j) {
            if (code == OpCode::scale) {
                v[j] = compute<Scale>(factor, &x[j]);
            } else if (k == 1) {
                v[j] = x[j];
            } else if (code == OpCode::subtract) {
                const C in[] = {v[j], x[j]};
                v[j] = compute<Subtract>(factor, in);
            } else if (code == OpCode::add) {
                const C in[] = {v[j], x[j]};
                v[j] = compute<AddOne>(factor, in);
            } else if (k % 2 == 0) {
                minuend[j] = x[j];
            } else {
                const C in[] = {v[j], minuend[j], x[j]};
                v[j] = compute<AddDifference>(factor, in);
            }
        }
    }
};

template <class Table> IRES_HD DType type_of(const Table& table, uint32_t operand) {
    return DType(int(table.words[types_at(table.head.operands) + operand]));
}

// The types as cases. With C = float there is no f64.
template <class C, int V> IRES_HD void unpack_mixed(DType type, const uint32_t* w, C (&x)[V]) {
    switch (type) {
        case DType::f64:
            if constexpr (sizeof(C) == 8) unpack<double>(w, x);
            return;
        case DType::f32: return unpack<float>(w, x);
        case DType::f16: return unpack<f16_t>(w, x);
        case DType::bf16: return unpack<bf16_t>(w, x);
        case DType::e4m3: return unpack<e4m3_t>(w, x);
        case DType::e5m2: return unpack<e5m2_t>(w, x);
    }
}

template <class C> IRES_HD C load_one_mixed(DType type, const char* p) {
    switch (type) {
        case DType::f64:
            if constexpr (sizeof(C) == 8) return load_one<double>(p);
            return 0;
        case DType::f32: return C(load_one<float>(p));
        case DType::f16: return C(widen(load_one<f16_t>(p)));
        case DType::bf16: return C(widen(load_one<bf16_t>(p)));
        case DType::e4m3: return C(widen(load_one<e4m3_t>(p)));
        default: return C(widen(load_one<e5m2_t>(p)));
    }
}

template <bool kStochastic, class C, int V>
IRES_HD void put_mixed(DType type, char* out, const C (&x)[V], uint64_t seed, uint64_t stream, uint64_t index) {
    switch (type) {
        case DType::f64:
            if constexpr (sizeof(C) == 8 && !kStochastic) put<double, false>(out, x, seed, stream, index);
            return;
        case DType::f32:
            if constexpr (sizeof(C) == 8 || !kStochastic) put<float, kStochastic>(out, x, seed, stream, index);
            return;
        case DType::f16: return put<f16_t, kStochastic>(out, x, seed, stream, index);
        case DType::bf16: return put<bf16_t, kStochastic>(out, x, seed, stream, index);
        case DType::e4m3: return put<e4m3_t, kStochastic>(out, x, seed, stream, index);
        case DType::e5m2: return put<e5m2_t, kStochastic>(out, x, seed, stream, index);
    }
}

template <class C, bool kStochastic, class Table, class Address>
IRES_HD void mixed_element(const Table& table, uint64_t stream, uint64_t index, const Address& address) {
    Value<C, 1> value;
    IRES_ROLLED
    for (uint32_t k = 1; k < table.head.operands; ++k) {
        const C x[1] = {load_one_mixed<C>(type_of(table, k), address(k))};
        value.take(table.head.code, k, factor_of<C>(table, k), x);
    }
    put_mixed<kStochastic>(type_of(table, 0), address(0), value.v, table.head.seed, stream, index);
}

template <class C, bool kStochastic, class Table>
IRES_HD void mixed_tile(const Table& table, uint32_t block, uint32_t thread) {
    constexpr int V = mixed_vector(sizeof(C) == 8), kTile = kThreads * V, kWords = V * int(sizeof(C)) / 4;
    const uint32_t operands = table.head.operands;
    const Tile tile = find_tile(table, operands, block, kTile);
    const uint64_t index = table.head.offset + uint64_t(tile.begin);
    const auto address = [&](uint32_t k, int64_t i) {
        return pointer(table, tile.at, k, (tile.begin + i) * item_size(type_of(table, k)));
    };

    bool wide = tile.begin >= 0 && tile.begin + kTile <= tile.n;
    for (uint32_t k = 0; wide && k < operands; ++k)
        wide = aligned(address(k, 0), access_bytes(item_size(type_of(table, k)), V));
    if (wide) {
        const int64_t i = int64_t(thread) * V;
        uint32_t next[kWords];
        const auto load = [&](uint32_t k) {
            const char* const p = address(k, i);
            switch (item_size(type_of(table, k))) {
                case 1: return load_raw<V>(p, next);
                case 2: return load_raw<2 * V>(p, next);
                case 4: return load_raw<4 * V>(p, next);
                default:
                    if constexpr (sizeof(C) == 8) load_raw<8 * V>(p, next);
            }
        };
        Value<C, V> value;
        load(1);
        IRES_ROLLED
        for (uint32_t k = 1; k < operands; ++k) {  // the next operand is on its way while this one is converted
            uint32_t w[kWords];
            IRES_UNROLL
            for (int j = 0; j < kWords; ++j) w[j] = next[j];
            if (k + 1 < operands) load(k + 1);
            C x[V];
            unpack_mixed(type_of(table, k), w, x);
            value.take(table.head.code, k, factor_of<C>(table, k), x);
        }
        put_mixed<kStochastic>(type_of(table, 0), address(0, i), value.v, table.head.seed, tile.stream,
                               index + uint64_t(i));
    } else {
        IRES_ROLLED
        for (int e = 0; e < V; ++e) {
            const int64_t i = int64_t(e) * kThreads + thread;
            if (tile.begin + i < 0 || tile.begin + i >= tile.n) continue;
            mixed_element<C, kStochastic>(table, tile.stream, index + uint64_t(i),
                                          [&](uint32_t k) { return address(k, i); });
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Strided: one tensor, one element at a time in row-major order.
template <class C, bool kStochastic, class Table>
IRES_HD void strided_elements(const Table& table, uint32_t block, uint32_t blocks, uint32_t thread) {
    const uint32_t operands = table.head.operands, dims = table.head.dims;
    const uint64_t* const sizes = table.words + sizes_at(operands);
    const uint64_t* const strides = table.words + strides_at(operands, dims);
    const uint32_t at = strided_item_at(operands, dims);
    const uint64_t n = table.words[at + operands], stream = table.words[at + operands + 2];
    for (uint64_t i = uint64_t(block) * kThreads + thread; i < n; i += uint64_t(blocks) * kThreads) {
        const auto address = [&](uint32_t k) {
            uint64_t rest = i;
            int64_t elements = 0;
            IRES_ROLLED
            for (uint32_t d = dims; d-- > 0;) {
                elements += int64_t(rest % sizes[d]) * int64_t(strides[k * dims + d]);
                rest /= sizes[d];
            }
            return pointer(table, at, k, elements * item_size(type_of(table, k)));
        };
        mixed_element<C, kStochastic>(table, stream, table.head.offset + i, address);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Quantized tensors (coded.h) that are not transposed: kDecoded neighbouring numbers a thread. Where these share a scale
// and addresses allow it, their codes are one access; elsewhere they go one by one. `table` has what nibbles stand for,
// where all threads of a block can look at once.
constexpr int kDecoded = 8;

template <class T, int V> IRES_HD void widen_codes(const uint32_t* w, float (&x)[V]) {
    IRES_UNROLL
    for (int j = 0; j < V; j += 2) {
        const Two two = widen_two<T>(w[j / 4] >> (j % 4 * 8) & 0xffffu);
        x[j] = two.a;
        x[j + 1] = two.b;
    }
}

// The numbers from `i` on of [first, first + n); `out` is where the first of all goes.
IRES_HD void decode_numbers(const Coded& c, const float* table, int64_t first, int64_t n, char* out, int64_t i) {
    constexpr int V = kDecoded;
    if (i >= n) return;
    const int64_t row = (first + i) / c.columns, column = (first + i) % c.columns, cell = column / c.block_columns;
    const char* const p = row_of_codes(c, row) + column * code_bits(c.type) / 8;
    char* const to = out + i * int64_t(sizeof(float));
    const int64_t stop = (cell + 1) * c.block_columns < c.columns ? (cell + 1) * c.block_columns : c.columns;
    const bool nibbles = c.type == CodeType::nibbles, together = i + V <= n && column + V <= stop && !c.group;
    if (together && aligned(to, 16) && aligned(p, nibbles ? 4 : 8) && !(nibbles && column % 2 != 0)) {
        uint32_t w[2] = {};
        if (nibbles) load_raw<4>(p, w);
        else load_raw<8>(p, w);
        float x[V];
        if (c.type == CodeType::e4m3) widen_codes<e4m3_t>(w, x);
        else if (c.type == CodeType::e5m2) widen_codes<e5m2_t>(w, x);
        IRES_UNROLL
        for (int j = 0; j < V; ++j) {
            const uint32_t byte = w[j / 4] >> (j % 4 * 8) & 0xffu;
            if (nibbles) x[j] = table[w[0] >> (4 * (j ^ int(c.high_first))) & 15u];
            else if (c.type == CodeType::i8) x[j] = float(int8_t(byte));
            else if (c.type == CodeType::u8_less_128) x[j] = float(int(byte) - 128);
        }
        const float scale = scale_of(c, row, cell);
        if (c.zero_type != ZeroType::none) {
            const float zero = zero_of(c, row, cell);
            IRES_UNROLL
            for (int j = 0; j < V; ++j) x[j] = sub(x[j], zero);
        }
        uint32_t y[V];
        IRES_UNROLL
        for (int j = 0; j < V; ++j) y[j] = bit_cast<uint32_t>(mul(x[j], scale));
        store_raw<4 * V>(to, y);
    } else {
        IRES_ROLLED
        for (int j = 0; j < V && i + j < n; ++j) {
            const int64_t k = first + i + j;
            store_one(to + j * int64_t(sizeof(float)), number(c, table, k / c.columns, k % c.columns));
        }
    }
}

}  // namespace gpu
}  // namespace ires
