/* SPDX-License-Identifier: GPL-2.0-only */

/* The least that balances load: parse, look up the service, look up the flow,
 * on a miss choose a backend and remember it, rewrite by direct access. No
 * policies, no life of a flow, no way back: the yardstick of bench/packet.py.
 */
#include "../lib/config.h"
#include "../lib/types.h"

struct least_flow {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u32  proto;
};

struct least_list {
	__u32 first;
	__u32 count;
};

BPF_TABLE("hash", struct l4_addr, struct least_list, least_services, 1);
BPF_TABLE("lru_hash", struct least_flow, struct l4_addr, least_flows, 1);
BPF_F_TABLE("array", __u32, __u32, least_slots, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", __u32, struct l4_addr, least_backends, 1, BPF_F_MMAPABLE);

#if IP_FAMILY == 4
#define LEAST_IP struct iphdr
#define LEAST_PROTO(ip) ((ip)->protocol)
#else
#define LEAST_IP struct ipv6hdr
#define LEAST_PROTO(ip) ((ip)->nexthdr)
#endif

struct least_tcp {
	__be16 sport;
	__be16 dport;
	__be32 seq;
	__be32 ack;
	__be32 flags;
	__u16 check;
	__be16 urgent;
};

static __always_inline __u16 least_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

static __always_inline void least_rewrite(LEAST_IP *ip, struct least_tcp *tcp,
					  const struct l4_addr *to)
{
	__be32 *dst = (void *)&ip->daddr;
	__u64 sum = 0;
	int i;

#pragma unroll
	for (i = 0; i < ADDR_WORDS; i++) {
		sum += (__u64)(__u32)~dst[i] + to->addr.word[i];
		dst[i] = to->addr.word[i];
	}
#if IP_FAMILY == 4
	ip->check = ~least_fold(sum + (__u16)~ip->check);
#endif
	sum += (__u16)~tcp->dport + to->port;
	tcp->dport = to->port;
	tcp->check = ~least_fold(sum + (__u16)~tcp->check);
}

int minimal(struct __sk_buff *skb)
{
	LEAST_IP *ip = (void *)(long)skb->data + ETH_HLEN;
	struct least_tcp *tcp = (void *)(ip + 1);
	struct l4_addr called = {}, *backend;
	struct least_flow flow = {};
	struct least_list *list;
	__u32 slot, *id;

	if ((void *)(tcp + 1) > (void *)(long)skb->data_end)
		return TC_ACT_OK;
	if (LEAST_PROTO(ip) != IPPROTO_TCP)
		return TC_ACT_OK;
	__builtin_memcpy(&called.addr, &ip->daddr, sizeof(called.addr));
	called.port = tcp->dport;
	called.proto = IPPROTO_TCP;
	list = least_services.lookup(&called);
	if (!list)
		return TC_ACT_OK;
	__builtin_memcpy(&flow.src, &ip->saddr, sizeof(flow.src));
	flow.dst = called.addr;
	flow.sport = tcp->sport;
	flow.dport = called.port;
	flow.proto = IPPROTO_TCP;
	backend = least_flows.lookup(&flow);
	if (!backend) {
		if (!list->count)
			return TC_ACT_SHOT;
		slot = list->first + bpf_get_prandom_u32() % list->count;
		id = least_slots.lookup(&slot);
		if (!id)
			return TC_ACT_SHOT;
		slot = *id;
		backend = least_backends.lookup(&slot);
		if (!backend)
			return TC_ACT_SHOT;
		least_flows.update(&flow, backend);
	}
	least_rewrite(ip, tcp, backend);
	return TC_ACT_OK;
}
