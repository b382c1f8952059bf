/* Loaded before libc (LD_PRELOAD): makes the n-th system call on a path below a folder fail.

   Python, Rust and C++ all pass here, so one harness covers the program, safetensors, torch and Arrow. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, WRITE = 2, FSYNC = 4, RENAME = 8, READ = 16 };

static char root[PATH_MAX];
static int operations, code, lasting, list = -1;
static long calls, at;

/* Arm: the at-th of these operations below the folder fails with `error`; all later ones too when `stay`. What is
   counted is listed on the descriptor `listed`, where that is not negative. */
void fault_arm(const char *folder, int which, long number, int error, int stay, int listed) {
    strncpy(root, folder, sizeof root - 1);
    calls = 0, at = number, code = error, lasting = stay, list = listed, operations = which;
}

static int fails(int operation, const char *path) {
    if (!(operations & operation) || strncmp(path, root, strlen(root))) return 0;
    calls++;
    if (list >= 0) {
        char line[PATH_MAX + 8];
        int length = snprintf(line, sizeof line, "%d %s\n", operation, path + strlen(root));
        syscall(SYS_write, list, line, length);
    }
    if (calls == at || (lasting && at && calls > at)) {
        errno = code;
        return 1;
    }
    return 0;
}

static int fails_fd(int operation, int fd) {
    if (!(operations & operation) || fd == list) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(operation, path);
}

static int fails_at(int operation, int folder, const char *name) {
    char path[2 * PATH_MAX];
    if (!(operations & operation)) return 0;
    if (name[0] == '/') return fails(operation, name);
    if (folder == AT_FDCWD) {
        if (!getcwd(path, PATH_MAX)) return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
        if (length < 0) return 0;
        path[length] = 0;
    }
    strcat(strcat(path, "/"), name);
    return fails(operation, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPENS(name)                                                  \
    int name(const char *path, int flags, ...) {                     \
        va_list rest;                                                \
        va_start(rest, flags);                                       \
        int mode = va_arg(rest, int);                                \
        va_end(rest);                                                \
        if (fails_at(OPEN, AT_FDCWD, path)) return -1;               \
        return REAL(name)(path, flags, mode);                        \
    }
#define OPENS_AT(name)                                               \
    int name(int folder, const char *path, int flags, ...) {         \
        va_list rest;                                                \
        va_start(rest, flags);                                       \
        int mode = va_arg(rest, int);                                \
        va_end(rest);                                                \
        if (fails_at(OPEN, folder, path)) return -1;                 \
        return REAL(name)(folder, path, flags, mode);                \
    }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

#define ON_FD(operation, result, name, parameters, arguments)        \
    result name parameters {                                         \
        if (fails_fd(operation, fd)) return -1;                      \
        return REAL(name) arguments;                                 \
    }
ON_FD(WRITE, ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
ON_FD(WRITE, ssize_t, writev, (int fd, const struct iovec *data, int count), (fd, data, count))
ON_FD(WRITE, ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t from), (fd, data, size, from))
ON_FD(READ, ssize_t, read, (int fd, void *data, size_t size), (fd, data, size))
ON_FD(READ, ssize_t, pread, (int fd, void *data, size_t size, off_t from), (fd, data, size, from))
ON_FD(READ, ssize_t, pread64, (int fd, void *data, size_t size, off64_t from), (fd, data, size, from))
ON_FD(READ, ssize_t, readv, (int fd, const struct iovec *data, int count), (fd, data, count))
ON_FD(FSYNC, int, fsync, (int fd), (fd))
ON_FD(FSYNC, int, fdatasync, (int fd), (fd))

int posix_fallocate64(int fd, off64_t from, off64_t size) {
    if (fails_fd(WRITE, fd)) return code;
    return REAL(posix_fallocate64)(fd, from, size);
}

int rename(const char *old, const char *new) {
    if (fails_at(RENAME, AT_FDCWD, new)) return -1;
    return REAL(rename)(old, new);
}

int renameat(int from, const char *old, int to, const char *new) {
    if (fails_at(RENAME, to, new)) return -1;
    return REAL(renameat)(from, old, to, new);
}
