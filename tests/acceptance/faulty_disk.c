/* SPDX-License-Identifier: Apache-2.0
   Preloaded into a test's process: from the moment it is armed, the n-th call that changes the disk kills the process or fails.

   arm(n, mode): mode 0 counts only, 1 kills before the call, 2 kills after it, 3 kills after half of a write, and any
   larger one is an errno with which the call fails (100 + errno). Calls of the same process that are not armed pass.
   With `persistent` every call from the n-th on fails, as on a disk that stays full, but those that remove something. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int armed, at, mode, persistent, count;
static char journal[1 << 16];

void arm(int n, int m, int p) { at = n; mode = m; persistent = p; count = 0; journal[0] = 0; armed = 1; }
int disarm(void) { armed = 0; return count; }
const char *calls(void) { return journal; }

/* what the call that is about to happen must do: 0 go on, 1 die after it, 2 do half and die, -1 fail */
static int turn(const char *name, int removes) {
    if (!armed) return 0;
    count++;
    if (strlen(journal) + strlen(name) + 2 < sizeof journal) { strcat(journal, name); strcat(journal, " "); }
    int hit = count == at || (persistent && count > at && !removes && mode >= 100);
    if (!hit || mode == 0) return 0;
    if (mode == 1) { kill(getpid(), SIGKILL); for (;;) pause(); }
    if (mode == 2) return 1;
    if (mode == 3) return 2;
    errno = mode - 100;
    return -1;
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define WRAP(name, removes, call) REAL(name); int t = turn(#name, removes); if (t == -1) return -1; \
    __typeof__(call) r = call; if (t) die(); return r

static int on_disk(int fd) { struct stat s; return fd > 2 && fstat(fd, &s) == 0 && S_ISREG(s.st_mode); }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    int t = armed && on_disk(fd) ? turn("write", 0) : 0;
    if (t == -1) return -1;
    if (t == 2) { real(fd, data, size / 2); die(); }
    ssize_t r = real(fd, data, size);
    if (t) die();
    return r;
}
ssize_t writev(int fd, const struct iovec *v, int n) {
    REAL(writev);
    int t = armed && on_disk(fd) ? turn("writev", 0) : 0; /* what processes say to each other passes */
    if (t == -1) return -1;
    ssize_t r = real(fd, v, n);
    if (t) die();
    return r;
}
ssize_t pwrite(int fd, const void *d, size_t n, off_t o) { WRAP(pwrite, 0, real(fd, d, n, o)); }
ssize_t pwrite64(int fd, const void *d, size_t n, off64_t o) { WRAP(pwrite64, 0, real(fd, d, n, o)); }
int fsync(int fd) { WRAP(fsync, 0, real(fd)); }
int fdatasync(int fd) { WRAP(fdatasync, 0, real(fd)); }
int ftruncate(int fd, off_t n) { WRAP(ftruncate, 0, real(fd, n)); }
int ftruncate64(int fd, off64_t n) { WRAP(ftruncate64, 0, real(fd, n)); }
int rename(const char *a, const char *b) { WRAP(rename, 0, real(a, b)); }
int renameat(int d, const char *a, int e, const char *b) { WRAP(renameat, 0, real(d, a, e, b)); }
int renameat2(int d, const char *a, int e, const char *b, unsigned f) { WRAP(renameat2, 0, real(d, a, e, b, f)); }
int link(const char *a, const char *b) { WRAP(link, 0, real(a, b)); }
int symlink(const char *a, const char *b) { WRAP(symlink, 0, real(a, b)); }
int unlink(const char *a) { WRAP(unlink, 1, real(a)); }
int unlinkat(int d, const char *a, int f) { WRAP(unlinkat, 1, real(d, a, f)); }
int rmdir(const char *a) { WRAP(rmdir, 1, real(a)); }
int mkdir(const char *a, mode_t m) { WRAP(mkdir, 0, real(a, m)); }
int mkdirat(int d, const char *a, mode_t m) { WRAP(mkdirat, 0, real(d, a, m)); }

#define OPEN(name, ...) \
    mode_t m = 0; if (flags & O_CREAT) { va_list l; va_start(l, flags); m = va_arg(l, mode_t); va_end(l); } \
    REAL(name); int t = armed && (flags & O_CREAT) ? turn("creat", 0) : 0; if (t == -1) return -1; \
    int r = real(__VA_ARGS__, flags, m); if (t) die(); return r
int open(const char *path, int flags, ...) { OPEN(open, path); }
int open64(const char *path, int flags, ...) { OPEN(open64, path); }
int openat(int d, const char *path, int flags, ...) { OPEN(openat, d, path); }
int openat64(int d, const char *path, int flags, ...) { OPEN(openat64, d, path); }
