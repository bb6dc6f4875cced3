/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* A packet on its way in: if it calls a frontend, it goes to a backend. */
#include "direct.h"
#include "event.h"
#include "fragment.h"
#include "icmp.h"
#include "refuse.h"
#include "fast.h"
#include "host.h"
#include "own.h"
#include "select.h"

/* Is this source a pod of the cluster? (D1, ClusterCIDR) */
static __always_inline bool is_pod(const struct addr *source)
{
#ifdef CLUSTER_CIDR_ADDRESS
	return addr_masked_equal(source, &(struct addr)CLUSTER_CIDR_MASK,
				 &(struct addr)CLUSTER_CIDR_ADDRESS);
#else
	return false;
#endif
}

/* A packet that opens no flow, with the reason left in it. */
static __always_inline int turn_away(struct packet *pkt, __u8 reason)
{
	pkt->why = reason + 1;
	return drop(reason);
}

/* Does a socket of the node wait for this datagram? Its own port may be the number of
 * a node port: what comes to a connected one, or from where it has sent to, is an
 * answer then, not a request (B9). asked: room for the ends.
 */
static __always_inline bool answers_socket(struct __sk_buff *skb, const struct packet *pkt,
					   struct reverse_key *asked, __u32 now)
{
	struct bpf_sock_tuple ends = {};
	struct bpf_sock *socket;
	bool connected;

	/* A service's answer to a process of the node, which host.h has just taken in. */
	if (HOST_PACKETS && skb->tc_index == TRANSLATED)
		return true;
#if IP_FAMILY == 4
	ends.ipv4.saddr = pkt->src.word[0];
	ends.ipv4.daddr = pkt->dst.word[0];
	ends.ipv4.sport = pkt->sport;
	ends.ipv4.dport = pkt->dport;
	socket = bpf_sk_lookup_udp(skb, &ends, sizeof(ends.ipv4), BPF_F_CURRENT_NETNS, 0);
#else
	__builtin_memcpy(ends.ipv6.saddr, &pkt->src, sizeof(pkt->src));
	__builtin_memcpy(ends.ipv6.daddr, &pkt->dst, sizeof(pkt->dst));
	ends.ipv6.sport = pkt->sport;
	ends.ipv6.dport = pkt->dport;
	socket = bpf_sk_lookup_udp(skb, &ends, sizeof(ends.ipv6), BPF_F_CURRENT_NETNS, 0);
#endif
	if (!socket)
		return false;
	connected = socket->dst_port != 0;
	bpf_sk_release(socket);
	if (connected)
		return true;
	answer_to(pkt, asked);
	asked->pad = 0;
	return answers_own(asked, now);
}

/* The flow has a port that stands for the client's: of the client itself, or of
 * the node, whose ports above those it gives to its own sockets stand for clients
 * whose packets must come back this way (P6, P8).
 */
static __always_inline void use_nat_port(struct flow_value *flow, const struct packet *pkt)
{
	if (!(flow->flags & FLOW_PORT)) {
		flow->flags = flow->flags & FLOW_HOST ? FLOW_HOST | FLOW_PORT | FLOW_SNAT :
							FLOW_FAST | FLOW_SNAT;
		flow->addr_diff = csum_add(flow->addr_diff, addr_diff(&pkt->src, &flow->nat));
	}
	flow->port_diff = csum_add(flow->port_diff, port_diff(pkt->sport, flow->nat_port));
}

/* Decide where a new flow goes and remember it. Returns NEXT with *flow filled
 * and stored, or the verdict, with pkt->why set when the packet goes no further.
 */
