/* Faults of a disk, for LD_PRELOAD: counts the calls that touch one folder, and lets the n-th of a kind fail.

   Inert until `fault_set` is called, in the process that is to be disturbed. Every call of a kind below on a path in the
   folder is counted and written to a log; the n-th of the wanted kind gets an error number, or kills the process:

     open      open for writing or creating           write     write, pwrite, writev, sendfile, copy_file_range
     read      open for reading, read, pread          rename    mkdir    unlink    rmdir    link (and symlink)
     fsync     fsync, fdatasync, msync                close     close of a file that is open for writing
     truncate  truncate, fallocate                    meta      chmod, utimes
     mmap      shared mapping that is written

   A disk that is full (ENOSPC) or was remounted read-only (EROFS) stays so: later calls that need space, or change
   anything, fail too. A write that meets a full disk or the end of the process is half done. Programs that make system
   calls without the C library are not seen; stdio's own writes are not seen either, only its fopen. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, READ, WRITE, FSYNC, CLOSE, RENAME, MKDIR, UNLINK, RMDIR, LINK, TRUNCATE, META, MMAP, KINDS };
static const char *const names[] = {"open",   "read",  "write", "fsync", "close",    "rename", "mkdir",
                                    "unlink", "rmdir", "link",  "truncate", "meta", "mmap"};
#define KILL (-1)

static char folder[PATH_MAX];
static size_t folder_length;
static int armed, log_descriptor = -1, wanted_kind = -1, fault;
static long wanted_n;
static pid_t target;
static atomic_long counts[KINDS];
static atomic_int struck;

/* Watch a folder (an absolute path without links). `error` is an error number or -1 for kill -9; n = 0 only counts.
   Returns 0, or -1 for a kind that is not known. */
int fault_set(const char *path, const char *kind, long n, int error, int log) {
    wanted_kind = -1;
    for (int k = 0; k < KINDS; k++)
        if (!strcmp(kind, names[k])) wanted_kind = k;
    if (wanted_kind < 0 && n) return -1;
    folder_length = strlen(path);
    memcpy(folder, path, folder_length + 1);
    wanted_n = n, fault = error, log_descriptor = log, target = getpid(), armed = 1;
    return 0;
}

static int within(const char *path) {
    return !strncmp(path, folder, folder_length) && (path[folder_length] == '/' || !path[folder_length]);
}

/* The absolute path of a name relative to a folder's descriptor, in `buffer`; whether it is in the watched folder. */
static int find(int at, const char *name, char *buffer) {
    if (!armed || !name) return 0;
    if (name[0] == '/') {
        snprintf(buffer, PATH_MAX, "%s", name);
    } else {
        char link[64];
        ssize_t length;
        snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
        if ((length = readlink(link, buffer, PATH_MAX - 2)) < 0) return 0;
        snprintf(buffer + length, PATH_MAX - length, "/%s", name);
    }
    return within(buffer);
}

/* The path of an open file; whether it is in the watched folder. */
static int find_open(int descriptor, char *buffer) {
    if (!armed || descriptor < 0) return 0;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    if (length < 0) return 0;
    buffer[length] = 0;
    return within(buffer);
}

static void note(const char *what, const char *name, const char *path, const char *to) {
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\t%s\n", what, name, path, to ? to : "");
    syscall(SYS_write, log_descriptor, line, (size_t)length);
}

