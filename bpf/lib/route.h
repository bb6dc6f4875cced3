/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* The fast path: a translated packet goes straight to the device it would leave
 * by, past netfilter and the stack's forwarding. A flow takes it in both
 * directions or in neither, decided when it opens (FLOW_FAST): conntrack then
 * sees all of a flow or nothing.
 *
 * Where anything is out of the ordinary (no route, no hops left, too large for
 * the way out) the packet is left to the stack, which knows what to answer.
 */
#include "nat.h"

#if IP_FAMILY == 4
#define FIB_FAMILY 2		/* AF_INET */
#else
#define FIB_FAMILY 10		/* AF_INET6 */
#endif

/* BCC's headers do not know the third argument. */
#define redirect_neigh \
	((long (*)(__u32 ifindex, struct bpf_redir_neigh *params, int plen, \
		   __u64 flags))BPF_FUNC_redirect_neigh)

struct route {
	struct bpf_fib_lookup fib;
	struct link_value *link;	/* NULL: not for the fast path */
	bool cold;			/* the neighbour's address is not known yet */
};

/* Where the stack would send a packet from src to dst that came by this device. */
static __always_inline void find_route(void *ctx, __u32 ifindex, const struct addr *src,
				       const struct addr *dst, struct route *route)
{
	struct bpf_fib_lookup *fib = &route->fib;
	long outcome;

	__builtin_memset(fib, 0, sizeof(*fib));
	route->link = NULL;
	fib->family = FIB_FAMILY;
	fib->ifindex = ifindex;
#if IP_FAMILY == 4
	fib->ipv4_src = src->word[0];
	fib->ipv4_dst = dst->word[0];
#else
	__builtin_memcpy(fib->ipv6_src, src, sizeof(*src));
	__builtin_memcpy(fib->ipv6_dst, dst, sizeof(*dst));
#endif
	outcome = bpf_fib_lookup(ctx, fib, sizeof(*fib), 0);
	route->cold = outcome == BPF_FIB_LKUP_RET_NO_NEIGH;
	if (outcome == BPF_FIB_LKUP_RET_SUCCESS || route->cold) {
		__u32 index = fib->ifindex;

		route->link = links.lookup(&index);
	}
}

/* Send a packet, Ethernet header and all, the way of its route. */
static __always_inline int take_route(struct __sk_buff *skb, struct route *route)
{
	struct bpf_fib_lookup *fib = &route->fib;
	struct bpf_redir_neigh next = { .nh_family = FIB_FAMILY };
	__u8 ends[2 * ETH_ALEN];

	if (route->link->kind == LINK_PEER)
		return bpf_redirect_peer(fib->ifindex, 0);
	if (route->cold) {
#if IP_FAMILY == 4
		next.ipv4_nh = fib->ipv4_dst;
#else
		__builtin_memcpy(next.ipv6_nh, fib->ipv6_dst, sizeof(next.ipv6_nh));
#endif
		return redirect_neigh(fib->ifindex, &next, sizeof(next), 0);
	}
	__builtin_memcpy(ends, fib->dmac, ETH_ALEN);
	__builtin_memcpy(ends + ETH_ALEN, fib->smac, ETH_ALEN);
	if (bpf_skb_store_bytes(skb, 0, ends, sizeof(ends), 0))
		return drop(DROP_REWRITE_FAILED);
	return bpf_redirect(fib->ifindex, 0);
}

/* Is this still a device with a pod at its other end? */
static __always_inline bool is_peer(__u32 index)
{
	struct link_value *link = index ? links.lookup(&index) : NULL;

	return link && link->kind == LINK_PEER;
}

/* Of a node's ports above those it gives to its own sockets, some stand for
 * clients whose packets must come back this way (P6, P8). A port is free for a
 * backend once the flow that had it has ended. Few tries: a node that has nearly
 * run out lets netfilter masquerade.
 */
#define NAT_TRIES 8

