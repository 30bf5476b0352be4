/* Preloaded into ranks by faults.py: reads of checkpoints that go wrong, writes that take long.

   FAULT_READS  "RANK FIRST LAST FILE": of this rank's reads of shards, those from number FIRST to
                LAST differ in one bit; each of them adds a line to FILE.
   FAULT_WRITES "MS": each write into a checkpoint under way takes so many milliseconds more. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static int path_has(int fd, const char *part)
{
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0)
        return 0;
    path[size] = 0;
    return strstr(path, part) != NULL;
}

static void spoil(int fd, char *data, ssize_t got)
{
    static long seen;
    long first, last;
    int rank;
    char file[2048];
    const char *told = getenv("FAULT_READS"), *own = getenv("RANK");
    if (!told || !own || got < 256 || !path_has(fd, ".distcp"))
        return;
    if (sscanf(told, "%d %ld %ld %2047s", &rank, &first, &last, file) != 4 || rank != atoi(own))
        return;
    long number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (number < first || number > last)
        return;
    data[got / 2] ^= 4;
    int out = open(file, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (out >= 0) {
        dprintf(out, "read %ld of %zd bytes\n", number, got);
        close(out);
    }
}

ssize_t read(int fd, void *data, size_t size)
{
    static ssize_t (*real)(int, void *, size_t);
    if (!real)
        real = (ssize_t(*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    ssize_t got = real(fd, data, size);
    int kept = errno;
    if (got > 0)
        spoil(fd, data, got);
    errno = kept;
    return got;
}

ssize_t write(int fd, const void *data, size_t size)
{
    static ssize_t (*real)(int, const void *, size_t);
    const char *told = getenv("FAULT_WRITES");
    if (!real)
        real = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    if (told && path_has(fd, ".partial/")) {
        long ms = atol(told);
        struct timespec pause = {ms / 1000, ms % 1000 * 1000000};
        nanosleep(&pause, NULL);
    }
    return real(fd, data, size);
}