static void end(void) {
    syscall(SYS_kill, target, SIGKILL);
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

/* Count a call. Returns 0, or the error number that it gets; KILL only where `halves`: the caller does half of it. */
static int strike(enum kind kind, const char *path, const char *to, int halves) {
    long n = atomic_fetch_add(&counts[kind], 1) + 1;
    if (atomic_load(&struck)) {
        int space = kind == OPEN || kind == WRITE || kind == MKDIR || kind == LINK || kind == TRUNCATE;
        int fails = fault == ENOSPC ? space : fault == EROFS ? kind != READ && kind != CLOSE && kind != FSYNC : 0;
        note(fails ? "fails" : "call", names[kind], path, to);
        return fails ? fault : 0;
    }
    int now = kind == (enum kind)wanted_kind && n == wanted_n;
    note(now ? "struck" : "call", names[kind], path, to);
    if (!now) return 0;
    atomic_store(&struck, 1);
    if (fault == KILL && !halves) end();
    return fault;
}

/* What the library has under this name. */
static void *next(void **found, const char *name) { return *found ? *found : (*found = dlsym(RTLD_NEXT, name)); }

#define REAL(name) ((__typeof__(&name))next(&real_##name, #name))
#define DECLARE(name) static void *real_##name
#define FAIL(error) return errno = (error), -1

/* A call on one path. */
#define PATH_CALL(type, name, kind, at, path, parameters, arguments)                                                   \
    DECLARE(name);                                                                                                     \
    type name parameters {                                                                                             \
        char found[PATH_MAX];                                                                                          \
        int error;                                                                                                     \
        if (find(at, path, found) && (error = strike(kind, found, NULL, 0))) FAIL(error);                              \
        return REAL(name) arguments;                                                                                   \
    }

/* A call on an open file. */
#define FILE_CALL(type, name, kind, parameters, arguments)                                                             \
    DECLARE(name);                                                                                                     \
    type name parameters {                                                                                             \
        char found[PATH_MAX];                                                                                          \
        int error;                                                                                                     \
        if (find_open(descriptor, found) && (error = strike(kind, found, NULL, 0))) FAIL(error);                       \
        return REAL(name) arguments;                                                                                   \
    }

/* Opening */

#define CREATES(flags) (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE)
#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || CREATES(flags) || ((flags) & O_TRUNC))

/* Folders are opened to list or to flush them, which is no read of a file. */
static int strike_open(int at, const char *path, int flags) {
    char found[PATH_MAX];
    if (!find(at, path, found) || (flags & (O_DIRECTORY | O_PATH)) == O_DIRECTORY) return 0;
    if (WRITES(flags)) return strike(OPEN, found, NULL, 0);
    struct stat is;
    return !stat(found, &is) && S_ISREG(is.st_mode) ? strike(READ, found, NULL, 0) : 0;
}

#define MODE(flags, last)                                                                                              \
    mode_t mode = 0;                                                                                                   \
    if (CREATES(flags)) {                                                                                              \
        va_list more;                                                                                                  \
        va_start(more, last);                                                                                          \
        mode = va_arg(more, mode_t);                                                                                   \
        va_end(more);                                                                                                  \
    }

#define OPEN_CALL(name)                                                                                                \
    DECLARE(name);                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        MODE(flags, flags)                                                                                             \
        int error = armed ? strike_open(AT_FDCWD, path, flags) : 0;                                                    \
        if (error) FAIL(error);                                                                                        \
        return REAL(name)(path, flags, mode);                                                                          \
    }
OPEN_CALL(open)
OPEN_CALL(open64)

#define OPENAT_CALL(name)                                                                                              \
    DECLARE(name);                                                                                                     \
    int name(int at, const char *path, int flags, ...) {                                                               \
        MODE(flags, flags)                                                                                             \
        int error = armed ? strike_open(at, path, flags) : 0;                                                          \
        if (error) FAIL(error);                                                                                        \
        return REAL(name)(at, path, flags, mode);                                                                      \
    }
OPENAT_CALL(openat)
OPENAT_CALL(openat64)

PATH_CALL(int, creat, OPEN, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
PATH_CALL(int, creat64, OPEN, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))

/* What _FORTIFY_SOURCE makes of open without a mode. */
#define OPEN_2_CALL(name)                                                                                              \
    int name(const char *path, int flags);                                                                             \
    DECLARE(name);                                                                                                     \
    int name(const char *path, int flags) {                                                                            \
        int error = armed ? strike_open(AT_FDCWD, path, flags) : 0;                                                    \
        if (error) FAIL(error);                                                                                        \
        return REAL(name)(path, flags);                                                                                \
    }
OPEN_2_CALL(__open_2)
OPEN_2_CALL(__open64_2)

#define FOPEN_CALL(name)                                                                                               \
    DECLARE(name);                                                                                                     \
    FILE *name(const char *path, const char *mode) {                                                                   \
        int error = armed ? strike_open(AT_FDCWD, path, mode[0] == 'r' && !strchr(mode, '+') ? 0 : O_CREAT) : 0;       \
        if (error) return errno = error, NULL;                                                                         \
        return REAL(name)(path, mode);                                                                                 \
    }
FOPEN_CALL(fopen)
FOPEN_CALL(fopen64)

/* Writing */

/* The number of bytes that a write may do: all, or half of them and then the end. */
static ssize_t strike_write(int descriptor, size_t bytes, int *then) {
    char found[PATH_MAX];
    *then = 0;
    if (!find_open(descriptor, found)) return (ssize_t)bytes;
    int before = atomic_load(&struck), error = strike(WRITE, found, NULL, 1);
    if (!error) return (ssize_t)bytes;
    *then = error;
    return (error == KILL || (error == ENOSPC && !before)) ? (ssize_t)(bytes / 2) : 0;
}

