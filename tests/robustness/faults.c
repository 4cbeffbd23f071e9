/* Fails, shortens, delays or kills the n-th call of a kind that touches a folder, and records what changes it.

   Loaded by LD_PRELOAD into an interpreter that forks a process for each run. Nothing happens until `faults_arm`. A call
   counts if its path, or what its descriptor stands for, begins with the armed folder. Counts and what was hit stand in
   memory that the parent shares, so that they outlive a process that is killed. A record is a header (struct record),
   two paths and the data; it is written after the call has succeeded, in the order of the calls. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

enum kind { OPEN, CREATE, READ, WRITE, SYNC, RENAME, TRUNCATE, ALLOCATE, MKDIR, UNLINK, CLOSE, LOCK, LINK, CHMOD, CHOWN,
            XATTR, ADVISE, STAT, LIST, MAP, DUP, SPACE, ACCESS, DIRECT, KINDS, CHANGING = KINDS, ANY };
enum action { FAIL, SHORTEN, DELAY, KILL, TEAR };
static const char changing[KINDS] = {[CREATE] = 1, [WRITE] = 1, [SYNC] = 1, [RENAME] = 1, [TRUNCATE] = 1, [ALLOCATE] = 1,
                                     [MKDIR] = 1, [UNLINK] = 1, [LINK] = 1, [CHMOD] = 1, [CHOWN] = 1, [XATTR] = 1};

struct slot {
    long counts[ANY + 1];
    long hits;
    char hit[1024]; /* the first call that was hit: its name and path */
};
struct record {
    int op, flags;
    long long inode, offset, length;
    int one, two, data; /* bytes that follow */
};
struct call {
    const char *name;
    char path[2048];
    enum kind kind;
    int half, kill_after, locked;
};

#define SLOTS 16
static struct slot *slots;
static struct { int on, kind, action, sticky, record; long first, value; struct slot *slot; char folder[1024]; } armed;
static __thread int apart; /* what this thread does now is somebody else's doing */
static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;

