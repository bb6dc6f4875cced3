/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* ICMP errors about translated flows, so that path MTU discovery works through
 * a service and an unreachable reaches the socket it concerns. The quoted
 * packet is the one its sender knew: its addresses are translated back.
 *
 * The quoted transport checksum is left as it was: nobody verifies a packet cut
 * after eight bytes.
 */
#include "flow.h"
#include "nat.h"

#if IP_FAMILY == 4
static __always_inline bool is_error_type(const struct packet *pkt)
{
	return pkt->icmp_type == ICMP_DEST_UNREACH || pkt->icmp_type == ICMP_TIME_EXCEEDED ||
	       pkt->icmp_type == ICMP_PARAMETERPROB || pkt->icmp_type == ICMP_SOURCE_QUENCH;
}
#else
static __always_inline bool is_error_type(const struct packet *pkt)
{
	return pkt->icmp_type < ICMPV6_INFOMSG_MASK;
}
#endif

static __always_inline bool is_icmp_error(const struct packet *pkt)
{
	return pkt->fragment != FRAGMENT_LATER && is_error_type(pkt);
}

/* The quoted packet, read into inner with offsets of its own; NEXT or NOT_OURS. */
static __always_inline int parse_quoted(struct __sk_buff *skb, const struct packet *pkt,
					struct packet *inner)
{
	IP_HEADER ip;
	__be16 ports[2];

	inner->l3 = pkt->l4 + ICMP_HEADER_BYTES;
	inner->fragment = FRAGMENT_NONE;
	if (bpf_skb_load_bytes(skb, inner->l3, &ip, sizeof(ip)))
		return NOT_OURS;
#if IP_FAMILY == 4
	if (ip.version != 4 || ip.ihl < 5 || (ip.frag_off & bpf_htons(0x1fff)))
		return NOT_OURS;
	inner->src.word[0] = ip.saddr;
	inner->dst.word[0] = ip.daddr;
	inner->proto = ip.protocol;
	inner->lead = *(__be32 *)&ip.ttl;
	inner->l4 = inner->l3 + ip.ihl * 4;
#else
	if (ip.version != 6)
		return NOT_OURS;
	__builtin_memcpy(&inner->src, &ip.saddr, sizeof(inner->src));
	__builtin_memcpy(&inner->dst, &ip.daddr, sizeof(inner->dst));
	inner->lead = *(__be32 *)&ip.payload_len;
	inner->proto = ip.nexthdr;
	inner->l4 = inner->l3 + sizeof(ip);
#endif
	if (!is_transport(inner) || inner->l4 + sizeof(ports) > pkt->end ||
	    bpf_skb_load_bytes(skb, inner->l4, ports, sizeof(ports)))
		return NOT_OURS;
	inner->sport = ports[0];
	inner->dport = ports[1];
	return NEXT;
}

/* Write the quoted packet's new ends and the error's own, mending the checksums
 * of both IP headers and of the ICMP message that covers the quote.
 */
static __always_inline int rewrite_error(struct __sk_buff *skb, struct packet *pkt,
					 const struct packet *inner, const struct rewrite *quoted,
					 struct diffs diffs,
					 const struct addr *src, const struct addr *dst)
{
	struct rewrite outer = { .src = *src, .dst = *dst };
	__u32 outer_addresses = csum_add(addr_diff(&pkt->src, src), addr_diff(&pkt->dst, dst));
	__u32 check = pkt->l4 + 2;

	if (store_ends(skb, inner, quoted, diffs.addresses, true, hops(inner->lead)) ||
	    store_ends(skb, pkt, &outer, outer_addresses, false, hops(pkt->lead)))
		return drop(DROP_REWRITE_FAILED);
#if IP_FAMILY == 6
	/* No IP checksum evens out the quoted addresses, and a pseudo header is covered. */
	if (bpf_l4_csum_replace(skb, check, 0, diffs.addresses, 0) ||
	    bpf_l4_csum_replace(skb, check, 0, outer_addresses,
				BPF_F_PSEUDO_HDR | CSUM_FAMILY_FLAG))
		return drop(DROP_REWRITE_FAILED);
#endif
	if (diffs.ports && bpf_l4_csum_replace(skb, check, 0, diffs.ports, 0))
		return drop(DROP_REWRITE_FAILED);
	return FORWARD;
}

