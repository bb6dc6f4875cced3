/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Whole seconds: when flows, clients and pieces of datagrams were last seen. */
#include "types.h"

/* Seconds of a clock that is cheap to read, where the kernel offers one (5.11). */
static __always_inline __u32 now_s(void)
{
#if HAVE_COARSE_CLOCK
	return bpf_ktime_get_coarse_ns() / 1000000000ULL;
#else
	return bpf_ktime_get_ns() / 1000000000ULL;
#endif
}

/* Seconds from one time to another. Another CPU may have read the clock later than
 * this one and been first to note it: then it is none, not 2^32.
 */
static __always_inline __u32 since_s(__u32 seen_s, __u32 now)
{
	__s32 passed_s = now - seen_s;

	return passed_s > 0 ? passed_s : 0;
}
