// An operation whose operands come from files and from memory, and whose results go to memory: read piece by piece, and
// computed while they are in the cache.
//
// All of a tile is one call without Python's lock. A piece is read into memory that stays in the L2 cache; it comes out of
// the system's page cache at the speed of one copy, and no operand passes through the main memory a second time, as it
// does where a tile is read as a whole and then computed. Not by mmap: a file that is cut off meanwhile would end the
// process.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu.h"
#include "runs.h"

namespace ires {

// Of all operands of a piece together, in bytes.
constexpr int64_t kPieceBytes = int64_t(1) << 18;
constexpr int64_t kPieceStep = 1024;  // elements, of which a piece has a multiple
static_assert(kPieceStep >= kLeastPacked);

// An operand: runs, or without them the bytes at `constant`, which each piece begins with again.
struct Source {
    std::optional<Runs> runs;
    const char* constant = nullptr;
};

// Elements of a piece of an operation. No more than a constant has.
inline int64_t piece_of(const Item& item, int64_t most) {
    int64_t width = 0;
    for (const DType type : item.in_types) width += item_size(type);
    return std::max(std::min(kPieceBytes / width, most) / kPieceStep, int64_t(1)) * kPieceStep;
}

// Computes `item`, whose inputs are those of `sources`; constants have `most` elements. On a failure says of which operand,
// and the results of the pieces before are there.
inline Unread run_fused(const Operation& op, const Item& item, std::vector<Source>& sources, uint64_t offset, int64_t most,
                        const std::string& isa, int* failed) {
    static thread_local std::unique_ptr<char[]> memory;  // its pages are not fresh next time
    static thread_local size_t size = 0;
    const int64_t piece = piece_of(item, most);
    std::vector<size_t> begins, olds;
    size_t needed = 0;
    for (size_t k = 0; k < sources.size(); ++k) {
        const size_t bytes = size_t(piece * item_size(item.in_types[k]));
        begins.push_back(needed);
        olds.push_back(needed += bytes);
        if (sources[k].runs && sources[k].runs->packs()) needed += bytes;
    }
    if (needed > size) {
        size = 0;  // until there is as much
        memory.reset(new char[needed]);
        size = needed;
    }
    std::vector<Item> one{item};
    for (int64_t i = 0; i < item.n; i += piece) {
        one[0].n = std::min(piece, item.n - i);
        one[0].out = static_cast<char*>(item.out) + i * item_size(item.out_type);
        for (size_t k = 0; k < sources.size(); ++k) {
            one[0].in[k] = sources[k].constant;
            if (!sources[k].runs) continue;
            Unread unread;
            const size_t bytes = size_t(one[0].n * item_size(item.in_types[k]));
            one[0].in[k] = sources[k].runs->next(bytes, memory.get() + begins[k], &unread, memory.get() + olds[k]);
            if (unread.failed) {
                *failed = int(k);
                return unread;
            }
        }
        run(op, one, offset + uint64_t(i), 1, isa, nullptr);
        for (Source& source : sources)
            if (source.runs) source.runs->placed(isa);
    }
    return {};
}

}  // namespace ires
