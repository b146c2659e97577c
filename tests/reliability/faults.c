/* Count what a process changes below a folder, and make one change fail: an LD_PRELOAD library.
 *
 * It sees every call of the C library, so also those of Arrow, safetensors and SQLite, which a hook
 * in Python would miss. A call counts if it may change the disk below the folder: open for writing,
 * write, truncate, fsync, rename, link, mkdir, unlink, rmdir, chmod, utime. The fault is armed for
 * one process, by `faults_arm` or by the variable FAULTS ("mode:at:folder:trace"), and not for its
 * children.
 *
 *   mode 0    count only; each call becomes a line of the trace: name, needs, path
 *   mode -1   SIGKILL before call number `at`
 *   mode -2   SIGKILL in the middle of it: a write writes half
 *   mode -3   from this call on, the wall clock is an hour earlier
 *   mode n    call number `at` fails with errno n; with ENOSPC, all later calls that need space too
 *
 * The variable CLOCK names a file with a long: seconds by which the wall clock differs, now, for all
 * processes that have the variable. Times of files are the kernel's, and do not change.
 *
 * fsync is counted and skipped: a killed process loses no written byte, and a test need not wait.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <semaphore.h>
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
#include <time.h>
#include <unistd.h>

enum { SPACE = 1, DATA = 2, PERMISSION = 4 }; /* what a call needs: see `applies` */

static char root[PATH_MAX];
static size_t root_length;
static long mode, at;
static int trace = -1;
static pid_t armed;
static atomic_long calls;
static long own_clock;
static volatile long *seconds = &own_clock; /* added to the wall clock */

void faults_arm(const char *folder, long how, long number, const char *trace_path) {
    snprintf(root, sizeof root, "%s/", folder);
    root_length = strlen(root);
    mode = how, at = number, calls = 0;
    trace = *trace_path ? syscall(SYS_openat, AT_FDCWD, trace_path,
                                  O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    armed = getpid();
}

__attribute__((constructor)) static void arm_by_variable(void) {
    char *text = getenv("FAULTS"), folder[PATH_MAX], trace_path[PATH_MAX] = "";
    long how, number;
    if (text && sscanf(text, "%ld:%ld:%4095[^:]:%4095s", &how, &number, folder, trace_path) >= 3)
        faults_arm(folder, how, number, trace_path);
    unsetenv("FAULTS");
    int fd = getenv("CLOCK") ? syscall(SYS_openat, AT_FDCWD, getenv("CLOCK"), O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *shared = mmap(NULL, sizeof *seconds, PROT_READ, MAP_SHARED, fd, 0);
    if (shared != MAP_FAILED) seconds = shared;
    syscall(SYS_close, fd);
}

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

static int applies(int needs) {
    if (mode == ENOSPC || mode == EDQUOT) return needs & SPACE;
    if (mode == EACCES || mode == EROFS) return needs & PERMISSION;
    return needs & DATA; /* EIO */
}

/* Absolute path of `path` relative to a folder's descriptor; of the descriptor if path is NULL. */
static void resolve(int fd, const char *path, char out[PATH_MAX]) {
    char link[64];
    out[0] = 0;
    if (path && path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    ssize_t n;
    if (fd == AT_FDCWD) {
        n = getcwd(out, PATH_MAX) ? (ssize_t)strlen(out) : 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        n = readlink(link, out, PATH_MAX - 1);
    }
    if (n < 0) n = 0;
    out[n] = 0;
    if (path) snprintf(out + n, PATH_MAX - n, "/%s", path);
}

/* Count a call; return 1 if it must fail with errno, 2 if it must be cut in half, else 0. */
static int counted(const char *name, int needs, int fd, const char *path) {
    if (armed != getpid()) return 0;
    int before = errno;
    char full[PATH_MAX];
    resolve(fd, path, full);
    errno = before;
    if (strncmp(full, root, root_length)) return 0;
    long number = atomic_fetch_add(&calls, 1);
    int fires = mode && number == at;
    if (trace >= 0 && (!mode || fires)) {
        char line[PATH_MAX + 64];
        int n = snprintf(line, sizeof line, "%s %d %s\n", name, needs, full + root_length);
        syscall(SYS_write, trace, line, (size_t)n);
    }
    if (mode == -1 && fires) die();
    if (mode == -2 && fires) return 2;
    if (mode == -3 && fires) *seconds = -3600;
    if (mode > 0 && (fires || (mode == ENOSPC && number > at)) && applies(needs)) {
        errno = (int)mode;
        return 1;
    }
    return 0;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))
#define FAULT(name, needs, fd, path)                       \
    switch (counted(name, needs, fd, path)) {              \
    case 1: return -1;                                     \
    case 2: die();                                         \
    }

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC); }
static int needs_of(int flags) { return PERMISSION | DATA | (flags & O_CREAT ? SPACE : 0); }

