/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Writing addresses, ports and checksums.
 *
 * Checksums change by the difference of what they cover. For addresses the
 * helper is told it is the pseudo header: with checksum offload the field holds
 * only that sum and the ports are added later by whoever completes it.
 */
#include "packet.h"

/* New ends of a packet, laid out as on the wire. */
struct rewrite {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
};

static __always_inline __u16 csum_fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

static __always_inline __u32 csum_add(__u32 a, __u32 b)
{
	a += b;
	return a + (a < b);
}

/* Checksum difference of replacing one address by another. */
static __always_inline __u32 addr_diff(const struct addr *from, const struct addr *to)
{
	__u32 sum = 0;
	int i;

#pragma unroll
	for (i = 0; i < ADDR_WORDS; i++) {
		sum = csum_add(sum, ~from->word[i]);
		sum = csum_add(sum, to->word[i]);
	}
	return sum;
}

static __always_inline __u32 port_diff(__be16 from, __be16 to)
{
	return csum_add((__u16)~from, to);
}

/* The part of a packet that NAT changes is one piece when there are no options
 * or extension headers: the word before the addresses (in IPv4 hops, protocol
 * and checksum, in IPv6 length, next header and hops), addresses, ports.
 */
struct wire {
	__be32 lead;
	struct rewrite ends;
};

#if IP_FAMILY == 4
#define LEAD_OFFSET offsetof(struct iphdr, ttl)
#else
#define LEAD_OFFSET offsetof(struct ipv6hdr, payload_len)
#endif

/* That word of a packet whose addresses change by a checksum difference. */
static __always_inline __be32 lead_with(__be32 lead, __u8 hops, __u32 addresses)
{
#if IP_FAMILY == 4
	__u32 check = csum_add((__u16)~(lead >> 16), addresses);
	__u16 word = (lead & 0xff00) | hops;

	check = csum_add(check, (__u16)~lead);
	check = csum_add(check, word);
	return word | (__u32)(__u16)~csum_fold(check) << 16;
#else
	return (lead & ~(0xffU << HOPS_SHIFT)) | (__u32)hops << HOPS_SHIFT;
#endif
}

static __always_inline int store_ends(struct __sk_buff *skb, const struct packet *pkt,
				      const struct rewrite *to, __u32 addresses, bool ports,
				      __u8 hops)
{
	struct wire wire;

	wire.lead = lead_with(pkt->lead, hops, addresses);
	wire.ends = *to;
	if (ports && pkt->l4 == pkt->l3 + IP_HEADER_BYTES)
		return bpf_skb_store_bytes(skb, pkt->l3 + LEAD_OFFSET, &wire, sizeof(wire), 0);
	if (ports && bpf_skb_store_bytes(skb, pkt->l4, (void *)&to->sport, PORTS_BYTES, 0))
		return -1;
	return bpf_skb_store_bytes(skb, pkt->l3 + LEAD_OFFSET, &wire,
				   sizeof(wire) - PORTS_BYTES, 0);
}

/* The checksum differences of translating a flow's destination alone: what the
 * flow keeps is for all that its requests have changed.
 */
struct diffs {
	__u32 addresses;
	__u32 ports;
};

static __always_inline struct diffs destination_diffs(const struct flow_value *flow)
{
	struct diffs diffs = { .addresses = flow->addr_diff, .ports = flow->port_diff };

	if (FAST_PATH && (flow->flags & FLOW_SNAT)) {
		diffs.addresses = addr_diff(&flow->frontend.addr, &flow->backend.addr);
		diffs.ports = flow->frontend.port == flow->backend.port ? 0 :
			      port_diff(flow->frontend.port, flow->backend.port);
	}
	return diffs;
}

/* The same for the way back. */
static __always_inline struct diffs inverse(struct diffs diffs)
{
	struct diffs back = {
		.addresses = ~diffs.addresses,
		.ports = diffs.ports ? ~diffs.ports : 0,
	};

	return back;
}

static __always_inline struct diffs all_diffs(const struct flow_value *flow)
{
	struct diffs diffs = { .addresses = flow->addr_diff, .ports = flow->port_diff };

	return diffs;
}

static __always_inline int fix_l4_csum(struct __sk_buff *skb, const struct packet *pkt,
				       __u32 addresses, __u32 ports)
{
	__u32 at = pkt->l4 + (pkt->proto == IPPROTO_TCP ? TCP_CHECK_OFFSET : UDP_CHECK_OFFSET);
	__u64 mangled_0 = pkt->proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;

	if (pkt->proto == IPPROTO_SCTP)	/* CRC32c over the chunk, no pseudo header */
		return 0;
	if (bpf_l4_csum_replace(skb, at, 0, addresses,
				BPF_F_PSEUDO_HDR | CSUM_FAMILY_FLAG | mangled_0))
		return -1;
	if (ports)
		return bpf_l4_csum_replace(skb, at, 0, ports, mangled_0);
	return 0;
}

/* Give the packet its new ends and, where we forward it ourselves, one hop less.
 * The differences are those of all addresses and of both ports. Returns NEXT, or
 * the verdict of a packet that cannot go on.
 */
static __always_inline int rewrite(struct __sk_buff *skb, const struct packet *pkt,
				   const struct rewrite *to, struct diffs diffs, bool hop)
{
	bool has_ports = pkt->fragment != FRAGMENT_LATER;

	/* SCTP's checksum covers the ports and cannot be mended by difference. */
	if (pkt->proto == IPPROTO_SCTP && (to->sport != pkt->sport || to->dport != pkt->dport))
		return drop(DROP_REWRITE_FAILED);
	if (has_ports && fix_l4_csum(skb, pkt, diffs.addresses, diffs.ports))
		return drop(DROP_REWRITE_FAILED);
	if (store_ends(skb, pkt, to, diffs.addresses, has_ports, hops(pkt->lead) - hop))
		return drop(DROP_REWRITE_FAILED);
	return NEXT;
}
