/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* A packet on its way out: if it answers a translated request, it leaves from
 * the frontend the client called.
 */
#include "event.h"
#include "fragment.h"
#include "icmp.h"
#include "own.h"

static __always_inline int reply(struct __sk_buff *skb, __u32 l3)
{
	struct packet pkt = {};
	struct reverse_key from = {};
	struct flow_key key = {};
	struct flow_value *flow;
	struct rewrite to;
	struct diffs diffs;
	__u32 now;
	bool host;
	__u8 end;

	if (parse(skb, l3, &pkt) != NEXT)
		return NOT_OURS;
	if (addr_equal(&pkt.dst, &discard_address)) {
		count_drop(DROP_DISCARDED);
		return TC_ACT_STOLEN;	/* silently: the sender is a local socket */
	}
	if (pkt.proto == PROTO_ICMP)
		return error_to_client(skb, &pkt, &key, false);
	if (!is_transport(&pkt))
		return NOT_OURS;
	if (pkt.fragment == FRAGMENT_LATER && !fragment_recall(&pkt))
		return NOT_OURS;
	answer_of(&pkt, &from);
	flow = flow_of_reply(&from, &key);
	if (!flow) {
		if (is_own_datagram(skb, &pkt))
			note_own(&from, &key);
		return NOT_OURS;
	}
	if (flow->flags & FLOW_HAIRPIN)
		return NOT_OURS;
	now = now_s();
	if (reply_is_stale(flow, &pkt, now)) {
		flows.delete(&key);
		return NOT_OURS;
	}
	touch(flow, now);
	end = note_reply(flow, &pkt);
	if (end)
		tell_ending(skb, flow, &pkt.dst, key.client_port, end, now);
	if (pkt.fragment == FRAGMENT_FIRST)
		fragment_remember(&pkt);
	to.src = flow->frontend.addr;
	to.sport = flow->frontend.port;
	/* A backend on this node itself, and a process of the node. */
	host = HOST_PACKETS && (flow->flags & FLOW_HOST);
	to.dst = host ? key.client : pkt.dst;
	to.dport = key.client_port;
	diffs = host ? all_diffs(flow) : destination_diffs(flow);
	if (rewrite(skb, &pkt, &to, inverse(diffs), false) != NEXT)
		return TC_ACT_SHOT;
	count_packet(key.service, skb->len);
	return FORWARD;
}
