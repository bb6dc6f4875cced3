/* SPDX-License-Identifier: GPL-2.0-only */

/* What repeats a measurement: BPF_PROG_TEST_RUN neither restores nor varies the
 * packet, so this writes the headers of the next flow and then runs the program
 * under test by a tail call, which with a constant index is one direct jump.
 * What it costs is known from running nothing().
 *
 * Headers are written in the words they are read in: a load that spans two
 * recent stores would wait for both, and blame the program for it.
 */
#include "../lib/config.h"
#include "../lib/types.h"

#if IP_FAMILY == 4
#define SOURCE_WORD 3		/* last one of the source address */
#define DESTINATION_WORD 4
#define PORTS_WORD 5
#define WORDS 10
#else
#define SOURCE_WORD 5
#define DESTINATION_WORD 9
#define PORTS_WORD 10
#define WORDS 15
#endif

#define PORTS_PER_CLIENT 16384
#define FIRST_PORT 1024

struct driver {
	__u32 word[WORDS];	/* IP and TCP header as they are on the wire */
	__u32 flows;
	__u32 next;
	__u32 is_reply;		/* the client is the destination */
};

BPF_TABLE("array", __u32, struct driver, driver, 1);
BPF_TABLE("prog", __u32, __u32, target, 1);

int drive(struct __sk_buff *skb)
{
	__u32 *word = (void *)(long)skb->data + ETH_HLEN;
	__u32 zero = 0, flow, client, port, at;
	struct driver *state = driver.lookup(&zero);

	if (!state || (void *)(word + WORDS) > (void *)(long)skb->data_end)
		return TC_ACT_SHOT;
	flow = state->next;
	state->next = flow + 1 < state->flows ? flow + 1 : 0;
	client = flow / PORTS_PER_CLIENT;
	port = bpf_htons(FIRST_PORT + flow % PORTS_PER_CLIENT);
#pragma unroll
	for (at = 0; at < WORDS; at++) {
		__u32 value = state->word[at];

		if (at == PORTS_WORD)
			value += state->is_reply ? port << 16 : port;
		if (at == (state->is_reply ? DESTINATION_WORD : SOURCE_WORD))
			value += bpf_htonl(client);
		word[at] = value;
	}
	skb->mark = 0;
	target.call(skb, 0);
	return TC_ACT_SHOT;
}

int nothing(struct __sk_buff *skb)
{
	return TC_ACT_OK;
}
