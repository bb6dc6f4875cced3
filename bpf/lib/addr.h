/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* The few things one does with an address, for both families. */
#include "types.h"

static __always_inline bool addr_equal(const struct addr *a, const struct addr *b)
{
#if IP_FAMILY == 4
	return a->word[0] == b->word[0];
#else
	return !((a->word[0] ^ b->word[0]) | (a->word[1] ^ b->word[1]) |
		 (a->word[2] ^ b->word[2]) | (a->word[3] ^ b->word[3]));
#endif
}

static __always_inline bool addr_is_zero(const struct addr *a)
{
	return addr_equal(a, &(struct addr){});
}

static __always_inline bool addr_is_loopback(const struct addr *a)
{
#if IP_FAMILY == 4
	return (a->word[0] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
#else
	return !a->word[0] && !a->word[1] && !a->word[2] && a->word[3] == bpf_htonl(1);
#endif
}

static __always_inline bool addr_masked_equal(const struct addr *a, const struct addr *mask,
					      const struct addr *network)
{
	__u32 differ = 0;
	int i;

#pragma unroll
	for (i = 0; i < ADDR_WORDS; i++)
		differ |= (a->word[i] & mask->word[i]) ^ network->word[i];
	return !differ;
}

static __always_inline bool l4_addr_equal(const struct l4_addr *a, const struct l4_addr *b)
{
	return a->port == b->port && a->proto == b->proto && addr_equal(&a->addr, &b->addr);
}

/* Not objects of static storage: BCC has no read-only data section. */
#define hairpin_address ((struct addr)HAIRPIN_ADDRESS)
#define discard_address ((struct addr)DISCARD_ADDRESS)
