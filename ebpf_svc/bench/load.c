/* SPDX-License-Identifier: Apache-2.0 */
/* Makes and answers the traffic of `ebpf-svc bench path`, and times it.
 *
 *   load serve ECHO SINK CPU           TCP and UDP on both ports, until killed
 *   load connect|request|bulk|udp-request|udp-first|udp-rate ADDRESS PORT MS CPU [SOCKETS]
 *
 * A client runs on one CPU for that long and prints one line of JSON. One exchange at a time: the
 * rate is then the cost of the whole way, and no queue hides it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define REQUEST_BYTES 64
#define BULK_BYTES (128 << 10)
#define BATCH 64
#define TIMEOUT_S 1
#define ERRORS_MAX 20		/* more of them and the figure means nothing */
#define SOCKETS_MAX 4096
#define FD_MAX 65536

/* -- time and its distribution -------------------------------------------------------------- */

#define SUB_BITS 6		/* 64 steps to a power of two: 1.6 % */
#define SUB (1u << SUB_BITS)
#define BUCKETS (SUB * 40)

static uint64_t histogram[BUCKETS];
static uint64_t slowest_ns;

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t now_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

static void record(uint64_t ns)
{
	unsigned int shift = 0, bucket;

	if (ns > slowest_ns)
		slowest_ns = ns;
	while ((ns >> shift) >= 2 * SUB)
		shift++;
	bucket = shift * SUB + (unsigned int)(ns >> shift);
	histogram[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
}

/* The smallest value of a bucket. */
static uint64_t bucket_ns(unsigned int bucket)
{
	unsigned int shift = bucket < 2 * SUB ? 0 : bucket / SUB - 1;

	return (uint64_t)(bucket - shift * SUB) << shift;
}

static uint64_t percentile(double share)
{
	uint64_t total = 0, seen = 0;
	unsigned int i;

	for (i = 0; i < BUCKETS; i++)
		total += histogram[i];
	for (i = 0; i < BUCKETS; i++) {
		seen += histogram[i];
		if (seen && (double)seen >= share * (double)total)
			return bucket_ns(i);
	}
	return 0;
}

/* -- sockets -------------------------------------------------------------------------------- */

static struct sockaddr_storage target;
static socklen_t target_len;

static void die(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void resolve(const char *address, int port)
{
	struct sockaddr_in *v4 = (struct sockaddr_in *)&target;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&target;

	if (inet_pton(AF_INET, address, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons((uint16_t)port);
		target_len = sizeof(*v4);
	} else if (inet_pton(AF_INET6, address, &v6->sin6_addr) == 1) {
		v6->sin6_family = AF_INET6;
		v6->sin6_port = htons((uint16_t)port);
		target_len = sizeof(*v6);
	} else {
		errno = EINVAL;
		die(address);
	}
}

static void give_up_after(int fd)
{
	struct timeval timeout = { .tv_sec = TIMEOUT_S };

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
}

/* A socket connected to the target; -1 when that failed. */
static int open_to_target(int type)
{
	int one = 1, fd = socket(target.ss_family, type, 0);

	if (fd < 0)
		die("socket");
	give_up_after(fd);
	if (type == SOCK_STREAM)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (connect(fd, (struct sockaddr *)&target, target_len)) {
		close(fd);
		return -1;
	}
	return fd;
}

/* Close at once by a reset: a port in TIME_WAIT would be missing a minute later. */
static void abort_connection(int fd)
{
	struct linger none = { .l_onoff = 1, .l_linger = 0 };

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof(none));
	close(fd);
}

static int exchange(int fd)
{
	static char bytes[REQUEST_BYTES];
	ssize_t got, have = 0;

	if (send(fd, bytes, sizeof(bytes), 0) != sizeof(bytes))
		return -1;
	while (have < (ssize_t)sizeof(bytes)) {
		got = recv(fd, bytes + have, sizeof(bytes) - (size_t)have, 0);
		if (got <= 0)
			return -1;
		have += got;
	}
	return 0;
}

/* -- the measures: each returns how many were done ------------------------------------------- */

static uint64_t begun_ns, end_ns, length_ns, begun_cpu_ns, errors, bytes_done;

/* What went before, such as opening sockets, does not count. */
static void start_clock(void)
{
	begun_ns = now_ns();
	end_ns = begun_ns + length_ns;
	begun_cpu_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
}

static int failed(void)
{
	return ++errors > ERRORS_MAX;
}

/* A new socket for each exchange. */
static uint64_t run_new(int type)
{
	uint64_t done = 0, begun;
	int fd;

	while ((begun = now_ns()) < end_ns) {
		fd = open_to_target(type);
		if (fd < 0 || exchange(fd)) {
			if (fd >= 0)
				abort_connection(fd);
			if (failed())
				break;
			continue;
		}
		record(now_ns() - begun);
		if (type == SOCK_STREAM)
			abort_connection(fd);
		else
			close(fd);
		done++;
	}
	return done;
}

/* Sockets that stay open, asked one after the other. */
static uint64_t run_open(int type, int count)
{
	static int fds[SOCKETS_MAX];
	uint64_t done = 0, begun;
	int i;

	for (i = 0; i < count; i++) {
		fds[i] = open_to_target(type);
		if (fds[i] < 0 || exchange(fds[i]))
			die("open");
	}
	start_clock();
	for (i = 0; (begun = now_ns()) < end_ns; i = (i + 1) % count) {
		if (exchange(fds[i])) {
			if (failed())
				break;
			continue;
		}
		record(now_ns() - begun);
		done++;
	}
	return done;
}

static uint64_t run_bulk(void)
{
	static char block[BULK_BYTES];
	uint64_t total = 0;
	ssize_t sent;
	int fd = open_to_target(SOCK_STREAM);

	if (fd < 0)
		die("connect");
	while (now_ns() < end_ns) {
		sent = send(fd, block, sizeof(block), 0);
		if (sent < 0)
			die("send");
	}
	shutdown(fd, SHUT_WR);
	if (recv(fd, &total, sizeof(total), MSG_WAITALL) != sizeof(total))
		die("the receiver's count");
	bytes_done = total;
	close(fd);
	return total / BULK_BYTES;
}

/* Datagrams one way; what arrived is asked of the receiver. */
static uint64_t run_rate(void)
{
	static char bytes[REQUEST_BYTES];
	struct mmsghdr batch[BATCH];
	struct iovec iov = { .iov_base = bytes, .iov_len = sizeof(bytes) };
	uint64_t count = 0;
	int i, tries, fd = open_to_target(SOCK_DGRAM);

	if (fd < 0)
		die("connect");
	memset(batch, 0, sizeof(batch));
	for (i = 0; i < BATCH; i++) {
		batch[i].msg_hdr.msg_iov = &iov;
		batch[i].msg_hdr.msg_iovlen = 1;
	}
	if (send(fd, "reset", 5, 0) != 5 || recv(fd, &count, sizeof(count), 0) < 0)
		die("reset");
	start_clock();
	while (now_ns() < end_ns)
		if (sendmmsg(fd, batch, BATCH, 0) < 0 && errno != ENOBUFS && failed())
			break;
	for (tries = 0; tries < 5; tries++)
		if (send(fd, "count", 5, 0) == 5 && recv(fd, &count, sizeof(count), 0) == sizeof(count))
			return count;
	die("count");
	return 0;
}

/* -- the answering side ----------------------------------------------------------------------- */

static uint64_t sunk[FD_MAX];	/* by descriptor: bytes of a sink's connection, or datagrams */
static char is_sink[FD_MAX];

static int listen_on(int type, int port)
{
	struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port) };
	int one = 1, zero = 0, size = 4 << 20, fd = socket(AF_INET6, type | SOCK_NONBLOCK, 0);

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof(zero));
	if (type == SOCK_DGRAM) {
		setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
		/* An answer must leave from the address that was asked, of which there are many. */
		setsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &one, sizeof(one));
		/* They are routed here, not given to a device, which IPv6 minds. */
		setsockopt(fd, IPPROTO_IPV6, IPV6_FREEBIND, &one, sizeof(one));
	}
	if (bind(fd, (struct sockaddr *)&any, sizeof(any)))
		die("bind");
	if (type == SOCK_STREAM && listen(fd, 4096))
		die("listen");
	return fd;
}