/* `done` is what the shortened write gave. */
static ssize_t after_write(ssize_t done, int then) {
    if (then == KILL) end();
    if (then && done <= 0) FAIL(then);
    return done;
}

#define WRITE_CALL(name, parameters, shortened)                                                                        \
    DECLARE(name);                                                                                                     \
    ssize_t name parameters {                                                                                          \
        int then;                                                                                                      \
        ssize_t may = strike_write(descriptor, bytes, &then);                                                          \
        return after_write(may || !then ? REAL(name) shortened : 0, then);                                             \
    }
WRITE_CALL(write, (int descriptor, const void *from, size_t bytes), (descriptor, from, may))
WRITE_CALL(pwrite, (int descriptor, const void *from, size_t bytes, off_t at), (descriptor, from, may, at))
WRITE_CALL(pwrite64, (int descriptor, const void *from, size_t bytes, off64_t at), (descriptor, from, may, at))
WRITE_CALL(sendfile, (int descriptor, int from, off_t *at, size_t bytes), (descriptor, from, at, may))
WRITE_CALL(sendfile64, (int descriptor, int from, off64_t *at, size_t bytes), (descriptor, from, at, may))
WRITE_CALL(copy_file_range,
           (int from, off64_t *at, int descriptor, off64_t *to, size_t bytes, unsigned flags),
           (from, at, descriptor, to, may, flags))

static size_t total(const struct iovec *parts, int count) {
    size_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += parts[i].iov_len;
    return bytes;
}

/* Of several buffers the first is written, or half of one. */
#define WRITEV_CALL(name, parameters, all, some)                                                                       \
    DECLARE(name);                                                                                                     \
    ssize_t name parameters {                                                                                          \
        int then;                                                                                                      \
        strike_write(descriptor, total(parts, count), &then);                                                          \
        if (!then) return REAL(name) all;                                                                              \
        struct iovec first = {count ? parts[0].iov_base : NULL, count ? parts[0].iov_len : 0};                         \
        if (count == 1) first.iov_len /= 2;                                                                            \
        int writes = first.iov_len && (then == KILL || then == ENOSPC);                                                \
        return after_write(writes ? REAL(name) some : 0, then);                                                        \
    }
WRITEV_CALL(writev, (int descriptor, const struct iovec *parts, int count), (descriptor, parts, count),
            (descriptor, &first, 1))
WRITEV_CALL(pwritev, (int descriptor, const struct iovec *parts, int count, off_t at),
            (descriptor, parts, count, at), (descriptor, &first, 1, at))
WRITEV_CALL(pwritev64, (int descriptor, const struct iovec *parts, int count, off64_t at),
            (descriptor, parts, count, at), (descriptor, &first, 1, at))

FILE_CALL(int, fsync, FSYNC, (int descriptor), (descriptor))
FILE_CALL(int, fdatasync, FSYNC, (int descriptor), (descriptor))
FILE_CALL(int, ftruncate, TRUNCATE, (int descriptor, off_t length), (descriptor, length))
FILE_CALL(int, ftruncate64, TRUNCATE, (int descriptor, off64_t length), (descriptor, length))
FILE_CALL(int, fallocate, TRUNCATE, (int descriptor, int mode, off_t at, off_t length), (descriptor, mode, at, length))
FILE_CALL(int, fallocate64, TRUNCATE, (int descriptor, int mode, off64_t at, off64_t length),
          (descriptor, mode, at, length))
FILE_CALL(int, fchmod, META, (int descriptor, mode_t mode), (descriptor, mode))
FILE_CALL(int, futimens, META, (int descriptor, const struct timespec times[2]), (descriptor, times))

DECLARE(posix_fallocate);
int posix_fallocate(int descriptor, off_t at, off_t length) {
    char found[PATH_MAX];
    int error;
    if (find_open(descriptor, found) && (error = strike(TRUNCATE, found, NULL, 0))) return error;
    return REAL(posix_fallocate)(descriptor, at, length);
}

/* The file is closed all the same, as Linux does it. */
DECLARE(close);
int close(int descriptor) {
    char found[PATH_MAX];
    int error = 0, flags;
    if (find_open(descriptor, found) && (flags = fcntl(descriptor, F_GETFL)) >= 0 && (flags & O_ACCMODE) != O_RDONLY)
        error = strike(CLOSE, found, NULL, 0);
    int done = REAL(close)(descriptor);
    if (error) FAIL(error);
    return done;
}

