/* Preloaded before the C library: kills the process at the n-th call to the system that may change a folder.

   Whoever makes the call is seen: Python, or native code (safetensors, torch). A killed write has written half.
   Calls are counted once `watch_calls` is called, in this process alone; their names are kept for `call_name`. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST 100000
static char folder[PATH_MAX];
static long count, last = -1;
static const char *names[MOST];

void watch_calls(const char *path, long step) {
    snprintf(folder, sizeof folder, "%s", path);
    count = 0;
    last = step;
}

long count_calls(void) { return count; }
const char *call_name(long number) { return names[number]; }

static int concerns(int at, const char *path) {
    char link[64], start[PATH_MAX], whole[2 * PATH_MAX];
    start[0] = 0;
    if (path == NULL || path[0] != '/') {
        if (at == AT_FDCWD) {
            if (getcwd(start, sizeof start) == NULL) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", at);
            ssize_t size = readlink(link, start, sizeof start - 1);
            if (size < 0) return 0;
            start[size] = 0;
        }
    }
    snprintf(whole, sizeof whole, "%s/%s", start, path == NULL ? "" : path);
    return strstr(whole, folder) != NULL;
}

/* Whether this call is the last one. */
static int note(const char *name, int at, const char *path) {
    if (folder[0] == 0) return 0;
    int before = errno, ours = concerns(at, path);
    errno = before;
    if (!ours) return 0;
    if (count < MOST) names[count] = name;
    return count++ == last;
}

static void die(void) { kill(getpid(), SIGKILL); }

#define CHANGES(flags) (flags & (O_WRONLY | O_RDWR | O_CREAT))
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define PATH_CALL(name, at, path, parameters, arguments) \
    int name parameters { \
        if (note(#name, at, path)) die(); \
        return REAL(name) arguments; \
    }
#define OPEN_CALL(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (CHANGES(flags) && note(#name, AT_FDCWD, path)) die(); \
        return REAL(name)(path, flags, mode); \
    }
#define OPENAT_CALL(name) \
    int name(int at, const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (CHANGES(flags) && note(#name, at, path)) die(); \
        return REAL(name)(at, path, flags, mode); \
    }

OPEN_CALL(open)
OPEN_CALL(open64)
OPENAT_CALL(openat)
OPENAT_CALL(openat64)
PATH_CALL(rename, AT_FDCWD, from, (const char *from, const char *to), (from, to))
PATH_CALL(renameat, at, from, (int at, const char *from, int there, const char *to), (at, from, there, to))
PATH_CALL(link, AT_FDCWD, to, (const char *from, const char *to), (from, to))
PATH_CALL(symlink, AT_FDCWD, to, (const char *from, const char *to), (from, to))
PATH_CALL(unlink, AT_FDCWD, path, (const char *path), (path))
PATH_CALL(unlinkat, at, path, (int at, const char *path, int flags), (at, path, flags))
PATH_CALL(rmdir, AT_FDCWD, path, (const char *path), (path))
PATH_CALL(mkdir, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
PATH_CALL(mkdirat, at, path, (int at, const char *path, mode_t mode), (at, path, mode))
PATH_CALL(fsync, file, NULL, (int file), (file))
PATH_CALL(fdatasync, file, NULL, (int file), (file))
PATH_CALL(ftruncate, file, NULL, (int file, off_t size), (file, size))
PATH_CALL(ftruncate64, file, NULL, (int file, off64_t size), (file, size))
PATH_CALL(flock, file, NULL, (int file, int operation), (file, operation))

ssize_t write(int file, const void *data, size_t size) {
    if (note("write", file, NULL)) {
        REAL(write)(file, data, size / 2);
        die();
    }
    return REAL(write)(file, data, size);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t place) {
    if (note("pwrite64", file, NULL)) {
        REAL(pwrite64)(file, data, size / 2, place);
        die();
    }
    return REAL(pwrite64)(file, data, size, place);
}

ssize_t writev(int file, const struct iovec *data, int parts) {
    if (note("writev", file, NULL)) {
        REAL(writev)(file, data, parts / 2);
        die();
    }
    return REAL(writev)(file, data, parts);
}
