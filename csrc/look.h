// Elements of three models that are only looked at: read from files piece by piece, and counted while they are in the cache.
//
// All of a tile is one call without Python's lock. Of pieces of 2^15 elements the three take 192 KiB as bf16: they come out
// of the system's page cache at the speed of one copy, and stay in the L2 cache for the sums. Not by mmap: a file that is
// cut off meanwhile would end the process.
#pragma once

#include <algorithm>
#include <memory>

#include "cpu.h"
#include "runs.h"

namespace ires {

// Counts the elements of `run`, whose pointers are set here; `operands` have their bytes. On a failure says of which operand.
inline Unread fit_files(FitRun run, Runs (&operands)[3], const std::string& isa, Fit* fit, int* failed) {
    constexpr int64_t kPiece = int64_t(1) << 15;
    static thread_local const std::unique_ptr<char[]> memory(new char[3 * kPiece * 4]);  // its pages are not fresh next time
    const int64_t n = run.n;
    for (int64_t i = 0; i < n; i += kPiece) {
        run.n = std::min(kPiece, n - i);
        for (int k = 0; k < 3; ++k) {
            char* const to = memory.get() + k * kPiece * 4;
            Unread unread;
            run.in[k] = operands[k].next(size_t(run.n * item_size(run.in_types[k])), to, &unread);
            if (unread.failed) {
                *failed = k;
                return unread;
            }
        }
        ires::fit(run, isa, fit);
    }
    return {};
}

}  // namespace ires