static int maps(int protection, int flags) { return (protection & PROT_WRITE) && (flags & MAP_SHARED); }

#define MMAP_CALL(name, offset)                                                                                        \
    DECLARE(name);                                                                                                     \
    void *name(void *where, size_t length, int protection, int flags, int descriptor, offset at) {                     \
        char found[PATH_MAX];                                                                                          \
        int error;                                                                                                     \
        if (maps(protection, flags) && find_open(descriptor, found) && (error = strike(MMAP, found, NULL, 0)))         \
            return errno = error, MAP_FAILED;                                                                          \
        return REAL(name)(where, length, protection, flags, descriptor, at);                                           \
    }
MMAP_CALL(mmap, off_t)
MMAP_CALL(mmap64, off64_t)

/* Reading */

static int strike_read(int descriptor) {
    char found[PATH_MAX];
    struct stat is;
    if (!find_open(descriptor, found) || fstat(descriptor, &is) || !S_ISREG(is.st_mode)) return 0;
    return strike(READ, found, NULL, 0);
}

#define READ_CALL(name, parameters, arguments)                                                                         \
    DECLARE(name);                                                                                                     \
    ssize_t name parameters {                                                                                          \
        int error = armed ? strike_read(descriptor) : 0;                                                               \
        if (error) FAIL(error);                                                                                        \
        return REAL(name) arguments;                                                                                   \
    }
READ_CALL(read, (int descriptor, void *to, size_t bytes), (descriptor, to, bytes))
READ_CALL(pread, (int descriptor, void *to, size_t bytes, off_t at), (descriptor, to, bytes, at))
READ_CALL(pread64, (int descriptor, void *to, size_t bytes, off64_t at), (descriptor, to, bytes, at))

/* Names */

PATH_CALL(int, mkdir, MKDIR, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
PATH_CALL(int, mkdirat, MKDIR, at, path, (int at, const char *path, mode_t mode), (at, path, mode))
PATH_CALL(int, unlink, UNLINK, AT_FDCWD, path, (const char *path), (path))
PATH_CALL(int, remove, UNLINK, AT_FDCWD, path, (const char *path), (path))
PATH_CALL(int, rmdir, RMDIR, AT_FDCWD, path, (const char *path), (path))
PATH_CALL(int, unlinkat, (flags & AT_REMOVEDIR ? RMDIR : UNLINK), at, path, (int at, const char *path, int flags),
          (at, path, flags))
PATH_CALL(int, truncate, TRUNCATE, AT_FDCWD, path, (const char *path, off_t length), (path, length))
PATH_CALL(int, truncate64, TRUNCATE, AT_FDCWD, path, (const char *path, off64_t length), (path, length))
PATH_CALL(int, chmod, META, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
PATH_CALL(int, fchmodat, META, at, path, (int at, const char *path, mode_t mode, int flags), (at, path, mode, flags))
PATH_CALL(int, utimensat, META, at, path, (int at, const char *path, const struct timespec times[2], int flags),
          (at, path, times, flags))
PATH_CALL(int, symlink, LINK, AT_FDCWD, path, (const char *target_, const char *path), (target_, path))
PATH_CALL(int, symlinkat, LINK, at, path, (const char *target_, int at, const char *path), (target_, at, path))

#define TWO_PATHS(name, kind, from_at, to_at, parameters, arguments)                                                   \
    DECLARE(name);                                                                                                     \
    int name parameters {                                                                                              \
        char first[PATH_MAX], second[PATH_MAX];                                                                        \
        int error, inside = find(from_at, from, first);                                                                \
        if ((find(to_at, to, second) || inside) && (error = strike(kind, first, second, 0))) FAIL(error);              \
        return REAL(name) arguments;                                                                                   \
    }
TWO_PATHS(rename, RENAME, AT_FDCWD, AT_FDCWD, (const char *from, const char *to), (from, to))
TWO_PATHS(renameat, RENAME, at, at2, (int at, const char *from, int at2, const char *to), (at, from, at2, to))
TWO_PATHS(renameat2, RENAME, at, at2, (int at, const char *from, int at2, const char *to, unsigned flags),
          (at, from, at2, to, flags))
TWO_PATHS(link, LINK, AT_FDCWD, AT_FDCWD, (const char *from, const char *to), (from, to))
TWO_PATHS(linkat, LINK, at, at2, (int at, const char *from, int at2, const char *to, int flags),
          (at, from, at2, to, flags))
