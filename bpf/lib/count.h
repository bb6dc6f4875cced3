/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Why packets of a service were not forwarded. */

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
