/* Fails one chosen call to the operating system under one folder, once: for LD_PRELOAD on Linux.

fault_begin(root, n, error) starts counting the calls that create, change, flush, rename or delete something under `root`.
The n-th one, from 0, fails with the errno `error`; SHORT lets a write take only half of its bytes, and KILL kills the process
before the call. n = -1 fails none. fault_count() and fault_call(i) say what was counted. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define SHORT -1
#define KILL -2
#define MOST 20000
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char root[PATH_MAX];
static int counting, fault;
static long count, target = -1;
static char calls[MOST][256];

void fault_begin(const char *folder, long n, int error) {
    snprintf(root, sizeof root, "%s", folder);
    count = 0, target = n, fault = error, counting = 1;
}
void fault_end(void) { counting = 0; }
long fault_count(void) { return count; }
const char *fault_call(long i) { return i < MOST ? calls[i] : "beyond the record"; }

/* Whether this call is to fail; 0 if not, else the errno, or SHORT. */
static int due(const char *name, const char *path) {
    size_t n = strlen(root);
    if (!counting || !path || !n || strncmp(path, root, n) || (path[n] && path[n] != '/')) return 0;
    long now = __sync_fetch_and_add(&count, 1);
    if (now < MOST) snprintf(calls[now], sizeof calls[now], "%s %s", name, path[n] ? path + n + 1 : ".");
    if (now != target) return 0;
    if (fault == KILL) raise(SIGKILL);
    return fault;
}

static int due_at(const char *name, int fd) {
    char link[64], path[PATH_MAX];
    if (!counting) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return due(name, path);
}

static int refused(int error) {
    if (error > 0) errno = error;
    return error > 0;
}

#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))
#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

int open(const char *path, int flags, ...) {
    MODE(flags)
    return WRITES(flags) && refused(due("open", path)) ? -1 : REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags)
    return WRITES(flags) && refused(due("open", path)) ? -1 : REAL(open64)(path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
    MODE(flags)
    return WRITES(flags) && refused(due("open", path)) ? -1 : REAL(openat)(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    MODE(flags)
    return WRITES(flags) && refused(due("open", path)) ? -1 : REAL(openat64)(at, path, flags, mode);
}
FILE *fopen(const char *path, const char *how) {
    return strpbrk(how, "wa+") && refused(due("open", path)) ? NULL : REAL(fopen)(path, how);
}
FILE *fopen64(const char *path, const char *how) {
    return strpbrk(how, "wa+") && refused(due("open", path)) ? NULL : REAL(fopen64)(path, how);
}
ssize_t write(int fd, const void *from, size_t n) {
    int error = due_at("write", fd);
    return refused(error) ? -1 : REAL(write)(fd, from, error == SHORT && n > 1 ? n / 2 : n);
}
ssize_t pwrite(int fd, const void *from, size_t n, off_t at) {
    int error = due_at("write", fd);
    return refused(error) ? -1 : REAL(pwrite)(fd, from, error == SHORT && n > 1 ? n / 2 : n, at);
}
ssize_t pwrite64(int fd, const void *from, size_t n, off64_t at) {
    int error = due_at("write", fd);
    return refused(error) ? -1 : REAL(pwrite64)(fd, from, error == SHORT && n > 1 ? n / 2 : n, at);
}
ssize_t writev(int fd, const struct iovec *from, int n) {
    int error = due_at("write", fd);
    return refused(error) ? -1 : REAL(writev)(fd, from, error == SHORT && n > 1 ? n / 2 : n);
}
size_t fwrite(const void *from, size_t size, size_t n, FILE *file) {
    int error = counting ? due_at("write", fileno(file)) : 0;
    return refused(error) ? 0 : REAL(fwrite)(from, size, error == SHORT && n > 1 ? n / 2 : n, file);
}
int fclose(FILE *file) {
    int error = counting ? due_at("close", fileno(file)) : 0, done = REAL(fclose)(file);
    return refused(error) ? EOF : done;
}
int close(int fd) { /* a file that was opened for reading too: its descriptor is released whatever it returns */
    int flags = counting ? fcntl(fd, F_GETFL) : 0;
    int error = flags > 0 && WRITES(flags) ? due_at("close", fd) : 0, done = REAL(close)(fd);
    return refused(error) ? -1 : done;
}
int fsync(int fd) { return refused(due_at("fsync", fd)) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return refused(due_at("fsync", fd)) ? -1 : REAL(fdatasync)(fd); }
int ftruncate(int fd, off_t n) { return refused(due_at("truncate", fd)) ? -1 : REAL(ftruncate)(fd, n); }
int ftruncate64(int fd, off64_t n) { return refused(due_at("truncate", fd)) ? -1 : REAL(ftruncate64)(fd, n); }
int rename(const char *from, const char *to) { return refused(due("rename", to)) ? -1 : REAL(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) {
    return refused(due("rename", to)) ? -1 : REAL(renameat)(a, from, b, to);
}
int unlink(const char *path) { return refused(due("unlink", path)) ? -1 : REAL(unlink)(path); }
int unlinkat(int at, const char *path, int flags) {
    return refused(due("unlink", path)) ? -1 : REAL(unlinkat)(at, path, flags);
}
int mkdir(const char *path, mode_t mode) { return refused(due("mkdir", path)) ? -1 : REAL(mkdir)(path, mode); }
