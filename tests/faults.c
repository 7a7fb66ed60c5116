// Faults on demand, as a library to be preloaded: the n-th call of some kind that concerns a path below a folder fails,
// writes half, or is the last thing the process does. All other calls, and all other paths, are as ever.
//
//   gcc -shared -fPIC -O1 -o faults.so faults.c -ldl
//   FAULTS_ROOT=/some/folder FAULTS_KIND=fsync FAULTS_N=3 FAULTS_ACTION=EIO LD_PRELOAD=./faults.so program
//
// With FAULTS_LATER=M the process is killed before the M-th call after that one, in the midst of cleaning up.
// FAULTS_ROOT is a real path, without links. With no FAULTS_KIND calls are only counted. FAULTS_COUNTS names a file to
// keep the counts in, one 64-bit number a kind in the order of `names`; it is mapped, so what a killed process did is
// in it. A process that forks arms each child anew with faults_arm.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

typedef enum {
    ANY, READ, PWRITE, WRITE, FSYNC, FDATASYNC, RENAME, UNLINK, LINK, FALLOCATE, FTRUNCATE, OPEN, MKDIR, CHMOD, MMAP, MSYNC, CLOSE,
    KINDS
} Kind;
static const char* const names[KINDS] = {
    "any", "read", "pwrite", "write", "fsync", "fdatasync", "rename", "unlink", "link", "fallocate", "ftruncate", "open",
    "mkdir", "chmod", "mmap", "msync", "close"
};

typedef enum {
    PASS,
    ERROR,       // fail with `error` and do nothing, but close the descriptor where that was asked for
    GONE,        // the same, and so does every later call of any kind: the disk was pulled out
    SHORT,       // read or write half
    KILL,        // write half, then SIGKILL; other calls are not made
    KILL_AFTER,  // make the call, then SIGKILL
    HOLD         // stop the process (SIGSTOP) before the call
} Action;

static char root[PATH_MAX];
static Kind chosen;
static uint64_t chosen_n, killed_later, last_call;
static Action action;
static int error, gone;
static uint64_t own_counts[KINDS], *counts = own_counts;

// The function that would have been called without this library.
#define REAL(f) ({ static __typeof__(&f) real; if (!real) real = (__typeof__(&f))dlsym(RTLD_NEXT, #f); real; })

