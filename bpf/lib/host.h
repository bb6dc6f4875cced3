/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Processes of the node where no socket hook translates for them: their requests
 * where they would leave, the answers where they come in. Netfilter and the
 * process see the frontend in both directions.
 *
 * The stack has routed a request by the frontend's address; from here it goes
 * where the backend is. The answer is handed to the device the request would
 * have left by, since that is where the stack expects the frontend's packets.
 */
#include "event.h"
#include "fragment.h"
#include "icmp.h"
#include "own.h"
#include "route.h"

/* The two ends of a frame; zeros are the loopback device's. */
struct ends {
	__u8 address[2 * ETH_ALEN];
};

/* Hand the packet to a device as if it had come in there. */
static __always_inline int take_in(struct __sk_buff *skb, __u32 l3, __u32 link,
				   struct ends *ends)
{
	if (l3 != ETH_HLEN)
		return FORWARD;
	if (bpf_skb_store_bytes(skb, 0, ends, sizeof(*ends), 0))
		return drop(DROP_REWRITE_FAILED);
	return bpf_redirect(link, BPF_F_INGRESS);
}

/* The ends of a frame to the node from where it sends packets for that address, if
 * it does so through that device.
 */
static __always_inline bool ends_through(struct __sk_buff *skb, __u32 link, const struct addr *own,
					 const struct addr *to, struct ends *ends)
{
	struct route route;

	if (find_route(skb, skb->ifindex, own, to, &route) != BPF_FIB_LKUP_RET_SUCCESS ||
	    route.fib.ifindex != link)
		return false;
	__builtin_memcpy(ends->address, route.fib.smac, ETH_ALEN);
	__builtin_memcpy(ends->address + ETH_ALEN, route.fib.dmac, ETH_ALEN);
	return true;
}

/* The flow of a process of the node that a packet answers. */
static __always_inline struct flow_value *host_flow(const struct packet *pkt, struct flow_key *key)
{
	struct reverse_key from = {};
	struct flow_value *flow;

	answer_of(pkt, &from);
	flow = flow_of_reply(&from, key);
	return flow && (flow->flags & FLOW_HOST) ? flow : NULL;
}

/* A packet that comes in; NEXT when it answers no process of the node. */
static __always_inline int host_reply(struct __sk_buff *skb, struct packet *pkt,
				      struct flow_key *key)
{
	struct rewrite to = {};
	struct flow_value *flow;
	struct ends ends = {};
	__u32 now, link;
	__u8 end;

	if (is_opening(pkt))
		return NEXT;
	flow = host_flow(pkt, key);
	if (!flow)
		return NEXT;
	now = now_s();
	if (reply_is_stale(flow, pkt, now))
		return NEXT;
	touch(flow, now);
	end = note_reply(flow, pkt);
	if (end)
		tell_ending(skb, flow, &key->client, key->client_port, end, now);
	if (pkt->fragment == FRAGMENT_FIRST)
		fragment_call(skb, pkt);
	to.src = flow->frontend.addr;
	to.sport = flow->frontend.port;
	to.dst = key->client;
	to.dport = key->client_port;
	link = flow->client_link;
	if (rewrite(skb, pkt, &to, inverse(all_diffs(flow)), false) != NEXT)
		return TC_ACT_SHOT;
	count_packet(key->service, skb->len);
	if (link == skb->ifindex || (link != LOOPBACK_INDEX &&
				     !ends_through(skb, link, &to.dst, &to.src, &ends)))
		return FORWARD;
	/* It meets an ingress hook again, and may go to the number of a node port. */
	if (pkt->fragment != FRAGMENT_LATER)
		skb->tc_index = TRANSLATED;
	return take_in(skb, pkt->l3, link, &ends);
}
