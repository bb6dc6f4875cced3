/* Preloaded into kernels for user mode. Those before 6.13 keep the floating point
 * state of a process in a buffer of fixed size, and die where a processor has more
 * of it (AMX): the kernel below takes nothing but the whole. What they do not know
 * of is left as it is.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Not on the stack, which is a kernel's; and there is one processor. */
static char whole[65536];

long ptrace(enum __ptrace_request request, ...)
{
	struct iovec all = { whole, sizeof(whole) };
	void *at, *data;
	long got, ret;
	va_list rest;
	pid_t pid;

	va_start(rest, request);
	pid = va_arg(rest, pid_t);
	at = va_arg(rest, void *);
	data = va_arg(rest, void *);
	va_end(rest);
	if (request == PTRACE_SETREGSET && (unsigned long)at == NT_X86_XSTATE &&
	    !syscall(SYS_ptrace, PTRACE_GETREGSET, pid, at, &all)) {
		struct iovec *given = data;

		if (all.iov_len > given->iov_len) {
			memcpy(whole, given->iov_base, given->iov_len);
			data = &all;
		}
	}
	/* What the C library's own does: these answer through a pointer. */
	if (request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER) {
		ret = syscall(SYS_ptrace, request, pid, at, &got);
		if (ret >= 0)
			errno = 0;
		return ret < 0 ? ret : got;
	}
	return syscall(SYS_ptrace, request, pid, at, data);
}
