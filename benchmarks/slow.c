/* A slower disk: adds a time to every fsync, and lets all processes together write no more than so many bytes a second.

   Loaded by LD_PRELOAD. SLOW_SYNC_MS: milliseconds that fsync, fdatasync and sync take longer. SLOW_RATE: bytes a second.
   SLOW_BUCKET: a file of 8 bytes, which the processes share: the time (CLOCK_MONOTONIC, nanoseconds) up to which the
   rate is spent. Each write to a regular file advances it, and comes back when that time has come. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static long sync_ms;
static double rate;
static long long *bucket, own;

__attribute__((constructor)) static void start(void) {
    const char *text = getenv("SLOW_SYNC_MS"), *name = getenv("SLOW_BUCKET");
    if (text) sync_ms = atol(text);
    if ((text = getenv("SLOW_RATE"))) rate = atof(text);
    bucket = &own;
    int fd = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
    if (fd >= 0) {
        void *shared = mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (shared != MAP_FAILED) bucket = shared;
        close(fd);
    }
}

static long long now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}
static void until(long long when) {
    struct timespec at = {when / 1000000000LL, when % 1000000000LL};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL)) {}
}
static void late(void) {
    if (sync_ms > 0) until(now() + sync_ms * 1000000LL);
}
static ssize_t paid(int fd, ssize_t count) {
    struct stat64 status;
    if (rate <= 0 || count <= 0 || fstat64(fd, &status) || !S_ISREG(status.st_mode) || !status.st_nlink)
        return count; /* a file without a name is one in memory */
    long long cost = (long long)(count / rate * 1e9), before = __atomic_load_n(bucket, __ATOMIC_SEQ_CST), spent;
    do {
        long long least = now() - 100000000LL; /* what was left unused for a tenth of a second may be caught up with */
        spent = (before > least ? before : least) + cost;
    } while (!__atomic_compare_exchange_n(bucket, &before, spent, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    if (spent > now()) until(spent);
    return count;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
int fsync(int fd) { REAL(fsync); late(); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); late(); return real(fd); }
void sync(void) { REAL(sync); late(); real(); }
ssize_t write(int fd, const void *data, size_t size) { REAL(write); return paid(fd, real(fd, data, size)); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { REAL(pwrite); return paid(fd, real(fd, data, size, at)); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { REAL(pwrite64); return paid(fd, real(fd, data, size, at)); }
ssize_t writev(int fd, const struct iovec *pieces, int number) { REAL(writev); return paid(fd, real(fd, pieces, number)); }
ssize_t pwritev64(int fd, const struct iovec *pieces, int number, off64_t at) { REAL(pwritev64); return paid(fd, real(fd, pieces, number, at)); }
ssize_t pwritev64v2(int fd, const struct iovec *pieces, int number, off64_t at, int flags) { REAL(pwritev64v2); return paid(fd, real(fd, pieces, number, at, flags)); }
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) { REAL(sendfile64); return paid(to, real(to, from, at, size)); }
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *there, size_t size, unsigned flags) {
    REAL(copy_file_range);
    return paid(to, real(from, at, to, there, size < 8 << 20 ? size : 8 << 20, flags));
}
