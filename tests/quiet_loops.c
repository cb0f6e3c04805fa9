/* Lets threads that wait for sockets sleep where they would spin.
 *
 * The loop of gloo's TCP transport passes over a connection whose lock another thread holds, and asks the
 * kernel again at once: millions of times in a minute of ranks, on the processor that the other thread waits
 * for. Where one call after another finds something and nothing is read or written between, this waits for
 * some 20 microseconds.
 */
#define _GNU_SOURCE
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static __thread int vain;

int epoll_wait(int epfd, struct epoll_event *events, int maxevents, int timeout) {
    const int found = syscall(SYS_epoll_wait, epfd, events, maxevents, timeout);
    if (found <= 0) {
        vain = 0;
    } else if (++vain > 2) {
        const struct timespec moment = {0, 20000};
        nanosleep(&moment, 0);
    }
    return found;
}

ssize_t recv(int socket, void *buffer, size_t length, int flags) {
    vain = 0;
    return syscall(SYS_recvfrom, socket, buffer, length, flags, 0, 0);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    vain = 0;
    return syscall(SYS_writev, fd, parts, count);
}