static void answer_datagrams(int fd, int sink)
{
	static char bytes[BATCH][REQUEST_BYTES * 2], control[BATCH][64];
	static struct sockaddr_in6 from[BATCH];
	struct iovec iov[BATCH];
	struct mmsghdr batch[BATCH];
	int i, got;

	memset(batch, 0, sizeof(batch));
	for (i = 0; i < BATCH; i++) {
		iov[i] = (struct iovec){ .iov_base = bytes[i], .iov_len = sizeof(bytes[i]) };
		batch[i].msg_hdr = (struct msghdr){ .msg_iov = &iov[i], .msg_iovlen = 1,
			.msg_name = &from[i], .msg_namelen = sizeof(from[i]),
			.msg_control = control[i], .msg_controllen = sizeof(control[i]) };
	}
	got = recvmmsg(fd, batch, sink ? BATCH : 1, MSG_DONTWAIT, NULL);
	for (i = 0; i < got; i++) {
		iov[i].iov_len = batch[i].msg_len;
		if (sink && batch[i].msg_len != 5) {
			sunk[fd]++;
			continue;
		}
		if (sink) {
			if (bytes[i][0] == 'r')
				sunk[fd] = 0;
			iov[i] = (struct iovec){ .iov_base = &sunk[fd], .iov_len = sizeof(sunk[fd]) };
		}
		sendmsg(fd, &batch[i].msg_hdr, 0);
	}
}