#define OPEN(name)                                                              \
    int name(const char *path, int flags, ...) {                                \
        va_list list; va_start(list, flags);                                    \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
        va_end(list);                                                           \
        if (writes(flags)) FAULT("open", needs_of(flags), AT_FDCWD, path)       \
        return REAL(int, name, const char *, int, ...)(path, flags, bits);      \
    }
#define OPENAT(name)                                                            \
    int name(int fd, const char *path, int flags, ...) {                        \
        va_list list; va_start(list, flags);                                    \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
        va_end(list);                                                           \
        if (writes(flags)) FAULT("open", needs_of(flags), fd, path)             \
        return REAL(int, name, int, const char *, int, ...)(fd, path, flags, bits); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                   \
    FILE *name(const char *path, const char *how) {                                   \
        if (strpbrk(how, "wa+") && counted("open", SPACE | PERMISSION | DATA, AT_FDCWD, path)) \
            return mode < 0 ? (die(), NULL) : NULL;                                   \
        return REAL(FILE *, name, const char *, const char *)(path, how);             \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define HALF(whole, half)                                    \
    switch (counted("write", SPACE | DATA, fd, NULL)) {      \
    case 0: return whole;                                    \
    case 1: return -1;                                       \
    default: (void)!half; die(); return -1;                  \
    }
ssize_t write(int fd, const void *data, size_t n) {
    ssize_t (*real)(int, const void *, size_t) = REAL(ssize_t, write, int, const void *, size_t);
    HALF(real(fd, data, n), real(fd, data, n / 2))
}
#define PWRITE(name)                                                                   \
    ssize_t name(int fd, const void *data, size_t n, off64_t offset) {                 \
        ssize_t (*real)(int, const void *, size_t, off64_t) =                          \
            REAL(ssize_t, name, int, const void *, size_t, off64_t);                   \
        HALF(real(fd, data, n, offset), real(fd, data, n / 2, offset))                 \
    }
PWRITE(pwrite)
PWRITE(pwrite64)
ssize_t writev(int fd, const struct iovec *parts, int n) {
    ssize_t (*real)(int, const struct iovec *, int) =
        REAL(ssize_t, writev, int, const struct iovec *, int);
    HALF(real(fd, parts, n), real(fd, parts, n / 2))
}
#define SENDFILE(name)                                                                 \
    ssize_t name(int fd, int from, off64_t *offset, size_t n) {                        \
        ssize_t (*real)(int, int, off64_t *, size_t) =                                 \
            REAL(ssize_t, name, int, int, off64_t *, size_t);                          \
        HALF(real(fd, from, offset, n), real(fd, from, offset, 100))                   \
    }
SENDFILE(sendfile)
SENDFILE(sendfile64)
ssize_t copy_file_range(int from, off64_t *a, int fd, off64_t *b, size_t n, unsigned flags) {
    ssize_t (*real)(int, off64_t *, int, off64_t *, size_t, unsigned) =
        REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    HALF(real(from, a, fd, b, n, flags), real(from, a, fd, b, 100, flags))
}

int fsync(int fd) { FAULT("fsync", SPACE | DATA, fd, NULL) return 0; }
int fdatasync(int fd) { FAULT("fsync", SPACE | DATA, fd, NULL) return 0; }

#define FTRUNCATE(name)                                                \
    int name(int fd, off64_t n) {                                      \
        FAULT("truncate", DATA, fd, NULL)                              \
        return REAL(int, name, int, off64_t)(fd, n);                   \
    }
FTRUNCATE(ftruncate)
FTRUNCATE(ftruncate64)
#define TRUNCATE(name)                                                 \
    int name(const char *path, off64_t n) {                            \
        FAULT("truncate", DATA | PERMISSION, AT_FDCWD, path)           \
        return REAL(int, name, const char *, off64_t)(path, n);        \
    }
TRUNCATE(truncate)
TRUNCATE(truncate64)

#define ALL (SPACE | DATA | PERMISSION)
#define TWO_PATHS(name, word, needs)                                           \
    int name(const char *from, const char *to) {                               \
        FAULT(word, needs, AT_FDCWD, to)                                       \
        return REAL(int, name, const char *, const char *)(from, to);          \
    }
TWO_PATHS(rename, "rename", ALL)
TWO_PATHS(link, "link", ALL)
TWO_PATHS(symlink, "symlink", ALL)
int renameat(int a, const char *from, int b, const char *to) {
    FAULT("rename", ALL, b, to)
    return REAL(int, renameat, int, const char *, int, const char *)(a, from, b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    FAULT("rename", ALL, b, to)
    return REAL(int, renameat2, int, const char *, int, const char *, unsigned)(a, from, b, to, flags);
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    FAULT("link", ALL, b, to)
    return REAL(int, linkat, int, const char *, int, const char *, int)(a, from, b, to, flags);
}
int symlinkat(const char *from, int b, const char *to) {
    FAULT("symlink", ALL, b, to)
    return REAL(int, symlinkat, const char *, int, const char *)(from, b, to);
}
int mkdir(const char *path, mode_t bits) {
    FAULT("mkdir", ALL, AT_FDCWD, path)
    return REAL(int, mkdir, const char *, mode_t)(path, bits);
}
int mkdirat(int fd, const char *path, mode_t bits) {
    FAULT("mkdir", ALL, fd, path)
    return REAL(int, mkdirat, int, const char *, mode_t)(fd, path, bits);
}
int unlink(const char *path) {
    FAULT("unlink", DATA | PERMISSION, AT_FDCWD, path)
    return REAL(int, unlink, const char *)(path);
}
int unlinkat(int fd, const char *path, int flags) {
    FAULT("unlink", DATA | PERMISSION, fd, path)
    return REAL(int, unlinkat, int, const char *, int)(fd, path, flags);
}
int rmdir(const char *path) {
    FAULT("rmdir", DATA | PERMISSION, AT_FDCWD, path)
    return REAL(int, rmdir, const char *)(path);
}
int remove(const char *path) {
    FAULT("unlink", DATA | PERMISSION, AT_FDCWD, path)
    return REAL(int, remove, const char *)(path);
}
int chmod(const char *path, mode_t bits) {
    FAULT("chmod", PERMISSION, AT_FDCWD, path)
    return REAL(int, chmod, const char *, mode_t)(path, bits);
}
int fchmod(int fd, mode_t bits) {
    FAULT("chmod", PERMISSION, fd, NULL)
    return REAL(int, fchmod, int, mode_t)(fd, bits);
}
int fchmodat(int fd, const char *path, mode_t bits, int flags) {
    FAULT("chmod", PERMISSION, fd, path)
    return REAL(int, fchmodat, int, const char *, mode_t, int)(fd, path, bits, flags);
}
int utimensat(int fd, const char *path, const struct timespec times[2], int flags) {
    FAULT("utime", PERMISSION, fd, path)
    return REAL(int, utimensat, int, const char *, const struct timespec *, int)(fd, path, times, flags);
}

/* The wall clock, and waits that end at one of its times. */

#define CACHED(type, name, ...)                                              \
    static type (*real)(__VA_ARGS__);                                        \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name);
int clock_gettime(clockid_t clock, struct timespec *t) {
    CACHED(int, "clock_gettime", clockid_t, struct timespec *)
    int result = real(clock, t);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) t->tv_sec += *seconds;
    return result;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    CACHED(int, "gettimeofday", struct timeval *, void *)
    int result = real(t, zone);
    if (!result) t->tv_sec += *seconds;
    return result;
}
time_t time(time_t *out) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (out) *out = t.tv_sec;
    return t.tv_sec;
}
/* As the kernel has it; times of CLOCK_MONOTONIC, which a wait may have as well, are small. */
static struct timespec of_kernel(const struct timespec *end) {
    struct timespec t = *end;
    if (t.tv_sec > 1000000000) t.tv_sec -= *seconds;
    return t;
}
int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict end) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!real) *(void **)&real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    struct timespec t = of_kernel(end);
    return real(condition, mutex, &t);
}
int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict end) {
    CACHED(int, "sem_timedwait", sem_t *, const struct timespec *)
    struct timespec t = of_kernel(end);
    return real(semaphore, &t);
}