static __always_inline bool take_nat_port(struct flow_value *flow, const struct flow_key *client,
					  const struct addr *address, __u32 now)
{
	struct nat_key key = { .backend = flow->backend };
	__u32 at = bpf_get_prandom_u32();
	int i;

	for (i = 0; i < NAT_TRIES; i++) {
		struct flow_key *holder;
		struct flow_value *held;

		key.port = bpf_htons(NAT_PORT_FIRST + (at + i) % NAT_PORT_COUNT);
		holder = nat_ports.lookup(&key);
		held = holder ? flows.lookup(holder) : NULL;
		if (held && (held->flags & FLOW_SNAT) && held->nat_port == key.port &&
		    held->backend_id == flow->backend_id && !flow_ended(held, key.backend.proto, now))
			continue;
		if (nat_ports.update(&key, (struct flow_key *)client))
			return false;
		flow->nat = *address;
		flow->nat_port = key.port;
		return true;
	}
	return false;
}

/* A flow that opens: give it the fast path if both its directions can take it. */
static __always_inline void open_fast(struct __sk_buff *skb, const struct packet *pkt,
				      struct flow_value *flow, const struct flow_key *key,
				      __u32 now)
{
	__u32 index = skb->ifindex;
	struct link_value *from = links.lookup(&index);
	struct route route;

	if (!from || pkt->l3 != ETH_HLEN || (flow->flags & FLOW_HAIRPIN))
		return;
	find_route(skb, index, &pkt->src, &flow->backend.addr, &route);
	if (!route.link)
		return;
	if (flow->flags & FLOW_MASQUERADE) {
		if (pkt->proto == IPPROTO_SCTP || addr_is_zero(&route.link->addr) ||
		    !take_nat_port(flow, key, &route.link->addr, now))
			return;
		flow->flags = FLOW_SNAT;
		flow->addr_diff = csum_add(flow->addr_diff, addr_diff(&pkt->src, &flow->nat));
		flow->port_diff = csum_add(flow->port_diff, port_diff(pkt->sport, flow->nat_port));
	}
	flow->flags |= FLOW_FAST;
	if (from->kind == LINK_PEER)
		flow->client_link = index;
	if (route.link->kind == LINK_PEER)
		flow->backend_link = route.fib.ifindex;
}

/* The backend answers through the device at hand. If that is where the node
 * itself would look for it, requests can go there at once: behind a bridge no
 * route says which port a pod is at. The source address of a frame is the
 * sender's word, the neighbour table is the node's.
 */
static __always_inline void learn_backend_link(struct __sk_buff *skb, struct flow_value *flow)
{
	struct route route;
	__u16 mac[3], *next;

	if (flow->backend_link || !is_peer(skb->ifindex) ||
	    bpf_skb_load_bytes(skb, ETH_ALEN, mac, sizeof(mac)))
		return;
	find_route(skb, skb->ifindex, &flow->frontend.addr, &flow->backend.addr, &route);
	if (!route.link || route.cold)
		return;
	next = (__u16 *)route.fib.dmac;
	if (route.fib.ifindex == skb->ifindex ||
	    (mac[0] == next[0] && mac[1] == next[1] && mac[2] == next[2]))
		flow->backend_link = skb->ifindex;
}

/* Is the packet one the fast path can carry? */
static __always_inline bool has_hops(const struct packet *pkt)
{
	return hops(pkt->lead) > 1;
}

/* The flow that a packet at an ingress hook answers, if that takes the fast path. */
static __always_inline struct flow_value *fast_flow(const struct l4_addr *from,
						    const struct addr *to, __be16 port,
						    struct flow_key *key)
{
	struct flow_value *flow;

	if (bpf_ntohs(port) - NAT_PORT_FIRST < NAT_PORT_COUNT) {
		struct nat_key nat = { .backend = *from, .port = port };
		struct flow_key *client = nat_ports.lookup(&nat);

		if (client) {
			*key = *client;
			flow = flows.lookup(key);
			if (flow && (flow->flags & FLOW_SNAT) && flow->nat_port == port &&
			    addr_equal(&flow->nat, to) && l4_addr_equal(&flow->backend, from))
				return flow;
		}
	}
	flow = flow_of_reply((struct l4_addr *)from, to, port, key);
	return flow && (flow->flags & (FLOW_FAST | FLOW_SNAT)) == FLOW_FAST ? flow : NULL;
}
