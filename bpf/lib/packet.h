/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* One packet, parsed once; every later step reads this and nothing else.
 *
 * Headers are read straight from the packet but never written that way: a
 * program with a direct store gets a prologue that copies every cloned skb,
 * also those it then leaves alone, and each TCP segment of a local socket is a
 * clone. Writing goes through helpers (nat.h).
 */
#include "addr.h"

enum fragment {
	FRAGMENT_NONE,
	FRAGMENT_FIRST,		/* has the ports */
	FRAGMENT_LATER,		/* has none */
};

struct packet {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u8   proto;
	__u8   tcp_flags;	/* for SCTP: what its first chunk would be in TCP */
	__u8   fragment;	/* enum fragment */
	__u8   icmp_type;
	__u8   why;		/* DROP_* + 1 once it is not to be forwarded */
	__u8   leaving;		/* BPF_F_INGRESS of one that a process of the node sends, else 0 */
	__u32  fragment_id;
	__u32  l3;		/* offset of the IP header */
	__u32  l4;		/* offset of what follows it */
	__u32  end;		/* offset of what is no longer the IP packet */
	__be32 lead;		/* the word of the IP header before its addresses */
};

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* A step's result: a verdict ends the packet, NEXT goes on.
 *
 * FORWARD hands a packet, translated or not, to the filter after ours: a CNI's
 * shaper or another agent on the device sees what it would see without us.
 */
#define NEXT (-100)
#define FORWARD TC_ACT_UNSPEC
#define NOT_OURS FORWARD

#if IP_FAMILY == 4
#define IP_HEADER struct iphdr
#define PROTO_ICMP IPPROTO_ICMP
#else
#define IP_HEADER struct ipv6hdr
#define PROTO_ICMP IPPROTO_ICMPV6
#endif

#define IP_HEADER_BYTES sizeof(IP_HEADER)
#define ICMP_HEADER_BYTES 8
#define PORTS_BYTES 4
#define TCP_HEADER_BYTES 20
#define TCP_CHECK_OFFSET 16
#define UDP_HEADER_BYTES 8
#define UDP_CHECK_OFFSET 6
#define SCTP_HEADER_BYTES 16	/* with that of the first chunk */

/* Enough for any header chain worth translating: Ethernet, an IP header with
 * options or extensions, TCP without options.
 */
#define HEADERS_BYTES 160

/* Hops left: in the word before the addresses, which NAT writes anyway. */
#if IP_FAMILY == 4
#define HOPS_SHIFT 0
#else
#define HOPS_SHIFT 24
#endif

static __always_inline __u8 hops(__be32 lead)
{
	return lead >> HOPS_SHIFT;
}

/* Where a packet ends that claims to have so many bytes. 0 is more than the
 * field can say (BIG TCP), and then it is all there is.
 */
static __always_inline __u32 packet_end(__u32 from, __u32 bytes, __u32 skb_bytes)
{
	return bytes ? from + bytes : skb_bytes;
}

#if IP_FAMILY == 4
static __always_inline int parse_ip(void *data, void *end, __u32 skb_bytes, struct packet *pkt)
{
	struct iphdr *ip = data + pkt->l3;
	__u16 fragment;

	if ((void *)(ip + 1) > end || ip->version != 4 || ip->ihl < 5)
		return NOT_OURS;
	pkt->src.word[0] = ip->saddr;
	pkt->dst.word[0] = ip->daddr;
	pkt->proto = ip->protocol;
	pkt->lead = *(__be32 *)&ip->ttl;
	pkt->l4 = pkt->l3 + ip->ihl * 4;
	pkt->end = packet_end(pkt->l3, bpf_ntohs(ip->tot_len), skb_bytes);
	if (pkt->l4 > pkt->end || pkt->end > skb_bytes)
		return NOT_OURS;
	fragment = bpf_ntohs(ip->frag_off) & 0x3fff;	/* offset and more-fragments */
	if (fragment) {
		pkt->fragment = fragment & 0x1fff ? FRAGMENT_LATER : FRAGMENT_FIRST;
		pkt->fragment_id = ip->id;
	}
	return NEXT;
}
#else
struct extension_header {
	__u8 next;
	__u8 length;		/* in 8 bytes, the first not counted */
	__be16 fragment_offset;
	__be32 fragment_id;
};

/* Hop-by-hop, destination options, routing, fragment: RFC 8200 asks for this
 * many at most. A packet with more is left to the stack.
 */
#define EXTENSIONS_MAX 4

