/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Refuse a packet at once (P2): answer ICMP port unreachable, from the service
 * address, on the device the packet came by. TCP clients that are connecting
 * report ECONNREFUSED for it, as they do for kube-proxy's REJECT.
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

/* Quoted: the IP header and the start of what follows. TCP needs its whole
 * header: with checksum offload an skb cannot be cut before its checksum.
 */
#define QUOTE_UDP_BYTES (IP_HEADER_BYTES + UDP_HEADER_BYTES)
#define QUOTE_TCP_BYTES (IP_HEADER_BYTES + TCP_HEADER_BYTES)

#if IP_FAMILY == 4
static __always_inline void fill_icmp_error(struct icmp_error *error, const struct packet *pkt,
					    __u32 quoted_bytes, __u32 quoted_sum)
{
	__u32 sum;

	error->ip.version = 4;
	error->ip.ihl = 5;
	error->ip.tot_len = bpf_htons(sizeof(*error) + quoted_bytes);
	error->ip.ttl = 64;
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
					    __u32 quoted_bytes, __u32 quoted_sum)
{
	__u16 length = sizeof(error->icmp) + quoted_bytes;
	__u32 sum;

	error->ip.version = 6;
	error->ip.payload_len = bpf_htons(length);
	error->ip.nexthdr = IPPROTO_ICMPV6;
	error->ip.hop_limit = 64;
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

/* Send the packet back out of the device it came by. */
static __always_inline int send_back(struct __sk_buff *skb, __u32 l3)
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
	return bpf_redirect(skb->ifindex, 0);
}

static __always_inline int refuse(struct __sk_buff *skb, const struct packet *pkt)
{
	__u32 quoted_bytes = pkt->proto == IPPROTO_TCP ? QUOTE_TCP_BYTES : QUOTE_UDP_BYTES;
	__u8 quoted[QUOTE_TCP_BYTES] = {};
	struct icmp_error error = {};
	__u32 sum;

	count_drop(DROP_NO_ENDPOINT);
	/* Options and extension headers are not worth quoting: such a client waits. */
	if (pkt->l4 != pkt->l3 + IP_HEADER_BYTES || pkt->fragment == FRAGMENT_LATER)
		return TC_ACT_SHOT;
	if (bpf_skb_load_bytes(skb, pkt->l3, quoted, QUOTE_UDP_BYTES))
		return TC_ACT_SHOT;
	if (pkt->proto == IPPROTO_TCP &&
	    bpf_skb_load_bytes(skb, pkt->l3, quoted, QUOTE_TCP_BYTES))
		return TC_ACT_SHOT;
	/* The rest of the buffer is zero and adds nothing. */
	sum = bpf_csum_diff(NULL, 0, (void *)quoted, sizeof(quoted), 0);
	fill_icmp_error(&error, pkt, quoted_bytes, sum);
	if (bpf_skb_change_tail(skb, pkt->l3 + quoted_bytes, 0) ||
	    bpf_skb_adjust_room(skb, sizeof(error), BPF_ADJ_ROOM_MAC, 0) ||
	    bpf_skb_store_bytes(skb, pkt->l3, &error, sizeof(error), 0))
		return TC_ACT_SHOT;
	return send_back(skb, pkt->l3);
}