/* Once more in a process that runs beside others: what it counts is its own and its children's. */
__attribute__((constructor)) void faults_begin(void) {
    slots = mmap(NULL, SLOTS * sizeof *slots, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

struct slot *faults_slot(int number) { return &slots[number]; }

void faults_arm(int slot, const char *folder, int kind, long first, int action, long value, int sticky, int record) {
    memset(&slots[slot], 0, sizeof *slots);
    snprintf(armed.folder, sizeof armed.folder, "%s", folder);
    armed.slot = &slots[slot];
    armed.kind = kind, armed.first = first, armed.action = action, armed.value = value;
    armed.sticky = sticky, armed.record = record, armed.on = 1;
}

void faults_disarm(void) { armed.on = 0; }

void faults_apart(int on) { apart = on; }

static int path_of(int fd, char *into, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, into, size - 1);
    into[length < 0 ? 0 : length] = 0;
    return length > 0;
}

/* 1 where the call is to fail, with errno set. */
static int begin(struct call *call, const char *name, enum kind kind, int fd, const char *path) {
    call->half = call->kill_after = call->locked = 0;
    call->path[0] = 0;
    if (!armed.on || apart) return 0;
    if (path && !strncmp(path, "/proc/self/fd/", 14) && path[14]) path_of(atoi(path + 14), call->path, sizeof call->path);
    else if (path && path[0] == '/') snprintf(call->path, sizeof call->path, "%s", path);
    else if (fd >= 0 && path_of(fd, call->path, sizeof call->path) && path && *path) {
        size_t length = strlen(call->path);
        snprintf(call->path + length, sizeof call->path - length, "/%s", path);
    }
    if (strncmp(call->path, armed.folder, strlen(armed.folder))) { call->path[0] = 0; return 0; }
    call->name = name, call->kind = kind;
    long of_kind = __atomic_add_fetch(&armed.slot->counts[kind], 1, __ATOMIC_SEQ_CST);
    long of_any = __atomic_add_fetch(&armed.slot->counts[ANY], 1, __ATOMIC_SEQ_CST);
    long of_changing = changing[kind] ? __atomic_add_fetch(&armed.slot->counts[CHANGING], 1, __ATOMIC_SEQ_CST) : 0;
    long number = armed.kind == ANY ? of_any : armed.kind == CHANGING ? of_changing : armed.kind == (int)kind ? of_kind : 0;
    if (armed.first && number && (number == armed.first || (armed.sticky && number > armed.first))) {
        if (__atomic_add_fetch(&armed.slot->hits, 1, __ATOMIC_SEQ_CST) == 1)
            snprintf(armed.slot->hit, sizeof armed.slot->hit, "%s %s", name, call->path);
        if (armed.action == KILL) kill(getpid(), SIGKILL);
        if (armed.action == FAIL) { errno = (int)armed.value; return 1; }
        if (armed.action == DELAY) {
            struct timespec wait = {armed.value / 1000, armed.value % 1000 * 1000000};
            nanosleep(&wait, NULL);
        }
        call->half = armed.action == SHORTEN || armed.action == TEAR;
        call->kill_after = armed.action == TEAR;
    }
    if (armed.record >= 0 && changing[kind]) { pthread_mutex_lock(&order); call->locked = 1; }
    return 0;
}

static void put(const void *data, size_t size) {
    for (const char *at = data; size;) {
        long count = syscall(SYS_write, armed.record, at, size);
        if (count <= 0) abort();
        at += count, size -= count;
    }
}

static void note(struct call *call, int op, int flags, int fd, long long offset, long long length, const char *other,
                 const struct iovec *data, int pieces) {
    if (!call->locked) return;
    struct stat64 status;
    int saved = errno;
    memset(&status, 0, sizeof status);
    if (fd >= 0 ? fstat64(fd, &status) : fstatat64(AT_FDCWD, call->path, &status, AT_SYMLINK_NOFOLLOW)) status.st_ino = 0;
    struct record record = {op, flags, status.st_ino, offset, length, strlen(call->path), other ? strlen(other) : 0, data ? length : 0};
    put(&record, sizeof record);
    put(call->path, record.one);
    if (other) put(other, record.two);
    for (long long left = record.data; left > 0; data++) {
        size_t size = (long long)data->iov_len < left ? data->iov_len : (size_t)left;
        put(data->iov_base, size);
        left -= size;
    }
    (void)pieces;
    errno = saved;
}

static void finish(struct call *call) {
    if (call->locked) pthread_mutex_unlock(&order);
    if (call->kill_after) kill(getpid(), SIGKILL);
}

static size_t halved(const struct call *call, size_t count) { return call->half && count > 1 ? count / 2 : count; }

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define FAILS(name, kind, fd, path, result) struct call call; if (begin(&call, name, kind, fd, path)) return result
#define DONE(result, ok, ...) do { __typeof__(result) done_ = (result); if (ok) note(&call, __VA_ARGS__); finish(&call); return done_; } while (0)

/* --- names ------------------------------------------------------------------------------------------------------- */

static int opened(__typeof__(openat64) *real, int at, const char *path, int flags, mode_t mode) {
    int makes = (flags & O_CREAT) || (flags & O_TRUNC) || (flags & O_TMPFILE) == O_TMPFILE;
    FAILS("open", makes ? CREATE : OPEN, at, path, -1);
    int fd = real(at, path, flags, mode);
    DONE(fd, fd >= 0 && makes && (flags & O_TMPFILE) != O_TMPFILE, 'O', flags, fd, mode, 0, NULL, NULL, 0);
}
#define MODE va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest)
int openat64(int at, const char *path, int flags, ...) { MODE; REAL(openat64); return opened(real, at, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE; REAL(openat64); return opened(real, at, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE; REAL(openat64); return opened(real, AT_FDCWD, path, flags, mode); }
int open(const char *path, int flags, ...) { MODE; REAL(openat64); return opened(real, AT_FDCWD, path, flags, mode); }

#define PATHS(call_) struct call other; other.path[0] = 0; \
    if (armed.on) { if (two[0] == '/') snprintf(other.path, sizeof other.path, "%s", two); \
        else if (path_of(to, other.path, sizeof other.path)) { size_t n = strlen(other.path); snprintf(other.path + n, sizeof other.path - n, "/%s", two); } }

static int renamed(const char *name, int from, const char *one, int to, const char *two, unsigned flags) {
    static int (*real)(int, const char *, int, const char *, unsigned);
    if (!real) real = dlsym(RTLD_NEXT, "renameat2");
    FAILS(name, RENAME, from, one, -1);
    PATHS(call);
    int result = real(from, one, to, two, flags);
    DONE(result, !result, 'R', flags, -1, 0, 0, other.path, NULL, 0);
}
int renameat2(int from, const char *one, int to, const char *two, unsigned flags) { return renamed("renameat2", from, one, to, two, flags); }
int renameat(int from, const char *one, int to, const char *two) { return renamed("rename", from, one, to, two, 0); }
int rename(const char *one, const char *two) { return renamed("rename", AT_FDCWD, one, AT_FDCWD, two, 0); }
int linkat(int from, const char *one, int to, const char *two, int flags) {
    REAL(linkat);
    FAILS("link", LINK, from, one, -1);
    PATHS(call);
    int result = real(from, one, to, two, flags);
    DONE(result, !result, 'L', flags, -1, 0, 0, other.path, NULL, 0);
}
int link(const char *one, const char *two) { return linkat(AT_FDCWD, one, AT_FDCWD, two, 0); }
int mkdirat(int at, const char *path, mode_t mode) {
    REAL(mkdirat);
    FAILS("mkdir", MKDIR, at, path, -1);
    int result = real(at, path, mode);
    DONE(result, !result, 'D', 0, -1, mode, 0, NULL, NULL, 0);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int unlinkat(int at, const char *path, int flags) {
    REAL(unlinkat);
    FAILS(flags & AT_REMOVEDIR ? "rmdir" : "unlink", UNLINK, at, path, -1);
    int result = real(at, path, flags);
    DONE(result, !result, flags & AT_REMOVEDIR ? 'X' : 'U', 0, -1, 0, 0, NULL, NULL, 0);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

/* A read past the page cache is a kind of its own: what refuses it says nothing of the file. */
static enum kind reading(int fd) { return armed.on && fcntl(fd, F_GETFL) & O_DIRECT ? DIRECT : READ; }

/* --- bytes ------------------------------------------------------------------------------------------------------- */

ssize_t read(int fd, void *into, size_t count) { REAL(read); FAILS("read", READ, fd, NULL, -1); return real(fd, into, halved(&call, count)); }
ssize_t pread64(int fd, void *into, size_t count, off64_t at) { REAL(pread64); FAILS("pread", reading(fd), fd, NULL, -1); return real(fd, into, halved(&call, count), at); }
ssize_t pread(int fd, void *into, size_t count, off_t at) { return pread64(fd, into, count, at); }
ssize_t preadv64v2(int fd, const struct iovec *pieces, int number, off64_t at, int flags) {
    REAL(preadv64v2);
    if (flags) return real(fd, pieces, number, at, flags); /* a question to the page cache */
    FAILS("preadv", reading(fd), fd, NULL, -1);
    if (!call.half || !number) return real(fd, pieces, number, at, flags);
    struct iovec first = {pieces[0].iov_base, halved(&call, pieces[0].iov_len)};
    return real(fd, &first, 1, at, flags);
}
ssize_t preadv64(int fd, const struct iovec *pieces, int number, off64_t at) { return preadv64v2(fd, pieces, number, at, 0); }
ssize_t preadv(int fd, const struct iovec *pieces, int number, off_t at) { return preadv64v2(fd, pieces, number, at, 0); }

static off64_t position(int fd) {
    if (fcntl(fd, F_GETFL) & O_APPEND) { struct stat64 status; return fstat64(fd, &status) ? 0 : status.st_size; }
    return lseek64(fd, 0, SEEK_CUR);
}
ssize_t write(int fd, const void *data, size_t count) {
    REAL(write);
    FAILS("write", WRITE, fd, NULL, -1);
    off64_t at = call.locked ? position(fd) : 0;
    ssize_t done = real(fd, data, halved(&call, count));
    struct iovec piece = {(void *)data, count};
    DONE(done, done > 0, 'W', 0, fd, at, done, NULL, &piece, 1);
}
ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) {
    REAL(pwrite64);
    FAILS("pwrite", WRITE, fd, NULL, -1);
    ssize_t done = real(fd, data, halved(&call, count), at);
    struct iovec piece = {(void *)data, count};
    DONE(done, done > 0, 'W', 0, fd, at, done, NULL, &piece, 1);
}
ssize_t pwrite(int fd, const void *data, size_t count, off_t at) { return pwrite64(fd, data, count, at); }
ssize_t pwritev64v2(int fd, const struct iovec *pieces, int number, off64_t at, int flags) {
    REAL(pwritev64v2);
    FAILS("pwritev", WRITE, fd, NULL, -1);
    struct iovec first = {pieces ? pieces[0].iov_base : NULL, number ? halved(&call, pieces[0].iov_len) : 0};
    ssize_t done = call.half ? real(fd, &first, 1, at, flags) : real(fd, pieces, number, at, flags);
    DONE(done, done > 0, 'W', 0, fd, at, done, NULL, pieces, number);
}
ssize_t writev(int fd, const struct iovec *pieces, int number) {
    REAL(writev);
    FAILS("writev", WRITE, fd, NULL, -1);
    off64_t at = call.locked ? position(fd) : 0;
    struct iovec first = {number ? pieces[0].iov_base : NULL, number ? halved(&call, pieces[0].iov_len) : 0};
    ssize_t done = call.half ? real(fd, &first, 1) : real(fd, pieces, number);
    DONE(done, done > 0, 'W', 0, fd, at, done, NULL, pieces, number);
}
ssize_t readv(int fd, const struct iovec *pieces, int number) { REAL(readv); FAILS("readv", READ, fd, NULL, -1); return real(fd, pieces, call.half && number > 1 ? number / 2 : number); }

static const char *of_folder(int fd, const char *file, const char *folder) {
    struct stat status;
    return armed.on && !syscall(SYS_fstat, fd, &status) && S_ISDIR(status.st_mode) ? folder : file;
}
int fsync(int fd) { REAL(fsync); FAILS(of_folder(fd, "fsync", "fsyncdir"), SYNC, fd, NULL, -1); int result = real(fd); DONE(result, !result, 'S', 0, fd, 0, 0, NULL, NULL, 0); }
int fdatasync(int fd) { REAL(fdatasync); FAILS("fdatasync", SYNC, fd, NULL, -1); int result = real(fd); DONE(result, !result, 'S', 0, fd, 0, 0, NULL, NULL, 0); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); FAILS("ftruncate", TRUNCATE, fd, NULL, -1); int result = real(fd, size); DONE(result, !result, 'T', 0, fd, size, 0, NULL, NULL, 0); }
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }
int fallocate64(int fd, int mode, off64_t at, off64_t size) { REAL(fallocate64); FAILS("fallocate", ALLOCATE, fd, NULL, -1); int result = real(fd, mode, at, size); DONE(result, !result, 'A', mode, fd, at, size, NULL, NULL, 0); }
int fallocate(int fd, int mode, off_t at, off_t size) { return fallocate64(fd, mode, at, size); }
int posix_fadvise64(int fd, off64_t at, off64_t size, int advice) { REAL(posix_fadvise64); FAILS("posix_fadvise", ADVISE, fd, NULL, errno); return real(fd, at, size, advice); }
int posix_fadvise(int fd, off_t at, off_t size, int advice) { return posix_fadvise64(fd, at, size, advice); }
void *mmap64(void *at, size_t size, int how, int flags, int fd, off64_t offset) {
    if (fd >= 0 && armed.on) { FAILS("mmap", MAP, fd, NULL, MAP_FAILED); }
    return (void *)syscall(SYS_mmap, at, size, how, flags, fd, offset);
}
void *mmap(void *at, size_t size, int how, int flags, int fd, off_t offset) { return mmap64(at, size, how, flags, fd, offset); }
int close(int fd) {
    REAL(close);
    struct call call;
    if (!begin(&call, "close", CLOSE, fd, NULL)) return real(fd);
    int wanted = errno;
    real(fd); /* Linux lets go of the descriptor whatever it says */
    errno = wanted;
    return -1;
}

/* --- the rest ---------------------------------------------------------------------------------------------------- */

int flock(int fd, int how) { REAL(flock); FAILS("flock", LOCK, fd, NULL, -1); return real(fd, how); }
int fcntl64(int fd, int command, ...) {
    static int (*real)(int, int, ...);
    if (!real) real = (int (*)(int, int, ...))dlsym(RTLD_NEXT, "fcntl64");
    va_list rest; va_start(rest, command); void *argument = va_arg(rest, void *); va_end(rest);
    if (command == F_DUPFD_CLOEXEC || command == F_DUPFD) { FAILS("dup", DUP, fd, NULL, -1); }
    return real(fd, command, argument);
}
int fchmod(int fd, mode_t mode) { REAL(fchmod); FAILS("fchmod", CHMOD, fd, NULL, -1); int result = real(fd, mode); DONE(result, !result, 'M', 0, fd, mode, 0, NULL, NULL, 0); }
int fchmodat(int at, const char *path, mode_t mode, int flags) { REAL(fchmodat); FAILS("chmod", CHMOD, at, path, -1); int result = real(at, path, mode, flags); DONE(result, !result, 'M', 0, -1, mode, 0, NULL, NULL, 0); }
int chmod(const char *path, mode_t mode) { return fchmodat(AT_FDCWD, path, mode, 0); }
int fchown(int fd, uid_t user, gid_t group) { REAL(fchown); FAILS("fchown", CHOWN, fd, NULL, -1); int result = real(fd, user, group); finish(&call); return result; }
static const char *setting(const char *name) { return strncmp(name, "system.", 7) ? "setxattr" : "setlist"; }
int fsetxattr(int fd, const char *name, const void *value, size_t size, int flags) {
    REAL(fsetxattr);
    FAILS(setting(name), XATTR, fd, NULL, -1);
    int result = real(fd, name, value, size, flags);
    struct iovec piece = {(void *)value, size};
    DONE(result, !result, 'E', flags, fd, 0, size, name, &piece, 1);
}
ssize_t fgetxattr(int fd, const char *name, void *value, size_t size) { REAL(fgetxattr); FAILS("getxattr", STAT, fd, NULL, -1); return real(fd, name, value, size); }
int setxattr(const char *path, const char *name, const void *value, size_t size, int flags) { REAL(setxattr); FAILS(setting(name), XATTR, AT_FDCWD, path, -1); int result = real(path, name, value, size, flags); finish(&call); return result; }
int lsetxattr(const char *path, const char *name, const void *value, size_t size, int flags) { REAL(lsetxattr); FAILS(setting(name), XATTR, AT_FDCWD, path, -1); int result = real(path, name, value, size, flags); finish(&call); return result; }
int fremovexattr(int fd, const char *name) { REAL(fremovexattr); FAILS("removexattr", XATTR, fd, NULL, -1); int result = real(fd, name); finish(&call); return result; }
int removexattr(const char *path, const char *name) { REAL(removexattr); FAILS("removexattr", XATTR, AT_FDCWD, path, -1); int result = real(path, name); finish(&call); return result; }
int lremovexattr(const char *path, const char *name) { REAL(lremovexattr); FAILS("removexattr", XATTR, AT_FDCWD, path, -1); int result = real(path, name); finish(&call); return result; }
ssize_t getxattr(const char *path, const char *name, void *value, size_t size) { REAL(getxattr); FAILS("getxattr", STAT, AT_FDCWD, path, -1); return real(path, name, value, size); }
ssize_t lgetxattr(const char *path, const char *name, void *value, size_t size) { REAL(lgetxattr); FAILS("getxattr", STAT, AT_FDCWD, path, -1); return real(path, name, value, size); }
/* Where a descriptor stands is asked of /proc, which is no disk. */
static int of_proc(const char *path) { return !strncmp(path, "/proc/", 6); }
ssize_t readlinkat(int at, const char *path, char *into, size_t size) {
    REAL(readlinkat);
    if (of_proc(path)) return real(at, path, into, size);
    FAILS("readlink", STAT, at, path, -1);
    return real(at, path, into, size);
}
ssize_t readlink(const char *path, char *into, size_t size) { return readlinkat(AT_FDCWD, path, into, size); }
int statx(int at, const char *path, int flags, unsigned mask, struct statx *into) {
    REAL(statx);
    FAILS("statx", STAT, at, path, -1); /* how safetensors looks, by Rust's library */
    return real(at, path, flags, mask, into);
}
int fstat64(int fd, struct stat64 *into) { REAL(fstat64); FAILS("fstat", STAT, fd, NULL, -1); return real(fd, into); }
int fstatat64(int at, const char *path, struct stat64 *into, int flags) { REAL(fstatat64); FAILS("stat", STAT, at, path, -1); return real(at, path, into, flags); }
int stat64(const char *path, struct stat64 *into) { return fstatat64(AT_FDCWD, path, into, 0); }
int lstat64(const char *path, struct stat64 *into) { return fstatat64(AT_FDCWD, path, into, AT_SYMLINK_NOFOLLOW); }
int __xstat64(int version, const char *path, struct stat64 *into) { (void)version; return fstatat64(AT_FDCWD, path, into, 0); }
int __fxstat64(int version, int fd, struct stat64 *into) { (void)version; return fstat64(fd, into); }
int faccessat(int at, const char *path, int mode, int flags) { REAL(faccessat); FAILS("access", ACCESS, at, path, -1); return real(at, path, mode, flags); }
int access(const char *path, int mode) { return faccessat(AT_FDCWD, path, mode, 0); }
int statvfs64(const char *path, struct statvfs64 *into) { REAL(statvfs64); FAILS("statvfs", SPACE, -1, path, -1); return real(path, into); }
DIR *opendir(const char *path) { REAL(opendir); FAILS("opendir", LIST, -1, path, NULL); return real(path); }
DIR *fdopendir(int fd) { REAL(fdopendir); FAILS("fdopendir", LIST, fd, NULL, NULL); return real(fd); }
struct dirent64 *readdir64(DIR *folder) { REAL(readdir64); FAILS("readdir", LIST, dirfd(folder), NULL, NULL); return real(folder); }
FILE *fopen64(const char *path, const char *how) { REAL(fopen64); FAILS("fopen", OPEN, -1, path, NULL); return real(path, how); }
FILE *fopen(const char *path, const char *how) { return fopen64(path, how); }
