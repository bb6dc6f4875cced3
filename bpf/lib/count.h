/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* What services got, and why packets of theirs were not forwarded. */

static __always_inline void count_drop(__u32 reason)
{
	__u64 *count = drops.lookup(&reason);

	if (count)
		(*count)++;
}

static __always_inline int drop(__u32 reason)
{
	count_drop(reason);
	return TC_ACT_SHOT;
}

/* Services are counted as far as the array reaches. */
static __always_inline void count_connection(__u32 service)
{
	struct service_counters *count = service_counters.lookup(&service);

	if (count)
		count->connections++;
}

/* A packet that was translated. What the kernel has merged, or leaves to the
 * device to split, is one packet of all its bytes.
 */
static __always_inline void count_packet(__u32 service, __u32 bytes)
{
	struct service_counters *count = service_counters.lookup(&service);

	if (count) {
		count->packets++;
		count->bytes += bytes;
	}
}