static __always_inline int open_flow(struct __sk_buff *skb, struct packet *pkt,
				     const struct l4_addr *to, const struct frontend_value *frontend,
				     struct flow_key *key, struct opening *fresh,
				     const struct flow_value *other, __u32 source, bool pod_device,
				     __u32 now)
{
	struct backend_value *backend;
	struct flow_value *flow = &fresh->flow;
	struct reverse_key *ends = &fresh->ends;
	volatile __u32 *scratch = (volatile __u32 *)&skb->cb[0];
	const struct addr *as = NULL;
	__u32 known;
	bool clash, crowded;
	struct list list;
	__u32 id;

	if (frontend->flags & FRONTEND_DRAINING)
		return NOT_OURS;
	/* A connection we never saw open belongs to whoever translated its
	 * first packet, as kube-proxy did before the switch.
	 */
	if (pkt->proto == IPPROTO_UDP ? answers_socket(skb, pkt, ends, now) :
					  !is_opening(pkt))
		return NOT_OURS;
	if ((frontend->flags & FRONTEND_SOURCE_RANGES) && !source_allowed(&pkt->src, frontend->ranges))
		return turn_away(pkt, DROP_SOURCE_RANGE);
	if (frontend->flags & FRONTEND_REJECT) {
		pkt->why = DROP_NO_ENDPOINT + 1;
		return refuse(skb, pkt);
	}
	list = list_for(frontend, source);
	id = choose_for_packet(frontend, &list, pkt, now);
	/* Two connections of one port had better go to two backends, unless affinity
	 * wants them at one.
	 */
	if (other && other->backend_id == id && id != NO_BACKEND && !frontend->affinity_s &&
	    !flow_ended(other, pkt->proto, now)) {
		__u32 beside = choose_beside(&list, pkt, id);

		if (beside != NO_BACKEND)
			id = beside;
	}
	backend = backends.lookup(&id);
	if (id == NO_BACKEND || !backend)
		return turn_away(pkt, DROP_NO_LOCAL_ENDPOINT);
	key->second = !key->second;
	clash = other && !end_flow(key, id, now);
	key->second = !key->second;

	__builtin_memset(flow, 0, sizeof(*flow));
	flow->frontend = *to;
	flow->backend = backend->at;
	flow->backend_id = id;
	flow->seen_s = now;
	flow->addr_diff = addr_diff(&to->addr, &backend->at.addr);
	if (to->port != backend->at.port)
		flow->port_diff = port_diff(to->port, backend->at.port);
	ends->backend = backend->at;
	ends->client = pkt->src;
	ends->port = pkt->sport;
	ends->pad = 0;
	/* One walk of the verifier for all that was found, as in forget_layout(). */
	fresh->taken = clash;
	*scratch = key->second << 2;
	*scratch |= free_client_port(fresh, key, frontend->service, now) << 1;
	*scratch |= fresh->taken | is_noted(fresh, now);
	known = *scratch;
	clash = known & 1;
	crowded = known & 2;
	key->service = frontend->service;
	key->second = known >> 2 & 1;
	if (HOST_PACKETS && source == SOURCE_NODE) {
		/* Its address is the node's already. */
		flow->flags = FLOW_HOST;
		flow->client_link = skb->ifindex;
	} else if (addr_equal(&backend->at.addr, &pkt->src)) {
		/* A backend that calls itself (P9). On its own device it is
		 * turned round at once; from elsewhere the packet is masqueraded.
		 */
		if (pod_device) {
			flow->flags = FLOW_HAIRPIN;
			flow->addr_diff = csum_add(flow->addr_diff,
						   addr_diff(&pkt->src, &hairpin_address));
		} else {
			flow->flags = FLOW_MASQUERADE;
		}
	} else if (frontend->flags >> MASQUERADE_SHIFT & source) {
		flow->flags = FLOW_MASQUERADE;
	}
	if (clash) {
		/* The endpoint could not tell the two apart: it sees another port. */
		if (pkt->proto == IPPROTO_SCTP)
			return turn_away(pkt, DROP_CLIENT_PORT_CLASH);
		flow->flags |= FLOW_PORT;
		as = &pkt->src;
#if HOST_PACKETS
	} else if (source == SOURCE_NODE) {
		/* Netfilter takes the frontend for the peer, so the ports it
		 * masquerades to may be this one towards the backend.
		 */
		if (pkt->proto != IPPROTO_SCTP)
			as = host_address(skb, &pkt->src, &flow->backend.addr);
#endif
	} else if (FAST_PATH) {
		as = open_fast(skb, pkt, flow);
	}
	if (as && take_nat_port(flow, key, as, client_hash(pkt, false), ends, now)) {
		use_nat_port(flow, pkt);
		crowded = false;
	} else if (clash) {
		return turn_away(pkt, DROP_CLIENT_PORT_CLASH);
	} else if (as && source != SOURCE_NODE) {
		/* A node that has run out of ports lets netfilter masquerade. */
		flow->flags = FLOW_MASQUERADE;
		ends->client = pkt->src;
		ends->port = pkt->sport;
	}
	if (crowded && reverse.update(ends, key))
		return turn_away(pkt, DROP_FLOW_TABLE);
	if (flows.update(key, flow))
		return turn_away(pkt, DROP_FLOW_TABLE);
	count_connection(key->service);
	return NEXT;
}