static void answer_stream(int fd)
{
	static char bytes[BULK_BYTES];
	ssize_t got = recv(fd, bytes, sizeof(bytes), MSG_DONTWAIT);

	if (got > 0) {
		if (is_sink[fd])
			sunk[fd] += (uint64_t)got;
		else if (send(fd, bytes, (size_t)got, MSG_NOSIGNAL) < 0)
			close(fd);
		return;
	}
	if (got < 0 && errno == EAGAIN)
		return;
	if (is_sink[fd] && got == 0)
		send(fd, &sunk[fd], sizeof(sunk[fd]), MSG_NOSIGNAL);
	close(fd);
}

static void accept_one(int poll, int listener, int sink)
{
	struct epoll_event event = { .events = EPOLLIN };
	int one = 1, fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);

	if (fd < 0)
		return;
	if (fd >= FD_MAX) {
		close(fd);
		return;
	}
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	sunk[fd] = 0;
	is_sink[fd] = (char)sink;
	event.data.fd = fd;
	epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
}

static void serve(int echo_port, int sink_port)
{
	struct epoll_event events[256];
	int i, got, poll = epoll_create1(0);
	int fds[4] = { listen_on(SOCK_STREAM, echo_port), listen_on(SOCK_STREAM, sink_port),
		       listen_on(SOCK_DGRAM, echo_port), listen_on(SOCK_DGRAM, sink_port) };

	for (i = 0; i < 4; i++) {
		struct epoll_event event = { .events = EPOLLIN, .data.fd = fds[i] };

		epoll_ctl(poll, EPOLL_CTL_ADD, fds[i], &event);
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		got = epoll_wait(poll, events, 256, -1);
		for (i = 0; i < got; i++) {
			int fd = events[i].data.fd;

			if (fd == fds[0] || fd == fds[1])
				accept_one(poll, fd, fd == fds[1]);
			else if (fd == fds[2] || fd == fds[3])
				answer_datagrams(fd, fd == fds[3]);
			else
				answer_stream(fd);
		}
	}
}

static void pin_to(int cpu)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET((size_t)cpu, &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus))
		die("sched_setaffinity");
	setpriority(PRIO_PROCESS, 0, -20);	/* may fail: others then disturb more */
}

/* -- from the command line to the line of JSON -------------------------------------------------- */

static void print_result(uint64_t done, uint64_t elapsed_ns, uint64_t cpu_ns)
{
	struct rusage usage;
	const char *comma = "";
	unsigned int i;

	getrusage(RUSAGE_SELF, &usage);
	printf("{\"done\": %" PRIu64 ", \"errors\": %" PRIu64 ", \"bytes\": %" PRIu64
	       ", \"elapsed_ns\": %" PRIu64 ", \"cpu_ns\": %" PRIu64 ", \"user_ns\": %" PRIu64,
	       done, errors, bytes_done, elapsed_ns, cpu_ns,
	       (uint64_t)usage.ru_utime.tv_sec * 1000000000u +
	       (uint64_t)usage.ru_utime.tv_usec * 1000u);
	printf(", \"p50_ns\": %" PRIu64 ", \"p90_ns\": %" PRIu64 ", \"p99_ns\": %" PRIu64
	       ", \"p999_ns\": %" PRIu64 ", \"max_ns\": %" PRIu64 ", \"histogram\": [",
	       percentile(0.5), percentile(0.9), percentile(0.99), percentile(0.999), slowest_ns);
	for (i = 0; i < BUCKETS; i++) {
		if (!histogram[i])
			continue;
		printf("%s[%" PRIu64 ", %" PRIu64 "]", comma, bucket_ns(i), histogram[i]);
		comma = ", ";
	}
	puts("]}");
}

static uint64_t run(const char *what, int sockets)
{
	if (!strcmp(what, "connect"))
		return run_new(SOCK_STREAM);
	if (!strcmp(what, "request"))
		return run_open(SOCK_STREAM, sockets);
	if (!strcmp(what, "bulk"))
		return run_bulk();
	if (!strcmp(what, "udp-request"))
		return run_open(SOCK_DGRAM, sockets);
	if (!strcmp(what, "udp-first"))
		return run_new(SOCK_DGRAM);
	if (!strcmp(what, "udp-rate"))
		return run_rate();
	errno = EINVAL;
	die(what);
	return 0;
}

int main(int argc, char **argv)
{
	uint64_t done;

	signal(SIGPIPE, SIG_IGN);
	if (argc == 5 && !strcmp(argv[1], "serve")) {
		pin_to(atoi(argv[4]));
		serve(atoi(argv[2]), atoi(argv[3]));
	}
	if (argc < 6) {
		fputs("usage: load WHAT ADDRESS PORT MS CPU [SOCKETS], load serve ECHO SINK CPU\n", stderr);
		return 2;
	}
	pin_to(atoi(argv[5]));
	resolve(argv[2], atoi(argv[3]));
	length_ns = (uint64_t)atoll(argv[4]) * 1000000u;
	start_clock();
	done = run(argv[1], argc > 6 ? atoi(argv[6]) : 1);
	print_result(done, now_ns() - begun_ns, clock_ns(CLOCK_PROCESS_CPUTIME_ID) - begun_cpu_ns);
	return 0;
}
