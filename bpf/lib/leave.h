/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* The whole of an egress hook: answers of backends and, where no socket hook
 * translates, requests of the node's own processes (host.h).
 */
#include "host.h"
#include "reply.h"
#include "request.h"

static __always_inline int host_send(struct __sk_buff *skb, const struct packet *pkt,
				     const struct flow_value *flow)
{
	bool snat = flow->flags & FLOW_SNAT;
	struct rewrite to = {
		.src = snat ? flow->nat : pkt->src,
		.dst = flow->backend.addr,
		.sport = flow->flags & (FLOW_SNAT | FLOW_PORT) ? flow->nat_port : pkt->sport,
		.dport = flow->backend.port,
	};
	struct route route;
	long found;

	found = find_route(skb, LOOPBACK_INDEX, &to.src, &to.dst, &route);
	if (rewrite(skb, pkt, &to, all_diffs(flow), false) != NEXT)
		return TC_ACT_STOLEN;
	/* On the loopback device a packet keeps the route it has: to this host. */
	if (found == BPF_FIB_LKUP_RET_NOT_FWDED && skb->ifindex == LOOPBACK_INDEX)
		return FORWARD;
	/* To this host, or perhaps too large for the way out: the stack's to do, with
	 * all the pieces of a datagram.
	 */
	if ((found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH) ||
	    pkt->fragment != FRAGMENT_NONE)
		return take_in(skb, pkt->l3, LOOPBACK_INDEX, &(struct ends){});
	skb->tc_index = TRANSLATED;
	/* Routed anew, by its own addresses: the route it carries is the frontend's,
	 * and by that one the kernel sends a packet that had to wait for a neighbour.
	 */
	return redirect_neigh(route.fib.ifindex, NULL, 0, 0);
}

/* A packet that leaves; NEXT when it is no request of a process of the node. */
static __always_inline int host_request(struct __sk_buff *skb, __u32 l3)
{
	struct packet pkt = { .leaving = BPF_F_INGRESS };
	struct l4_addr to = {};
	struct flow_key key = {};
	struct frontend_value *frontend;
	struct flow_value *flow;
	int verdict;

	if (skb->ingress_ifindex || skb->tc_index == TRANSLATED ||
	    parse(skb, l3, &pkt) != NEXT || !is_transport(&pkt))
		return NEXT;
	if (pkt.fragment == FRAGMENT_LATER && !fragment_recall(&pkt))
		return NEXT;
	to.addr = pkt.dst;
	to.port = pkt.dport;
	to.proto = pkt.proto;
	frontend = frontends.lookup(&to);
	if (!frontend)
		return NEXT;
	verdict = find_or_open(skb, &pkt, &to, frontend, &key, false, true, &flow);
	/* A drop would be told to the sender. */
	if (verdict != NEXT)
		return verdict == TC_ACT_SHOT ? TC_ACT_STOLEN : verdict;
	count_packet(key.service, skb->len);
	return host_send(skb, &pkt, flow);
}

static __always_inline int leave(struct __sk_buff *skb, __u32 l3)
{
#if HOST_PACKETS
	int verdict = host_request(skb, l3);

	if (verdict != NEXT)
		return verdict;
#endif
	return reply(skb, l3);
}