static __always_inline int send_to_backend(struct __sk_buff *skb, struct packet *pkt,
					   const struct flow_value *flow, __u32 service)
{
	bool hairpin = flow->flags & FLOW_HAIRPIN;
	struct rewrite to = {
		.src = hairpin ? hairpin_address : pkt->src,
		.dst = flow->backend.addr,
		.sport = flow->flags & FLOW_PORT ? flow->nat_port : pkt->sport,
		.dport = flow->backend.port,
	};
	struct diffs diffs = destination_diffs(flow);
	__u32 masquerade = flow->flags & FLOW_MASQUERADE;
	int verdict;

	verdict = rewrite(skb, pkt, &to, diffs, false);
	if (verdict != NEXT)
		return verdict;
	count_packet(service, skb->len);
	if (masquerade)
		skb->mark |= MASQUERADE_MARK;
	if (pkt->fragment == FRAGMENT_NONE && may_open(pkt))
		skb->tc_index = own_index();
	return hairpin ? send_back(skb, pkt->l3, 0) : FORWARD;
}

/* The backend's answer to itself: back to the client it is, from the frontend. */
static __always_inline int hairpin_reply(struct __sk_buff *skb, struct packet *pkt,
					  struct flow_key *key)
{
	struct rewrite to = { .dst = pkt->src };
	struct reverse_key from = {};
	struct flow_value *flow;
	__u32 now = now_s();
	int verdict;
	__u8 end;

	answer_of(pkt, &from);
	from.client = pkt->src;
	flow = flow_of_reply(&from, key);
	if (!flow || !(flow->flags & FLOW_HAIRPIN)) {
		tell_dropped(skb, pkt, DROP_DISCARDED, now);
		return drop(DROP_DISCARDED);
	}
	to.src = flow->frontend.addr;
	to.sport = flow->frontend.port;
	to.dport = key->client_port;
	touch(flow, now);
	end = note_reply(flow, pkt);
	if (end)
		tell_ending(skb, flow, &pkt->src, key->client_port, end, now);
	if (pkt->fragment == FRAGMENT_FIRST)
		fragment_call(skb, pkt);
	verdict = rewrite(skb, pkt, &to, inverse(all_diffs(flow)), false);
	if (verdict != NEXT)
		return verdict;
	count_packet(key->service, skb->len);
	return send_back(skb, pkt->l3, 0);
}

/* The flow of a request, opened when there is none; NEXT with *flow, or the
 * verdict. host: a process of the node sends it.
 */
static __always_inline int find_or_open(struct __sk_buff *skb, struct packet *pkt,
					const struct l4_addr *to,
					const struct frontend_value *frontend,
					struct flow_key *key, bool pod_device, bool host,
					struct flow_value **flow)
{
	__u32 source, now, zero = 0;
	struct flow_value *other;
	struct opening *fresh;
	int verdict;
	__u8 end;

