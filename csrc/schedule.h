// What runs where on a GPU: which kernel computes which tensors of a call, and the table that each launch gets by value.
// Nothing of CUDA here, so that tests/emulate.cpp runs schedules on a CPU.
//
// A launch computes tensors of one mix of types, cut into tiles, one block of threads a tile. Its table, in 64-bit words:
//   factor of each operand | type of each operand | running count of tiles after each tensor, 32 bits each | tensors
// and for a tensor: a pointer for each operand, then n, first, stream. A strided tensor has a launch of its own:
//   factors | types | sizes | strides, operand-major | pointers, n, first, stream
// Operands are in the order of Item: the output first.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "call.h"

namespace ires {
namespace gpu {

constexpr int kThreads = 256;                 // of a block
constexpr uint32_t kMaxBlocks = 0x7fffffffu;  // of a launch

struct Header {
    uint64_t seed, offset;
    uint32_t items, operands, dims;  // dims: 0 unless strided
    OpCode code;
};

// The parameter of a kernel. kBytes: 4 KiB at most before CUDA 12.1, 32764 since.
template <int kBytes> struct Table {
    static constexpr size_t kWords = (kBytes - sizeof(Header)) / 8;
    Header head;
    uint64_t words[kWords];
};

// Where things are in `words`.
IRES_HD uint32_t types_at(uint32_t operands) { return operands; }
IRES_HD uint32_t ends_at(uint32_t operands) { return 2 * operands; }
IRES_HD uint32_t items_at(uint32_t operands, uint32_t items) { return 2 * operands + (items + 1) / 2; }
IRES_HD uint32_t item_words(uint32_t operands) { return operands + 3; }
IRES_HD uint32_t sizes_at(uint32_t operands) { return 2 * operands; }
IRES_HD uint32_t strides_at(uint32_t operands, uint32_t dims) { return 2 * operands + dims; }
IRES_HD uint32_t strided_item_at(uint32_t operands, uint32_t dims) { return 2 * operands + dims * (1 + operands); }

// A kernel compiled for one operation and one mix of types. A thread takes `vector` neighbouring elements at a time,
// `unroll` times.
struct Fixed {
    OpCode code;
    int operands;
    DType types[4];
    int vector, unroll;
};

constexpr int kMixed = -1, kStrided = -2;  // any operation and types; the latter any strides

struct Launch {
    int kernel;  // index into the fixed kernels, or kMixed, kStrided
    bool in_double, stochastic;
    uint32_t blocks;
    Header head;
    std::vector<uint64_t> words;
};

struct Limits {
    size_t words;  // of the largest table
    uint32_t blocks = kMaxBlocks;
};

// Mixed kernels: elements a thread takes.
IRES_HD constexpr int mixed_vector(bool in_double) { return in_double ? 4 : 8; }

// Bytes that one access to `vector` elements moves at a time: what their address has to be a multiple of.
IRES_HD constexpr int access_bytes(int size, int vector) { return size * vector < 16 ? size * vector : 16; }

namespace detail {

inline const void* operand(const Item& item, size_t k) { return k == 0 ? item.out : item.in[k - 1]; }
inline DType operand_type(const Item& item, size_t k) { return k == 0 ? item.out_type : item.in_types[k - 1]; }

inline bool in_double(const Item& item) {
    bool any = item.out_type == DType::f64;
    for (const DType type : item.in_types) any |= type == DType::f64;
    return any;
}

inline int find_fixed(const Operation& op, const Item& item, const std::vector<Fixed>& fixed) {
    for (size_t f = 0; f < fixed.size(); ++f) {
        bool same = fixed[f].code == op.code && fixed[f].operands == op.inputs + 1;
        for (int k = 0; same && k < fixed[f].operands; ++k) same = operand_type(item, size_t(k)) == fixed[f].types[k];
        if (same) return int(f);
    }
    return kMixed;
}

// The factors, rounded to C, and the types.
inline std::vector<uint64_t> common_words(const Operation& op, const Item& item) {
    const bool wide = in_double(item);
    std::vector<uint64_t> words;
    for (int k = 0; k <= op.inputs; ++k) {
        double factor = 0;
        if (op.code == OpCode::add && k >= 2) factor = op.factors[k - 2];
        if (op.code == OpCode::add_difference && k >= 2) factor = op.factors[k / 2 - 1];
        if (op.code == OpCode::scale) factor = op.factors[0];
        words.push_back(wide ? bit_cast<uint64_t>(factor) : bit_cast<uint32_t>(float(factor)));
    }
    for (int k = 0; k <= op.inputs; ++k) words.push_back(uint64_t(operand_type(item, size_t(k))));
    return words;
}

inline void push_item(std::vector<uint64_t>& words, const Item& item, int64_t first) {
    for (size_t k = 0; k <= item.in.size(); ++k) words.push_back(uint64_t(reinterpret_cast<uintptr_t>(operand(item, k))));
    words.insert(words.end(), {uint64_t(item.n), uint64_t(first), item.stream});
}

// Where the first tile starts: at 0 or up to vector - 1 elements in front of the tensor, so that all others start at
// addresses fit for wide accesses, if there is such a place for all operands at once.
inline int64_t first_element(const Item& item, int vector) {
    for (int peel = 0; peel < vector; ++peel) {
        bool fits = true;
        for (size_t k = 0; fits && k <= item.in.size(); ++k) {
            const int size = item_size(operand_type(item, k));
            const auto address = reinterpret_cast<uintptr_t>(operand(item, k)) + uintptr_t(peel) * uintptr_t(size);
            fits = address % uintptr_t(access_bytes(size, vector)) == 0;
        }
        if (fits) return peel ? peel - vector : 0;
    }
    return 0;
}

[[noreturn]] inline void too_large(const Operation& op, const Item& item) {
    throw std::length_error(std::to_string(op.inputs) + " operands of " + std::to_string(item.sizes.size()) +
                            " dimensions do not fit into one kernel launch; pass fewer residuals at a time");
}

// Tensors of one kernel and one mix of types.
struct Group {
    int kernel;
    std::vector<const Item*> items;
};

inline void launch_group(const Operation& op, const Group& group, uint64_t offset, const std::vector<Fixed>& fixed,
                         const Limits& limits, std::vector<Launch>& launches) {
    const Item& one = *group.items[0];
    const uint32_t operands = uint32_t(op.inputs) + 1;
    const bool wide = in_double(one);
    const int vector = group.kernel == kMixed ? mixed_vector(wide) : fixed[size_t(group.kernel)].vector;
    const int64_t tile = int64_t(kThreads) * vector * (group.kernel == kMixed ? 1 : fixed[size_t(group.kernel)].unroll);
    const bool stochastic = op.stochastic && item_size(one.out_type) < (wide ? 8 : 4);
    const std::vector<uint64_t> common = common_words(op, one);

    std::vector<uint32_t> ends;
    std::vector<uint64_t> tensors;
    const auto flush = [&] {
        if (ends.empty()) return;
        std::vector<uint64_t> words = common;
        for (size_t i = 0; i < ends.size(); i += 2)
            words.push_back(ends[i] | (i + 1 < ends.size() ? uint64_t(ends[i + 1]) << 32 : 0));
        words.insert(words.end(), tensors.begin(), tensors.end());
        const Header head{op.seed, offset, uint32_t(ends.size()), operands, 0, op.code};
        launches.push_back({group.kernel, wide, stochastic, ends.back(), head, std::move(words)});
        ends.clear();
        tensors.clear();
    };
    if (items_at(operands, 1) + item_words(operands) > limits.words) too_large(op, one);
    for (const Item* item : group.items) {
        int64_t first = first_element(*item, vector);
        while (first < item->n) {
            const uint32_t count = uint32_t(ends.size()) + 1;  // with this one
            if (items_at(operands, count) + count * item_words(operands) > limits.words) flush();
            const uint32_t used = ends.empty() ? 0 : ends.back();
            if (used == limits.blocks) {
                flush();
                continue;
            }
            const int64_t wanted = (item->n - first - 1) / tile + 1;
            const int64_t tiles = std::min(wanted, int64_t(limits.blocks - used));
            ends.push_back(used + uint32_t(tiles));
            push_item(tensors, *item, first);
            first += tiles * tile;
        }
    }
    flush();
}

inline Launch launch_strided(const Operation& op, const Item& item, uint64_t offset, const Limits& limits) {
    const uint32_t operands = uint32_t(op.inputs) + 1, dims = uint32_t(item.sizes.size());
    const bool wide = in_double(item);
    Launch launch{kStrided, wide, op.stochastic && item_size(item.out_type) < (wide ? 8 : 4), 0,
                  {op.seed, offset, 1, operands, dims, op.code}, common_words(op, item)};
    for (const int64_t size : item.sizes) launch.words.push_back(uint64_t(size));
    for (const int64_t stride : item.strides) launch.words.push_back(uint64_t(stride));
    push_item(launch.words, item, 0);
    if (launch.words.size() > limits.words) too_large(op, item);
    launch.blocks = uint32_t(std::min<int64_t>((item.n - 1) / kThreads + 1, limits.blocks));
    return launch;
}

}  // namespace detail

// The launches that compute `items`, whose strides are coalesced. Throws std::length_error where one tensor's operands do
// not fit into a table.
inline std::vector<Launch> schedule(const Operation& op, const std::vector<Item>& items, uint64_t offset,
                                    const std::vector<Fixed>& fixed, const Limits& limits) {
    const IeeeMode mode;  // the factors
    std::vector<Launch> launches;
    std::vector<detail::Group> groups;
    for (const Item& item : items) {
        if (item.n == 0) continue;
        if (!item.sizes.empty()) {
            launches.push_back(detail::launch_strided(op, item, offset, limits));
            continue;
        }
        const auto same = [&item](const detail::Group& group) {
            return group.items[0]->out_type == item.out_type && group.items[0]->in_types == item.in_types;
        };
        const auto found = std::find_if(groups.begin(), groups.end(), same);
        if (found != groups.end()) found->items.push_back(&item);
        else groups.push_back({detail::find_fixed(op, item, fixed), {&item}});
    }
    for (const detail::Group& group : groups) detail::launch_group(op, group, offset, fixed, limits, launches);
    return launches;
}

}  // namespace gpu
}  // namespace ires
