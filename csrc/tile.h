// A tile of a merge that stays on a device: read from files into pinned host memory, copied there, computed there.
//
// All of it is one call without Python's lock, because threads that load at 26 GB/s have a third of a millisecond for
// everything else. The copy of an input is queued as soon as it is read, and runs while the next one is.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <vector>

namespace ires {

// Bytes of a file that go through host memory to a device. Pieces that lie apart in files and follow each other in memory
// are copied as one, when all of them are there: their own `device` is null, and a read of no file (fd < 0) says where to.
struct Read {
    int fd;
    int64_t offset;
    char* host;
    void* device;
    size_t bytes;
};

// What went wrong: `error` is an errno, or 0 where the file ends at `at`.
struct Unread {
    bool failed = false;
    size_t read = 0;  // which of the reads
    int error = 0;
    int64_t at = 0;
};

inline Unread read_fully(const Read& read, size_t number) {
    for (size_t done = 0; done < read.bytes;) {
        const ssize_t count = pread(read.fd, read.host + done, read.bytes - done, off_t(read.offset) + off_t(done));
        if (count > 0) done += size_t(count);
        else if (count == 0) return {true, number, 0, read.offset + int64_t(done)};
        else if (errno != EINTR) return {true, number, errno, read.offset + int64_t(done)};
    }
    return {};
}

// `copy` queues the copy of what was read. After a failure nothing more is queued.
template <class Copy> Unread read_tile(const std::vector<Read>& reads, const Copy& copy) {
    for (size_t i = 0; i < reads.size(); ++i) {
        const Unread unread = reads[i].fd < 0 ? Unread{} : read_fully(reads[i], i);
        if (unread.failed) return unread;
        if (reads[i].device != nullptr) copy(reads[i]);
    }
    return {};
}

}  // namespace ires