/* A client's error about a reply it got from a frontend: to the backend. */
static __always_inline int error_to_backend(struct __sk_buff *skb, struct packet *pkt,
					    struct flow_key *key)
{
	struct packet inner = {};
	struct l4_addr frontend = {};
	struct frontend_value *service;
	struct flow_value *flow, *other;
	struct rewrite quoted;

	if (!is_icmp_error(pkt) || parse_quoted(skb, pkt, &inner) != NEXT)
		return NOT_OURS;
	if (!addr_equal(&pkt->dst, &inner.src))	/* not to whom it is about: forged */
		return NOT_OURS;
	frontend.addr = inner.src;
	frontend.port = inner.sport;
	frontend.proto = inner.proto;
	service = frontends.lookup(&frontend);
	if (!service)
		return NOT_OURS;
	key->client = inner.dst;
	key->client_port = inner.dport;
	key->service = service->service;
	key->proto = inner.proto;
	flow = flow_of_request(key, &frontend, false, &other);
	if (!flow || (flow->flags & FLOW_HAIRPIN))
		return NOT_OURS;
	quoted.src = flow->backend.addr;
	quoted.sport = flow->backend.port;
	quoted.dst = inner.dst;
	quoted.dport = inner.dport;
	if (flow->flags & FLOW_MASQUERADE)
		skb->mark |= MASQUERADE_MARK;
	if (flow->flags & FLOW_PORT)
		quoted.dport = flow->nat_port;
	if (FAST_PATH && (flow->flags & FLOW_SNAT)) {
		quoted.dst = flow->nat;
		quoted.dport = flow->nat_port;
	}
	/* The stack carries it on, which takes no packet from an address of its own:
	 * unlike the quoted one, its source stays who sent it.
	 */
	return rewrite_error(skb, pkt, &inner, &quoted, all_diffs(flow), &pkt->src,
			     &flow->backend.addr);
}

/* A process that calls its own node does so by a local route, which remembers the path
 * only if it is narrower than the device with the node's address
 * (rt6_insert_exception). Fragments hold whole eights of bytes: one byte less of 1500
 * changes none.
 */
static __always_inline int narrow_path(struct __sk_buff *skb, const struct packet *pkt)
{
#if IP_FAMILY == 6
	__u32 at = pkt->l4 + 4;
	__be32 mtu, less;

	if (pkt->icmp_type != ICMPV6_PKT_TOOBIG)
		return NEXT;
	if (bpf_skb_load_bytes(skb, at, &mtu, sizeof(mtu)))
		return NEXT;
	if (bpf_ntohl(mtu) <= IPV6_MIN_MTU)
		return NEXT;
	less = bpf_htonl(bpf_ntohl(mtu) - 1);
	if (bpf_skb_store_bytes(skb, at, &less, sizeof(less), 0) ||
	    bpf_l4_csum_replace(skb, pkt->l4 + 2, mtu, less, sizeof(less)))
		return drop(DROP_REWRITE_FAILED);
#endif
	return NEXT;
}

/* Somebody's error about a translated request: to the client, from the frontend
 * if it was the backend that sent it. host: only if the client is a process of
 * this node.
 */
static __always_inline int error_to_client(struct __sk_buff *skb, struct packet *pkt,
					   struct flow_key *key, bool host)
{
	struct packet inner = {};
	struct reverse_key from = {};
	struct flow_value *flow;
	struct rewrite quoted;
	struct addr src;

	if (!is_icmp_error(pkt) || parse_quoted(skb, pkt, &inner) != NEXT)
		return NOT_OURS;
	if (!addr_equal(&pkt->dst, &inner.src))
		return NOT_OURS;
	answer_to(&inner, &from);
	flow = flow_of_reply(&from, key);
	if (!flow || (flow->flags & FLOW_HAIRPIN) || (host && !(flow->flags & FLOW_HOST)))
		return NOT_OURS;
	host = HOST_PACKETS && (flow->flags & FLOW_HOST);
	if (host && narrow_path(skb, pkt) != NEXT)
		return TC_ACT_SHOT;
	quoted.src = host ? key->client : inner.src;
	quoted.sport = key->client_port;
	quoted.dst = flow->frontend.addr;
	quoted.dport = flow->frontend.port;
	src = addr_equal(&pkt->src, &flow->backend.addr) ? flow->frontend.addr : pkt->src;
	return rewrite_error(skb, pkt, &inner, &quoted,
			     inverse(host ? all_diffs(flow) : destination_diffs(flow)), &src,
			     host ? &key->client : &pkt->dst);
}
