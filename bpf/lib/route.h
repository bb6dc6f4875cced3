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

#define LOOPBACK_INDEX 1	/* of every network namespace */

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
static __always_inline long find_route(void *ctx, __u32 ifindex, const struct addr *src,
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
		/* Tunnels are left to the stack, which wraps their packets. */
		if (HOST_PACKETS && route->link && route->link->kind == LINK_TUNNEL)
			route->link = NULL;
	}
	return outcome;
}

/* Hand a packet to whom the device at the other end of this one belongs to.
 *
 * The first device has decided for whom it is, by the frame's address, and a frame
 * for a bridge was not for its port. Before Linux 6.15, and in releases of older
 * ones that lack what came with it, the other end goes by that and drops it.
 */
static __always_inline int give_to_peer(struct __sk_buff *skb, __u32 index)
{
	if (!HAVE_PEER_SCRUB && skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	return bpf_redirect_peer(index, 0);
}

/* Send a packet, Ethernet header and all, the way of its route. */
static __always_inline int take_route(struct __sk_buff *skb, struct route *route)
{
	struct bpf_fib_lookup *fib = &route->fib;
	struct bpf_redir_neigh next = { .nh_family = FIB_FAMILY };
	__u8 ends[2 * ETH_ALEN];

	if (route->link->kind == LINK_PEER)
		return give_to_peer(skb, fib->ifindex);
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

#if HOST_PACKETS
/* The address a process of the node is seen under by a backend: its own, or where
 * that will not do the device's. Nobody answers the loopback address, and the other
 * end of a tunnel may take packets of the tunnel's own alone.
 */
static __always_inline const struct addr *host_address(void *ctx, const struct addr *src,
						       const struct addr *backend)
{
	bool loopback = addr_is_loopback(src);
	struct addr any = {};
	struct link_value *link;
	struct route route;
	__u32 index;
	long found;

	found = find_route(ctx, LOOPBACK_INDEX, &any, backend, &route);
	if (found == BPF_FIB_LKUP_RET_NOT_FWDED)
		return src;
	index = route.fib.ifindex;
	link = links.lookup(&index);
	if (!link) {
		index = NO_LINK;
		link = links.lookup(&index);
	}
	if (!link || addr_is_zero(&link->addr))
		return src;
	return loopback || link->kind == LINK_TUNNEL ? &link->addr : src;
}
#endif

/* The device such a packet leaves by and its index; NULL: not by the fast path. */
static __always_inline struct link_value *link_towards(void *ctx, __u32 ifindex,
						       const struct addr *src,
						       const struct addr *dst, __u32 *index)
{
	struct route route;

	find_route(ctx, ifindex, src, dst, &route);
	*index = route.fib.ifindex;
	return route.link;
}

/* A flow that opens: give it the fast path if both its directions can take it.
 * The node's address where one of its ports must stand for the client's, else
 * NULL.
 */
static __always_inline const struct addr *open_fast(struct __sk_buff *skb,
						    const struct packet *pkt,
						    struct flow_value *flow)
{
	__u32 index = skb->ifindex, out;
	struct link_value *from = links.lookup(&index), *to;

	if (!from || pkt->l3 != ETH_HLEN || (flow->flags & (FLOW_HAIRPIN | FLOW_PORT)))
		return NULL;
	to = link_towards(skb, index, &pkt->src, &flow->backend.addr, &out);
	if (!to || ((flow->flags & FLOW_MASQUERADE) &&
		    (pkt->proto == IPPROTO_SCTP || addr_is_zero(&to->addr))))
		return NULL;
	flow->flags |= FLOW_FAST;
	if (from->kind == LINK_PEER)
		flow->client_link = index;
	if (to->kind == LINK_PEER)
		flow->backend_link = out;
	return flow->flags & FLOW_MASQUERADE ? &to->addr : NULL;
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
static __always_inline struct flow_value *fast_flow(struct reverse_key *from,
						    struct flow_key *key)
{
	struct flow_value *flow;

	if (is_nat_port(from->port)) {
		flow = flow_of_reverse(from, key);
		if (flow && (flow->flags & (FLOW_SNAT | FLOW_HOST)) == FLOW_SNAT)
			return flow;
	}
	flow = flow_of_reply(from, key);
	return flow && (flow->flags & (FLOW_FAST | FLOW_SNAT)) == FLOW_FAST ? flow : NULL;
}
