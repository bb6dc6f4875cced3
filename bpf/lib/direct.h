/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Clients that call an endpoint itself. One may use a port for that and for a service
 * at the same time: two connections to its own kernel, one to the endpoint. Connection
 * tracking gives the later of the two another port, and so do we (FLOW_PORT). A call
 * whose port is taken is a flow of DIRECT_SERVICE: its frontend is the endpoint.
 *
 * A service's flow learns that it is the later one from notes of direct calls, an
 * array by the hash of their ends. A note that another has replaced is missed; one that
 * outlives its connection costs a flow its port, and nothing else.
 */
#include "flow.h"
#include "nat.h"
#include "select.h"

/* May this packet be the first of something? Any datagram may. */
static __always_inline bool may_open(const struct packet *pkt)
{
	return pkt->proto == IPPROTO_UDP || is_opening(pkt);
}

/* What skb->tc_index of a packet is that a device of this node has translated: it may
 * come in by another, as by a VLAN's. Other nodes may be on the same kernel.
 */
static __always_inline __u32 own_index(void)
{
	struct settings_value *run;
	__u32 zero = 0;

	run = settings.lookup(&zero);
	return 0x8000 | (run ? run->host_netns & 0x7fff : 0);
}

/* The note for the ends of fresh, or for others of the same slot. */
static __always_inline struct direct_note *note_of(struct opening *fresh)
{
	const struct reverse_key *ends = &fresh->ends;
	__u32 hash = ends->backend.proto;
	int i;

#pragma unroll
	for (i = 0; i < ADDR_WORDS; i++) {
		hash = mix(hash, ends->backend.addr.word[i]);
		hash = mix(hash, ends->client.word[i]);
	}
	hash = mix(hash, (__u32)ends->backend.port << 16 | ends->port);
	hash ^= hash >> 16;
	hash *= 0x85ebca6b;
	fresh->hash = hash ^ hash >> 13;
	fresh->slot = 1 + fresh->hash % DIRECT_NOTES;
	return direct.lookup(&fresh->slot);
}

static __always_inline void note_direct(struct opening *fresh, __u32 now)
{
	struct direct_note *note = note_of(fresh);

	if (!note)
		return;
	note->ends = fresh->hash;
	note->seen_s = now;
}

static __always_inline void forget_direct(struct opening *fresh)
{
	struct direct_note *note = note_of(fresh);

	if (note && note->ends == fresh->hash)
		note->seen_s = 0;
}

/* Does a client with these ends call the endpoint itself? */
static __always_inline bool is_noted(struct opening *fresh, __u32 now)
{
	struct direct_note *note;

	/* It could not be given another port. */
	if (fresh->ends.backend.proto == IPPROTO_SCTP)
		return false;
	note = note_of(fresh);
	if (!note || note->ends != fresh->hash || !note->seen_s)
		return false;
	return fresh->ends.backend.proto != IPPROTO_UDP ||
	       since_s(note->seen_s, now) <= UDP_IDLE_S;
}

/* The first packet of a direct call, or a datagram. NEXT when its port is taken: its
 * flow is then the one of fresh.
 */
static __always_inline int open_direct(struct flow_key *key, struct opening *fresh, __u32 now)
{
	struct flow_value *flow = &fresh->flow;
	struct reverse_key *ends = &fresh->ends;
	__be16 port = ends->port;

	if (!backend_index.lookup(&ends->backend))
		return NOT_OURS;
	fresh->taken = false;
	free_client_port(fresh, key, DIRECT_SERVICE, now);
	note_direct(fresh, now);
	if (!fresh->taken || ends->backend.proto == IPPROTO_SCTP)
		return NOT_OURS;
	__builtin_memset(flow, 0, sizeof(*flow));
	flow->frontend = ends->backend;
	flow->backend = ends->backend;
	flow->seen_s = now;
	flow->flags = FLOW_PORT;
	key->service = DIRECT_SERVICE;
	key->second = 0;
	if (!take_nat_port(flow, key, &key->client, fresh->hash, ends, now))
		return NOT_OURS;
	flow->port_diff = port_diff(port, flow->nat_port);
	return flows.update(key, flow) ? NOT_OURS : NEXT;
}

/* A packet that calls no frontend. NEXT with *flow when it needs another port. Of the
 * packet nothing is used once its ends are noted, so the verifier need not follow what
 * it knows of it; who goes on has to parse it again.
 */
static __always_inline int call_direct(struct __sk_buff *skb, const struct packet *pkt,
				       struct flow_key *key, struct flow_value **flow)
{
	bool first = may_open(pkt), last = pkt->tcp_flags & (TCP_FIN | TCP_RST);
	__u32 slot = DIRECT_LEASE, zero = 0, now;
	struct direct_note *lease = direct.lookup(&slot);
	struct opening *fresh;

	if (!lease || !(first || last || lease->seen_s) || pkt->fragment != FRAGMENT_NONE ||
	    (first && skb->tc_index == own_index()))
		return NOT_OURS;
	fresh = openings.lookup(&zero);
	if (!fresh)
		return NOT_OURS;
	answer_to(pkt, &fresh->ends);
	fresh->ends.pad = 0;
	key->client = pkt->src;
	key->client_port = pkt->sport;
	key->proto = pkt->proto;
	key->service = DIRECT_SERVICE;
	key->second = 0;
	if (last)
		forget_direct(fresh);
	now = now_s();
	if (lease->seen_s) {
		*flow = flows.lookup(key);
		if (*flow && l4_addr_equal(&(*flow)->backend, &fresh->ends.backend)) {
			if (!first || !flow_ended(*flow, fresh->ends.backend.proto, now)) {
				lease->seen_s = now;
				touch(*flow, now);
				return NEXT;
			}
			flows.delete(key);
		}
		if (since_s(lease->seen_s, now) > TCP_IDLE_S)
			lease->seen_s = 0;
	}
	*flow = &fresh->flow;
	if (!first || open_direct(key, fresh, now) != NEXT)
		return NOT_OURS;
	lease->seen_s = now;
	return NEXT;
}
