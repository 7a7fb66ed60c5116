// The elements of an operand, wherever they are: runs of bytes in files and in memory, which are taken piece by piece.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu.h"
#include "tile.h"

namespace ires {

// Bytes that are not read again soon: past the caches, where there are instructions for that.
inline void copy_past_cache(char* to, const char* from, size_t bytes) {
#if defined(__SSE2__)
    const size_t head = std::min(bytes, size_t(-reinterpret_cast<uintptr_t>(to) & 15));
    memcpy(to, from, head);
    size_t i = head;
    for (; i + 64 <= bytes; i += 64) {
        __m128i x[4];
        for (size_t k = 0; k < 4; ++k) x[k] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i) + k);
        for (size_t k = 0; k < 4; ++k) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i) + k, x[k]);
    }
    _mm_sfence();
    memcpy(to + i, from + i, bytes - i);
#else
    memcpy(to, from, bytes);
#endif
}

// Bytes of a file from `offset` on, or of memory. What is in memory may be about to be changed: then `keep` is where its
// bytes go before, and `kept` counts those that are there. Or, of a type that is packed, where a record of them goes after:
// then `kept` counts the bytes that it is of, and behind that those of the record.
struct Stretch {
    int fd;  // kMemory: `memory` has them
    int64_t offset;
    const char* memory;
    size_t bytes;
    char* keep;
    int64_t* kept;
    std::optional<DType> packed;
};
constexpr int kMemory = -1;

// An operand as stretches that follow each other.
class Runs {
public:
    // With `to` all of its bytes stay there, one after the other; without it they are in memory of their own, or gone.
    explicit Runs(char* to = nullptr) : to_(to) {}
    void add(const Stretch& stretch) {
        if (stretch.bytes > 0) stretches_.push_back(stretch);
    }
    int64_t bytes() const {
        int64_t sum = 0;
        for (const Stretch& each : stretches_) sum += int64_t(each.bytes);
        return sum;
    }
    bool packs() const {
        for (const Stretch& each : stretches_)
            if (each.packed) return true;
        return false;
    }
    // The next bytes, of which there are so many: in memory where they lie there as they follow each other, else in
    // `scratch`. What went wrong has the number of the stretch. Those that will be packed are copied to `old` as well.
    const char* next(size_t bytes, char* scratch, Unread* unread, char* old = nullptr) {
        old_ = old;
        waiting_.clear();
        Stretch& first = stretches_[at_];
        if (!to_ && first.fd == kMemory && first.bytes >= bytes) {
            const char* const here = first.memory;
            take(first, nullptr, bytes, unread);
            return here;
        }
        char* const begin = to_ ? to_ : scratch;
        if (to_) to_ += bytes;
        for (char* to = begin; bytes > 0 && !unread->failed;) {
            const size_t some = std::min(bytes, stretches_[at_].bytes);
            take(stretches_[at_], to, some, unread);
            to += some, bytes -= some;
        }
        return begin;
    }

    // What was taken last is what the operation makes of it by now.
    void placed(const std::string& isa) {
        for (const Waiting& each : waiting_) {
            Stretch& from = stretches_[each.stretch];
            const int64_t n = int64_t(each.bytes) / item_size(*from.packed);
            from.kept[1] += pack(*from.packed, each.old, each.now, n, from.keep + from.kept[1], isa);
            from.kept[0] += int64_t(each.bytes);
        }
        waiting_.clear();
    }

private:
    struct Waiting {
        size_t stretch, bytes;
        const char *old, *now;
    };

    // Goes on by some bytes of a stretch, which are put to `to` where there is one.
    void take(Stretch& from, char* to, size_t bytes, Unread* unread) {
        if (from.fd == kMemory) {
            if (from.packed) {
                memcpy(old_, from.memory, bytes);
                waiting_.push_back({at_, bytes, old_, from.memory});
                old_ += bytes;
            } else if (from.keep) {
                copy_past_cache(from.keep, from.memory, bytes);
                from.keep += bytes, *from.kept += int64_t(bytes);
            }
            if (to) memcpy(to, from.memory, bytes);
            from.memory += bytes;
        } else {
            *unread = read_fully({from.fd, from.offset, to, nullptr, bytes}, at_);
            from.offset += int64_t(bytes);
        }
        if (!(from.bytes -= bytes)) ++at_;
    }

    std::vector<Stretch> stretches_;
    std::vector<Waiting> waiting_;
    char* old_ = nullptr;
    size_t at_ = 0;
    char* to_;
};

}  // namespace ires
