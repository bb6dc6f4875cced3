/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Packets of flows that take the fast path, see route.h. Each of these returns
 * NEXT for what the usual path must do, with the packet as it came.
 */
#include "event.h"
#include "fragment.h"
#include "icmp.h"
#include "route.h"

/* Forward a packet with new ends to the device at its other end, or by route. */
static __always_inline int fast_send(struct __sk_buff *skb, const struct packet *pkt,
				     const struct rewrite *to, struct diffs diffs, __u32 link,
				     __u32 service)
{
	struct route route;

	if (!has_hops(pkt))
		return NEXT;
	route.link = NULL;
	if (!is_peer(link)) {
		find_route(skb, skb->ifindex, &to->src, &to->dst, &route);
		if (!route.link)
			return NEXT;
	}
	if (rewrite(skb, pkt, to, diffs, true) != NEXT)
		return TC_ACT_SHOT;
	count_packet(service, skb->len);
	return route.link ? take_route(skb, &route) : give_to_peer(skb, link);
}

static __always_inline int fast_request(struct __sk_buff *skb, const struct packet *pkt,
					const struct flow_value *flow, __u32 service)
{
	bool snat = flow->flags & FLOW_SNAT;
	struct rewrite to = {
		.src = snat ? flow->nat : pkt->src,
		.dst = flow->backend.addr,
		.sport = snat ? flow->nat_port : pkt->sport,
		.dport = flow->backend.port,
	};

	if (!(flow->flags & FLOW_FAST))
		return NEXT;
	return fast_send(skb, pkt, &to, all_diffs(flow), flow->backend_link, service);
}

static __always_inline int fast_reply(struct __sk_buff *skb, struct packet *pkt,
				      struct flow_key *key)
{
	struct reverse_key from = {};
	struct rewrite to = {};
	struct flow_value *flow;
	struct diffs diffs;
	__u32 now;
	int verdict;
	__u8 end;

	/* Who opens a connection answers nobody. */
	if (is_opening(pkt))
		return NEXT;
	answer_of(pkt, &from);
	flow = fast_flow(&from, key);
	if (!flow)
		return NEXT;
	now = now_s();
	if (reply_is_stale(flow, pkt, now))
		return NEXT;
	touch(flow, now);
	end = note_reply(flow, pkt);
	if (end)
		tell_ending(skb, flow, &key->client, key->client_port, end, now);
	learn_backend_link(skb, flow);
	if (pkt->fragment == FRAGMENT_FIRST)
		fragment_call(skb, pkt);
	to.src = flow->frontend.addr;
	to.sport = flow->frontend.port;
	to.dst = key->client;
	to.dport = key->client_port;
	verdict = fast_send(skb, pkt, &to, inverse(all_diffs(flow)), flow->client_link,
			    key->service);
	if (verdict != NEXT || !(flow->flags & FLOW_SNAT))
		return verdict;
	/* The stack takes it to the client's device, whose egress hook does the rest. */
	to.src = pkt->src;
	to.sport = pkt->sport;
	diffs.addresses = addr_diff(&pkt->dst, &to.dst);
	diffs.ports = pkt->dport == to.dport ? 0 : port_diff(pkt->dport, to.dport);
	return rewrite(skb, pkt, &to, diffs, false) == NEXT ? FORWARD : TC_ACT_SHOT;
}

/* Somebody's error about a request whose source was a port of the node's: to the
 * client it stands for.
 */
static __always_inline int fast_error(struct __sk_buff *skb, struct packet *pkt,
				      struct flow_key *key)
{
	struct packet inner = {};
	struct reverse_key from = {};
	struct flow_value *flow;
	struct rewrite quoted;
	struct route route;
	struct addr src;
	int verdict;

	if (!is_icmp_error(pkt) || parse_quoted(skb, pkt, &inner) != NEXT ||
	    !addr_equal(&pkt->dst, &inner.src))
		return NOT_OURS;
	answer_to(&inner, &from);
	flow = fast_flow(&from, key);
	if (!flow || !(flow->flags & FLOW_SNAT))
		return NOT_OURS;
	quoted.src = key->client;
	quoted.sport = key->client_port;
	quoted.dst = flow->frontend.addr;
	quoted.dport = flow->frontend.port;
	src = addr_equal(&pkt->src, &flow->backend.addr) ? flow->frontend.addr : pkt->src;
	find_route(skb, skb->ifindex, &src, &key->client, &route);
	verdict = rewrite_error(skb, pkt, &inner, &quoted, inverse(all_diffs(flow)), &src,
				&key->client);
	return verdict == FORWARD && route.link ? take_route(skb, &route) : verdict;
}
