/* Counts what a program copies: bytes through memcpy and memmove, and through blocks that realloc had to move, thread by
 * thread. Put in front of the C library with LD_PRELOAD; the counts are in the file that COPIES_FILE names, mapped, so
 * that whoever maps or reads it sees them while the program runs. Copies shorter than COPIES_MIN bytes are left out.
 *
 * Always true
 * - Copies are made as before. What compilers write out as plain moves (small, of a fixed size) is not seen, nor is what
 *   the kernel copies; so a slope per byte of payload is exact, a number of bytes is a lower bound.
 *
 * Used by benches/copies.rs, which builds it. Not a part of the program.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <malloc.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ROWS 256

struct row {
    uint64_t tid; /* 0: not taken */
    uint64_t copied;
    uint64_t moved;
};

static struct row *rows;
static size_t len_min;
static unsigned rows_taken;
static __thread struct row *mine __attribute__((tls_model("initial-exec")));

extern void *__libc_realloc(void *, size_t);

__attribute__((constructor)) static void open_counts(void) {
    const char *path = getenv("COPIES_FILE");
    const char *min = getenv("COPIES_MIN");
    len_min = min ? strtoul(min, NULL, 10) : 0;
    int fd = path ? open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
    if (fd < 0 || ftruncate(fd, sizeof(struct row) * ROWS) != 0)
        return;
    void *map = mmap(NULL, sizeof(struct row) * ROWS, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED)
        rows = map;
}

static struct row *row(void) {
    if (!mine && rows) {
        unsigned at = __atomic_fetch_add(&rows_taken, 1, __ATOMIC_RELAXED);
        if (at < ROWS) {
            mine = &rows[at];
            mine->tid = (uint64_t)syscall(SYS_gettid);
        }
    }
    return mine;
}

static void count(size_t len) {
    struct row *r = len >= len_min ? row() : NULL;
    if (r)
        r->copied += len;
}

/* Words that may lie anywhere and be of any type. */
struct word { uint64_t value; } __attribute__((packed, may_alias));

static void forward(unsigned char *to, const unsigned char *from, size_t len) {
    for (; len >= 8; len -= 8, to += 8, from += 8)
        *(struct word *)to = *(const struct word *)from;
    while (len--)
        *to++ = *from++;
}

void *memcpy(void *restrict to, const void *restrict from, size_t len) {
    count(len);
    forward(to, from, len);
    return to;
}

void *memmove(void *to, const void *from, size_t len) {
    count(len);
    unsigned char *t = to;
    const unsigned char *f = from;
    if (t <= f || t >= f + len)
        forward(t, f, len);
    else
        while (len--)
            t[len] = f[len];
    return to;
}

void *realloc(void *block, size_t len) {
    /* A block with a mapping of its own (bit 1 of its size) is moved by changing the mapping: nothing is copied. */
    size_t old = block && !(((size_t *)block)[-1] & 2) ? malloc_usable_size(block) : 0;
    void *now = __libc_realloc(block, len);
    struct row *r = row();
    if (r && now && now != block)
        r->moved += old < len ? old : len;
    return now;
}