// The numbers of calls so far are set to 0. Returns -1 for a kind or an action that does not exist.
int faults_arm(const char* folder, const char* kind, uint64_t n, const char* what, uint64_t later, const char* counts_file) {
    static const struct { const char* name; Action action; int error; } actions[] = {
        {"count", PASS, 0}, {"EIO", ERROR, EIO}, {"ENOSPC", ERROR, ENOSPC}, {"EDQUOT", ERROR, EDQUOT}, {"EROFS", ERROR, EROFS},
        {"EOPNOTSUPP", ERROR, EOPNOTSUPP}, {"gone", GONE, EIO}, {"short", SHORT, 0}, {"kill", KILL, 0},
        {"kill-after", KILL_AFTER, 0}, {"hold", HOLD, 0},
    };
    size_t a = 0, k = 0;
    while (a < sizeof actions / sizeof *actions && strcmp(actions[a].name, what)) ++a;
    while (k < KINDS && strcmp(names[k], kind)) ++k;
    if (a == sizeof actions / sizeof *actions || k == KINDS || strlen(folder) >= sizeof root) return -1;
    strcpy(root, folder);
    chosen = (Kind)k;
    chosen_n = n;
    action = actions[a].action;
    error = actions[a].error;
    gone = 0;
    killed_later = later;
    last_call = 0;
    if (*counts_file) {
        const int fd = REAL(open)(counts_file, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0 || REAL(ftruncate)(fd, sizeof own_counts)) return -1;
        void* mapped = REAL(mmap)(NULL, sizeof own_counts, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        REAL(close)(fd);
        if (mapped == MAP_FAILED) return -1;
        counts = mapped;
    }
    memset(counts, 0, sizeof own_counts);
    return 0;
}

__attribute__((constructor)) static void arm_from_environment(void) {
    const char *folder = getenv("FAULTS_ROOT"), *kind = getenv("FAULTS_KIND"), *n = getenv("FAULTS_N");
    const char *what = getenv("FAULTS_ACTION"), *later = getenv("FAULTS_LATER"), *file = getenv("FAULTS_COUNTS");
    if (!folder) return;
    if (faults_arm(folder, kind ? kind : "any", n ? strtoull(n, NULL, 10) : 0, what ? what : "count",
                   later ? strtoull(later, NULL, 10) : 0, file ? file : "")) {
        fprintf(stderr, "faults: cannot use FAULTS_KIND, FAULTS_ACTION or FAULTS_COUNTS\n");
        _exit(127);
    }
}

static int is_below(const char* path) {
    const size_t length = strlen(root);
    return length && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

// No table of descriptors: the kernel knows them, duplicates and inherited ones too.
static int of_fd(int fd) {
    char link[32], path[PATH_MAX];
    if (!*root || fd < 0) return 0;
    const int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

static int of_path(int folder, const char* path) {
    char link[40], full[2 * PATH_MAX];
    if (!*root || !path) return 0;
    if (*path == '/') return is_below(path);
    const int before = errno;
    if (folder == AT_FDCWD) strcpy(link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    const ssize_t length = readlink(link, full, PATH_MAX - 1);
    errno = before;
    if (length < 0) return 0;
    snprintf(full + length, sizeof full - (size_t)length, "/%s", path);
    return is_below(full);
}

static int of_memory(const void* address) {
    char line[PATH_MAX + 128];
    int found = 0;
    FILE* maps = *root ? fopen("/proc/self/maps", "re") : NULL;
    while (maps && fgets(line, sizeof line, maps)) {
        unsigned long begin, end;
        int at = 0;
        line[strcspn(line, "\n")] = 0;
        if (sscanf(line, "%lx-%lx %*s %*s %*s %*s %n", &begin, &end, &at) == 2 && (uintptr_t)address - begin < end - begin)
            found = is_below(line + at);
    }
    if (maps) fclose(maps);
    return found;
}

static int for_writing(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }

static void die_if(int now) {
    if (!now) return;
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

// Counts a call and says what becomes of it.
static Action struck(Kind kind) {
    const uint64_t of_all = __atomic_add_fetch(&counts[ANY], 1, __ATOMIC_RELAXED);
    const uint64_t of_kind = __atomic_add_fetch(&counts[kind], 1, __ATOMIC_RELAXED);
    const uint64_t last = __atomic_load_n(&last_call, __ATOMIC_RELAXED);
    die_if(last && of_all >= last);
    if (__atomic_load_n(&gone, __ATOMIC_RELAXED)) return ERROR;
    const uint64_t n = chosen == ANY ? of_all : chosen == kind ? of_kind : 0;
    if (!chosen_n || n != chosen_n) return PASS;
    if (killed_later) __atomic_store_n(&last_call, of_all + killed_later, __ATOMIC_RELAXED);
    if (action == GONE) {
        __atomic_store_n(&gone, 1, __ATOMIC_RELAXED);
        return ERROR;
    }
    if (action == HOLD) kill(getpid(), SIGSTOP);
    return action;
}

// A call without bytes: `fails` is what it returns after setting errno.
#define CALL(type, fails, name, parameters, arguments, kind, concerns)                      \
    type name parameters {                                                                  \
        const Action act = (concerns) ? struck(kind) : PASS;                                \
        if (act == ERROR) return errno = error, fails;                                      \
        die_if(act == KILL);                                                                \
        type result = REAL(name) arguments;                                                 \
        die_if(act == KILL_AFTER);                                                          \
        return result;                                                                      \
    }

// A call that moves `size` bytes, of which it may be told to move half.
#define MOVE(type, name, parameters, arguments, kind, concerns, size)                       \
    type name parameters {                                                                  \
        const Action act = (concerns) ? struck(kind) : PASS;                                \
        if (act == ERROR) return errno = error, -1;                                         \
        if ((act == SHORT || act == KILL) && size > 1) size /= 2;                           \
        type result = REAL(name) arguments;                                                 \
        die_if(act == KILL || act == KILL_AFTER);                                           \
        return result;                                                                      \
    }

// The same with a list of buffers, of which it may be told to move half of the first.
#define MOVE_LIST(name, parameters, arguments, kind)                                        \
    ssize_t name parameters {                                                               \
        const Action act = of_fd(fd) ? struck(kind) : PASS;                                 \
        if (act == ERROR) return errno = error, -1;                                         \
        struct iovec half;                                                                  \
        if ((act == SHORT || act == KILL) && count > 0) {                                   \
            half = *list;                                                                   \
            if (half.iov_len > 1) half.iov_len /= 2;                                        \
            list = &half;                                                                   \
            count = 1;                                                                      \
        }                                                                                   \
        const ssize_t result = REAL(name) arguments;                                        \
        die_if(act == KILL || act == KILL_AFTER);                                           \
        return result;                                                                      \
    }

MOVE(ssize_t, read, (int fd, void* p, size_t n), (fd, p, n), READ, of_fd(fd), n)
MOVE(ssize_t, pread, (int fd, void* p, size_t n, off_t at), (fd, p, n, at), READ, of_fd(fd), n)
MOVE(ssize_t, pread64, (int fd, void* p, size_t n, off64_t at), (fd, p, n, at), READ, of_fd(fd), n)
MOVE_LIST(preadv, (int fd, const struct iovec* list, int count, off_t at), (fd, list, count, at), READ)
MOVE_LIST(preadv64, (int fd, const struct iovec* list, int count, off64_t at), (fd, list, count, at), READ)
MOVE_LIST(preadv2, (int fd, const struct iovec* list, int count, off_t at, int flags), (fd, list, count, at, flags), READ)
MOVE_LIST(preadv64v2, (int fd, const struct iovec* list, int count, off64_t at, int flags), (fd, list, count, at, flags), READ)

MOVE(ssize_t, pwrite, (int fd, const void* p, size_t n, off_t at), (fd, p, n, at), PWRITE, of_fd(fd), n)
MOVE(ssize_t, pwrite64, (int fd, const void* p, size_t n, off64_t at), (fd, p, n, at), PWRITE, of_fd(fd), n)
MOVE_LIST(pwritev, (int fd, const struct iovec* list, int count, off_t at), (fd, list, count, at), PWRITE)
MOVE_LIST(pwritev64, (int fd, const struct iovec* list, int count, off64_t at), (fd, list, count, at), PWRITE)
MOVE_LIST(pwritev2, (int fd, const struct iovec* list, int count, off_t at, int flags), (fd, list, count, at, flags), PWRITE)
MOVE_LIST(pwritev64v2, (int fd, const struct iovec* list, int count, off64_t at, int flags), (fd, list, count, at, flags), PWRITE)

MOVE(ssize_t, write, (int fd, const void* p, size_t n), (fd, p, n), WRITE, of_fd(fd), n)
MOVE_LIST(writev, (int fd, const struct iovec* list, int count), (fd, list, count), WRITE)
MOVE(ssize_t, copy_file_range, (int from, off64_t* at, int fd, off64_t* to, size_t n, unsigned flags),
     (from, at, fd, to, n, flags), WRITE, of_fd(fd), n)
MOVE(ssize_t, sendfile, (int fd, int from, off_t* at, size_t n), (fd, from, at, n), WRITE, of_fd(fd), n)
MOVE(ssize_t, sendfile64, (int fd, int from, off64_t* at, size_t n), (fd, from, at, n), WRITE, of_fd(fd), n)

CALL(int, -1, fsync, (int fd), (fd), FSYNC, of_fd(fd))
CALL(int, -1, fdatasync, (int fd), (fd), FDATASYNC, of_fd(fd))
CALL(int, -1, sync_file_range, (int fd, off64_t at, off64_t n, unsigned flags), (fd, at, n, flags), FDATASYNC, of_fd(fd))
CALL(int, -1, syncfs, (int fd), (fd), FSYNC, of_fd(fd))

CALL(int, -1, rename, (const char* a, const char* b), (a, b), RENAME, of_path(AT_FDCWD, b))
CALL(int, -1, renameat, (int fa, const char* a, int fb, const char* b), (fa, a, fb, b), RENAME, of_path(fb, b))
CALL(int, -1, renameat2, (int fa, const char* a, int fb, const char* b, unsigned flags), (fa, a, fb, b, flags), RENAME,
     of_path(fb, b))
CALL(int, -1, unlink, (const char* a), (a), UNLINK, of_path(AT_FDCWD, a))
CALL(int, -1, unlinkat, (int folder, const char* a, int flags), (folder, a, flags), UNLINK, of_path(folder, a))
CALL(int, -1, rmdir, (const char* a), (a), UNLINK, of_path(AT_FDCWD, a))
CALL(int, -1, link, (const char* a, const char* b), (a, b), LINK, of_path(AT_FDCWD, b))
CALL(int, -1, linkat, (int fa, const char* a, int fb, const char* b, int flags), (fa, a, fb, b, flags), LINK, of_path(fb, b))
CALL(int, -1, symlink, (const char* a, const char* b), (a, b), LINK, of_path(AT_FDCWD, b))
CALL(int, -1, symlinkat, (const char* a, int folder, const char* b), (a, folder, b), LINK, of_path(folder, b))
CALL(int, -1, mkdir, (const char* a, mode_t mode), (a, mode), MKDIR, of_path(AT_FDCWD, a))
CALL(int, -1, mkdirat, (int folder, const char* a, mode_t mode), (folder, a, mode), MKDIR, of_path(folder, a))
CALL(int, -1, fchmod, (int fd, mode_t mode), (fd, mode), CHMOD, of_fd(fd))
CALL(int, -1, fchown, (int fd, uid_t user, gid_t group), (fd, user, group), CHMOD, of_fd(fd))

// These two return the error.
CALL(int, error, posix_fallocate, (int fd, off_t at, off_t n), (fd, at, n), FALLOCATE, of_fd(fd))
CALL(int, error, posix_fallocate64, (int fd, off64_t at, off64_t n), (fd, at, n), FALLOCATE, of_fd(fd))
CALL(int, -1, fallocate, (int fd, int mode, off_t at, off_t n), (fd, mode, at, n), FALLOCATE, of_fd(fd))
CALL(int, -1, fallocate64, (int fd, int mode, off64_t at, off64_t n), (fd, mode, at, n), FALLOCATE, of_fd(fd))
CALL(int, -1, ftruncate, (int fd, off_t n), (fd, n), FTRUNCATE, of_fd(fd))
CALL(int, -1, ftruncate64, (int fd, off64_t n), (fd, n), FTRUNCATE, of_fd(fd))
CALL(int, -1, truncate, (const char* a, off_t n), (a, n), FTRUNCATE, of_path(AT_FDCWD, a))
CALL(int, -1, truncate64, (const char* a, off64_t n), (a, n), FTRUNCATE, of_path(AT_FDCWD, a))

CALL(void*, MAP_FAILED, mmap, (void* p, size_t n, int access, int flags, int fd, off_t at), (p, n, access, flags, fd, at), MMAP,
     of_fd(fd))
CALL(void*, MAP_FAILED, mmap64, (void* p, size_t n, int access, int flags, int fd, off64_t at), (p, n, access, flags, fd, at),
     MMAP, of_fd(fd))
CALL(int, -1, msync, (void* p, size_t n, int flags), (p, n, flags), MSYNC, of_memory(p))

// A descriptor is closed whatever close says.
int close(int fd) {
    const Action act = of_fd(fd) && for_writing(fcntl(fd, F_GETFL)) ? struck(CLOSE) : PASS;
    die_if(act == KILL);
    const int result = REAL(close)(fd);
    die_if(act == KILL_AFTER);
    if (act == ERROR) return errno = error, -1;
    return result;
}

#define OPENS(name, parameters, arguments, folder)                                          \
    int name parameters {                                                                   \
        mode_t mode = 0;                                                                    \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                \
            va_list rest;                                                                   \
            va_start(rest, flags);                                                          \
            mode = va_arg(rest, mode_t);                                                    \
            va_end(rest);                                                                   \
        }                                                                                   \
        const Action act = for_writing(flags) && of_path(folder, path) ? struck(OPEN) : PASS;\
        if (act == ERROR) return errno = error, -1;                                         \
        die_if(act == KILL);                                                                \
        const int result = REAL(name) arguments;                                            \
        die_if(act == KILL_AFTER);                                                          \
        return result;                                                                      \
    }

OPENS(open, (const char* path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPENS(open64, (const char* path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPENS(openat, (int folder, const char* path, int flags, ...), (folder, path, flags, mode), folder)
OPENS(openat64, (int folder, const char* path, int flags, ...), (folder, path, flags, mode), folder)