	key->client = pkt->src;
	key->client_port = pkt->sport;
	key->proto = pkt->proto;
	key->service = frontend->service;
	*flow = flow_of_request(key, to, is_opening(pkt), &other);
	now = now_s();
	if (*flow && flow_holds(*flow, key->service, pkt, now)) {
		touch(*flow, now);
		end = note_request(*flow, pkt);
		if (end)
			tell_ending(skb, *flow, &pkt->src, pkt->sport, end, now);
	} else {
		source = pod_device || is_pod(&pkt->src) ? SOURCE_POD : SOURCE_EXTERNAL;
		if (host)
			source = SOURCE_NODE;
		if (*flow) {
			/* Only who finds no flow of the frontend's looks for another. */
			key->second = !key->second;
			other = flows.lookup(key);
			key->second = !key->second;
		}
		fresh = openings.lookup(&zero);
		if (!fresh)
			return drop(DROP_FLOW_TABLE);
		*flow = &fresh->flow;
		verdict = open_flow(skb, pkt, to, frontend, key, fresh, other, source, pod_device,
				    now);
		if (verdict != NEXT) {
			if (pkt->why)
				tell_dropped(skb, pkt, pkt->why - 1, now);
			return verdict;
		}
		tell_opened(skb, pkt, *flow, now);
	}
	if (pkt->fragment == FRAGMENT_FIRST) {
		if (pkt->leaving)
			fragment_remember(pkt);
		else
			fragment_call(skb, pkt);
	}
	return NEXT;
}

/* The whole of an ingress hook. pod_device: this is the host side of a pod's
 * interface, so the source is a pod whatever its address.
 */
static __always_inline int request(struct __sk_buff *skb, __u32 l3, bool pod_device)
{
	bool fast = FAST_PATH && l3 == ETH_HLEN;
	struct packet pkt = {};
	struct l4_addr to = {};
	struct flow_key key = {};
	struct frontend_value *frontend;
	struct flow_value *flow;
	int verdict;

	if (parse(skb, l3, &pkt) != NEXT)
		return NOT_OURS;
	if (pkt.proto == PROTO_ICMP) {
		verdict = error_to_backend(skb, &pkt, &key);
		if (HOST_PACKETS && verdict == NOT_OURS)
			verdict = error_to_client(skb, &pkt, &key, true);
		if (fast && verdict == NOT_OURS)
			verdict = fast_error(skb, &pkt, &key);
		return verdict;
	}
	if (!is_transport(&pkt))
		return NOT_OURS;
	if (pkt.fragment != FRAGMENT_NONE) {
		verdict = fragment_in(skb, &pkt);
		if (verdict != NEXT)
			return verdict;
	}
	forget_layout(skb, &pkt);
	to.addr = pkt.dst;
	to.port = pkt.dport;
	to.proto = pkt.proto;
	frontend = frontends.lookup(&to);
	if (!frontend) {
		if (pod_device && addr_equal(&pkt.dst, &hairpin_address))
			return hairpin_reply(skb, &pkt, &key);
#if HOST_PACKETS
		verdict = host_reply(skb, &pkt, &key);
		if (verdict != NEXT)
			return verdict;
#endif
		if (fast && (verdict = fast_reply(skb, &pkt, &key)) != NEXT)
			return verdict;
		if (call_direct(skb, &pkt, &key, &flow) != NEXT || parse(skb, l3, &pkt) != NEXT)
			return NOT_OURS;
		note_request(flow, &pkt);
		return send_to_backend(skb, &pkt, flow, DIRECT_SERVICE);
	}
	verdict = find_or_open(skb, &pkt, &to, frontend, &key, pod_device, false, &flow);
	if (verdict != NEXT)
		return verdict;
	if (fast && (verdict = fast_request(skb, &pkt, flow, key.service)) != NEXT)
		return verdict;
	return send_to_backend(skb, &pkt, flow, key.service);
}
