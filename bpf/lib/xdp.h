/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Established flows of the fast path (route.h) that come by a NIC and leave by
 * one. Everything else goes up: flows are opened, ended, refused and dropped by
 * tc, so there is one place that decides, and it has decided before.
 */
#include "flow.h"
#include "nat.h"
#include "route.h"

#if IP_FAMILY == 4
#define ETH_P_FAMILY ETH_P_IP
#else
#define ETH_P_FAMILY ETH_P_IPV6
#endif

/* The headers of a packet worth it: no options, no fragments. */
struct headers {
	struct ethhdr eth;
	IP_HEADER ip;
	__be16 sport;
	__be16 dport;
} __attribute__((packed));

#define HEADERS_TO_L4 offsetof(struct headers, sport)

static __always_inline int xdp_parse(struct xdp_md *ctx, struct packet *pkt)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;

	if ((void *)(eth + 1) > end || eth->h_proto != bpf_htons(ETH_P_FAMILY))
		return NOT_OURS;
	pkt->l3 = ETH_HLEN;
	if (parse_ip(data, end, end - data, pkt) != NEXT || pkt->l4 != HEADERS_TO_L4 ||
	    pkt->fragment != FRAGMENT_NONE ||
	    (pkt->proto != IPPROTO_TCP && pkt->proto != IPPROTO_UDP))
		return NOT_OURS;
	pkt->l4 = HEADERS_TO_L4;	/* a constant to the verifier */
	if (parse_l4(data, end, pkt) != NEXT || hops(pkt->lead) <= 1)
		return NOT_OURS;
	return NEXT;
}

/* A checksum after what it covers has changed by a difference. */
static __always_inline __u16 csum_by(__u16 check, __u32 diff)
{
	return ~csum_fold(csum_add((__u16)~check, diff));
}

/* Give the packet its new ends and the neighbour's address, in place. */
static __always_inline int xdp_rewrite(struct xdp_md *ctx, const struct packet *pkt,
				       const struct rewrite *to, struct diffs diffs,
				       const struct bpf_fib_lookup *fib)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	__u32 sum = csum_add(diffs.addresses, diffs.ports);
	struct wire *wire = data + ETH_HLEN + LEAD_OFFSET;
	struct ethhdr *eth = data;
	__u16 *check;

	if (data + HEADERS_TO_L4 + TCP_HEADER_BYTES <= end && pkt->proto == IPPROTO_TCP) {
		check = data + HEADERS_TO_L4 + TCP_CHECK_OFFSET;
		*check = csum_by(*check, sum);
	} else if (data + HEADERS_TO_L4 + UDP_HEADER_BYTES <= end && pkt->proto == IPPROTO_UDP) {
		check = data + HEADERS_TO_L4 + UDP_CHECK_OFFSET;
		/* 0 says that there is none. */
		if (*check) {
			*check = csum_by(*check, sum);
			if (!*check)
				*check = 0xffff;
		}
	} else {
		return -1;
	}
	wire->lead = lead_with(pkt->lead, hops(pkt->lead) - 1, diffs.addresses);
	wire->ends = *to;
	__builtin_memcpy(eth->h_dest, fib->dmac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, fib->smac, ETH_ALEN);
	return 0;
}

static __always_inline int xdp_send(struct xdp_md *ctx, const struct packet *pkt,
				    const struct rewrite *to, struct diffs diffs, __u32 service)
{
	struct route route;

	find_route(ctx, ctx->ingress_ifindex, &to->src, &to->dst, &route);
	/* A frame for a device that has no driver, as a VLAN, or one that runs no
	 * program, would be lost.
	 */
	if (!route.link || route.link->kind != LINK_DRIVER || route.cold ||
	    xdp_rewrite(ctx, pkt, to, diffs, &route.fib))
		return XDP_PASS;
	count_packet(service, ctx->data_end - ctx->data);
	if (route.fib.ifindex == ctx->ingress_ifindex)
		return XDP_TX;
	return bpf_redirect(route.fib.ifindex, 0);
}

static __always_inline int xdp_forward(struct xdp_md *ctx)
{
	struct packet pkt = {};
	struct reverse_key from = {};
	struct l4_addr at = {};
	struct flow_key key = {};
	struct frontend_value *frontend;
	struct flow_value *flow, *other;
	struct rewrite to = {};
	struct diffs diffs;
	__u32 now;

	/* What opens or ends a connection is tc's to note. */
	if (xdp_parse(ctx, &pkt) != NEXT || (pkt.tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)))
		return XDP_PASS;
	now = now_s();
	at.addr = pkt.dst;
	at.port = pkt.dport;
	at.proto = pkt.proto;
	frontend = frontends.lookup(&at);
	if (frontend) {
		key.client = pkt.src;
		key.service = frontend->service;
		key.client_port = pkt.sport;
		key.proto = pkt.proto;
		flow = flow_of_request(&key, &at, false, &other);
		/* One to a pod here goes on to its device, which is tc's to do. */
		if (!flow || !(flow->flags & FLOW_FAST) || flow->backend_link ||
		    !flow_holds(flow, key.service, &pkt, now))
			return XDP_PASS;
		to.src = flow->flags & FLOW_SNAT ? flow->nat : pkt.src;
		to.sport = flow->flags & FLOW_SNAT ? flow->nat_port : pkt.sport;
		to.dst = flow->backend.addr;
		to.dport = flow->backend.port;
		diffs = all_diffs(flow);
	} else {
		answer_of(&pkt, &from);
		flow = fast_flow(&from, &key);
		if (!flow || flow->client_link || reply_is_stale(flow, &pkt, now))
			return XDP_PASS;
		/* The first answer makes a connection of an attempt. */
		if (pkt.proto == IPPROTO_TCP && !(flow->state & STATE_ESTABLISHED))
			return XDP_PASS;
		to.src = flow->frontend.addr;
		to.sport = flow->frontend.port;
		to.dst = key.client;
		to.dport = key.client_port;
		diffs = inverse(all_diffs(flow));
	}
	touch(flow, now);
	return xdp_send(ctx, &pkt, &to, diffs, key.service);
}
