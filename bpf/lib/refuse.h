/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Refuse a packet at once (P2), from the service address, on the device it came
 * by: TCP with a reset, the rest with ICMP port unreachable. Kube-proxy's REJECT
 * answers TCP by ICMP too, but a socket still inside connect(2) takes an ICMP
 * error as a hint and asks again a second later.
 */
#include "nat.h"

#if IP_FAMILY == 4
struct icmp_error {
	struct iphdr ip;
	struct icmphdr icmp;
};
#else
struct icmp_error {
	struct ipv6hdr ip;
	struct icmp6hdr icmp;
};
#endif

/* Quoted: the IP header and the first bytes of what follows. */
#define QUOTED_BYTES (IP_HEADER_BYTES + UDP_HEADER_BYTES)

#define HOPS 64

#if IP_FAMILY == 4
static __always_inline void fill_icmp_error(struct icmp_error *error, const struct packet *pkt,
					    __u32 quoted_sum)
{
	__u32 sum;

	error->ip.version = 4;
	error->ip.ihl = 5;
	error->ip.tot_len = bpf_htons(sizeof(*error) + QUOTED_BYTES);
	error->ip.ttl = HOPS;
	error->ip.protocol = IPPROTO_ICMP;
	error->ip.saddr = pkt->dst.word[0];
	error->ip.daddr = pkt->src.word[0];
	sum = bpf_csum_diff(NULL, 0, (void *)&error->ip, sizeof(error->ip), 0);
	error->ip.check = ~csum_fold(sum);
	error->icmp.type = ICMP_DEST_UNREACH;
	error->icmp.code = ICMP_PORT_UNREACH;
	sum = bpf_csum_diff(NULL, 0, (void *)&error->icmp, sizeof(error->icmp), quoted_sum);
	error->icmp.checksum = ~csum_fold(sum);
}
#else
#define ICMPV6_PORT_UNREACHABLE 4

static __always_inline void fill_icmp_error(struct icmp_error *error, const struct packet *pkt,
					    __u32 quoted_sum)
{
	__u16 length = sizeof(error->icmp) + QUOTED_BYTES;
	__u32 sum;

	error->ip.version = 6;
	error->ip.payload_len = bpf_htons(length);
	error->ip.nexthdr = IPPROTO_ICMPV6;
	error->ip.hop_limit = HOPS;
	__builtin_memcpy(&error->ip.saddr, &pkt->dst, sizeof(pkt->dst));
	__builtin_memcpy(&error->ip.daddr, &pkt->src, sizeof(pkt->src));
	error->icmp.icmp6_type = ICMPV6_DEST_UNREACH;
	error->icmp.icmp6_code = ICMPV6_PORT_UNREACHABLE;
	sum = csum_add(quoted_sum, bpf_htons(length));
	sum = csum_add(sum, bpf_htons(IPPROTO_ICMPV6));
	sum = bpf_csum_diff(NULL, 0, (void *)&error->ip.saddr, 2 * sizeof(error->ip.saddr), sum);
	sum = bpf_csum_diff(NULL, 0, (void *)&error->icmp, sizeof(error->icmp), sum);
	error->icmp.icmp6_cksum = ~csum_fold(sum);
}
#endif

/* Send the packet back out of the device it came by; with BPF_F_INGRESS, into the
 * one it was about to leave by.
 */
static __always_inline int send_back(struct __sk_buff *skb, __u32 l3, __u64 flags)
{
	__u8 ends[2 * ETH_ALEN], turned[2 * ETH_ALEN];

	if (l3 == ETH_HLEN) {
		if (bpf_skb_load_bytes(skb, 0, ends, sizeof(ends)))
			return drop(DROP_REWRITE_FAILED);
		__builtin_memcpy(turned, ends + ETH_ALEN, ETH_ALEN);
		__builtin_memcpy(turned + ETH_ALEN, ends, ETH_ALEN);
		if (bpf_skb_store_bytes(skb, 0, turned, sizeof(turned), 0))
			return drop(DROP_REWRITE_FAILED);
	}
	return bpf_redirect(skb->ifindex, flags);
}

static __always_inline int answer_unreachable(struct __sk_buff *skb, const struct packet *pkt)
{
	struct icmp_error error = {};
	__u8 quoted[QUOTED_BYTES];

	/* Options and extension headers are not worth quoting: such a client waits. */
	if (pkt->l4 != pkt->l3 + IP_HEADER_BYTES || pkt->fragment == FRAGMENT_LATER)
		return TC_ACT_SHOT;
	if (bpf_skb_load_bytes(skb, pkt->l3, quoted, sizeof(quoted)))
		return TC_ACT_SHOT;
	fill_icmp_error(&error, pkt, bpf_csum_diff(NULL, 0, (void *)quoted, sizeof(quoted), 0));
	if (bpf_skb_change_tail(skb, pkt->l3 + sizeof(quoted), 0) ||
	    bpf_skb_adjust_room(skb, sizeof(error), BPF_ADJ_ROOM_MAC, 0) ||
	    bpf_skb_store_bytes(skb, pkt->l3, &error, sizeof(error), 0))
		return TC_ACT_SHOT;
	return send_back(skb, pkt->l3, HOST_PACKETS ? pkt->leaving : 0);
}

/* What a reset changes of the segment it answers, as on the wire. */
struct tcp_answer {
	__be32 seq;
	__be32 ack;
	__u8   length;		/* of the header, and bits that stay */
	__u8   flags;
	__be16 window;
};

/* Turn the segment that opens a connection into the reset that refuses it.
 * Swapping its ends changes no checksum, and nothing is cut off, so all that
 * changes are the fields above.
 */
static __always_inline int answer_reset(struct __sk_buff *skb, const struct packet *pkt)
{
	struct rewrite swapped = {
		.src = pkt->dst,
		.dst = pkt->src,
		.sport = pkt->dport,
		.dport = pkt->sport,
	};
	__u32 at = pkt->l4 + PORTS_BYTES;
	struct tcp_answer before, after = {};
	__u32 diff;

	if (bpf_skb_load_bytes(skb, at, &before, sizeof(before)))
		return TC_ACT_SHOT;
	after.ack = bpf_htonl(bpf_ntohl(before.seq) + 1);
	after.length = before.length;
	after.flags = TCP_RST | TCP_ACK;
	diff = bpf_csum_diff((void *)&before, sizeof(before), (void *)&after, sizeof(after), 0);
	if (bpf_l4_csum_replace(skb, pkt->l4 + TCP_CHECK_OFFSET, 0, diff, 0) ||
	    bpf_skb_store_bytes(skb, at, &after, sizeof(after), 0) ||
	    store_ends(skb, pkt, &swapped, 0, true, HOPS))
		return TC_ACT_SHOT;
	return send_back(skb, pkt->l3, HOST_PACKETS ? pkt->leaving : 0);
}

static __always_inline int refuse(struct __sk_buff *skb, const struct packet *pkt)
{
	count_drop(DROP_NO_ENDPOINT);
	return pkt->proto == IPPROTO_TCP ? answer_reset(skb, pkt) : answer_unreachable(skb, pkt);
}