static __always_inline int parse_ip(void *data, void *end, __u32 skb_bytes, struct packet *pkt)
{
	struct ipv6hdr *ip = data + pkt->l3;
	__u32 at;
	__u8 next;
	int i;

	if ((void *)(ip + 1) > end || ip->version != 6)
		return NOT_OURS;
	__builtin_memcpy(&pkt->src, &ip->saddr, sizeof(pkt->src));
	__builtin_memcpy(&pkt->dst, &ip->daddr, sizeof(pkt->dst));
	pkt->lead = *(__be32 *)&ip->payload_len;
	next = ip->nexthdr;
	at = pkt->l3 + sizeof(*ip);
	pkt->end = packet_end(at, bpf_ntohs(ip->payload_len), skb_bytes);
	if (pkt->end > skb_bytes)
		return NOT_OURS;
#pragma unroll
	for (i = 0; i < EXTENSIONS_MAX; i++) {
		struct extension_header *extension = data + at;

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING &&
		    next != IPPROTO_FRAGMENT && next != IPPROTO_DSTOPTS)
			break;
		if ((void *)(extension + 1) > end)
			return NOT_OURS;
		if (next == IPPROTO_FRAGMENT) {
			__u16 offset = bpf_ntohs(extension->fragment_offset);

			if (offset & 0xfff9) {
				pkt->fragment = offset & 0xfff8 ? FRAGMENT_LATER : FRAGMENT_FIRST;
				pkt->fragment_id = extension->fragment_id;
			}
			at += sizeof(*extension);
		} else {
			at += (extension->length + 1) * 8;
		}
		next = extension->next;
		if (pkt->fragment == FRAGMENT_LATER || at > HEADERS_BYTES)
			break;
	}
	if (at > HEADERS_BYTES || at > pkt->end)
		return NOT_OURS;
	pkt->proto = next;
	pkt->l4 = at;
	return NEXT;
}
#endif

#define SCTP_INIT 1
#define SCTP_INIT_ACK 2
#define SCTP_ABORT 6
#define SCTP_SHUTDOWN 7

/* An association opens and ends as a connection does, in other words. */
static __always_inline __u8 sctp_as_tcp(__u8 chunk)
{
	switch (chunk) {
	case SCTP_INIT:
		return TCP_SYN;
	case SCTP_INIT_ACK:
		return TCP_SYN | TCP_ACK;
	case SCTP_ABORT:
		return TCP_RST;
	case SCTP_SHUTDOWN:
		return TCP_FIN;
	default:
		return TCP_ACK;
	}
}

/* Ports, TCP flags, ICMP type. A segment too short for its own header is left
 * to the stack, which knows what to do with it.
 */
static __always_inline int parse_l4(void *data, void *end, struct packet *pkt)
{
	__u32 bytes = pkt->end - pkt->l4;
	void *l4 = data + pkt->l4;
	__be16 *ports = l4;

	switch (pkt->proto) {
	case IPPROTO_TCP:
		if (bytes < TCP_HEADER_BYTES || l4 + TCP_HEADER_BYTES > end)
			return NOT_OURS;
		pkt->tcp_flags = *(__u8 *)(l4 + 13);
		break;
	case IPPROTO_UDP:
		if (bytes < UDP_HEADER_BYTES || l4 + UDP_HEADER_BYTES > end)
			return NOT_OURS;
		break;
	case IPPROTO_SCTP:
		if (bytes < SCTP_HEADER_BYTES || l4 + SCTP_HEADER_BYTES > end)
			return NOT_OURS;
		pkt->tcp_flags = sctp_as_tcp(*(__u8 *)(l4 + 12));
		break;
	case PROTO_ICMP:
		if (bytes < ICMP_HEADER_BYTES || l4 + ICMP_HEADER_BYTES > end)
			return NOT_OURS;
		pkt->icmp_type = *(__u8 *)l4;
		return NEXT;
	default:
		return NOT_OURS;
	}
	pkt->sport = ports[0];
	pkt->dport = ports[1];
	return NEXT;
}

/* The verifier walks the rest of a program once for every layout of headers it
 * saw being parsed. Read back from the context, a value is any value to it: one
 * walk for all, and a program that loads in a third of the time.
 */
static __always_inline void forget_layout(struct __sk_buff *skb, struct packet *pkt)
{
	volatile __u32 *scratch = (volatile __u32 *)&skb->cb[0];
	__u32 known;

	*scratch = pkt->l4 | (__u32)pkt->fragment << 8 | (__u32)pkt->tcp_flags << 16 |
		   (__u32)pkt->proto << 24;
	known = *scratch;
	pkt->l4 = known & 0xff;
	pkt->fragment = known >> 8 & 3;
	pkt->tcp_flags = known >> 16;
	pkt->proto = known >> 24;
}

/* Fill pkt from the packet whose IP header is at l3. NEXT, or NOT_OURS for
 * what no service can be about.
 */
static __always_inline int parse(struct __sk_buff *skb, __u32 l3, struct packet *pkt)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	__u32 want = l3 + HEADERS_BYTES;

	/* Headers outside the linear part, as some drivers and GRO leave them. */
	if (data + l3 + IP_HEADER_BYTES + TCP_HEADER_BYTES > end) {
		if (want > skb->len)
			want = skb->len;
		if (bpf_skb_pull_data(skb, want))
			return NOT_OURS;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
	}
	pkt->l3 = l3;
	pkt->fragment = FRAGMENT_NONE;
	pkt->tcp_flags = 0;
	if (parse_ip(data, end, skb->len, pkt) != NEXT)
		return NOT_OURS;
	if (pkt->fragment != FRAGMENT_LATER && parse_l4(data, end, pkt) != NEXT)
		return NOT_OURS;
	forget_layout(skb, pkt);
	return NEXT;
}

static __always_inline bool is_transport(const struct packet *pkt)
{
	return pkt->proto == IPPROTO_TCP || pkt->proto == IPPROTO_UDP ||
	       pkt->proto == IPPROTO_SCTP;
}

/* The packet that opens a connection or association. */
static __always_inline bool is_opening(const struct packet *pkt)
{
	return (pkt->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}
