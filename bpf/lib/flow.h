/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Flows: found by the request through its frontend's service, by the reply
 * through its backend's.
 */
#include "clock.h"
#include "packet.h"

static __always_inline void touch(struct flow_value *flow, __u32 now)
{
	/* A store every packet would bounce the cache line between CPUs. */
	if (flow->seen_s != now)
		flow->seen_s = now;
}

/* Whether this is new of the flow. */
static __always_inline bool note(struct flow_value *flow, __u8 state)
{
	if ((flow->state & state) == state)
		return false;
	flow->state |= state;
	return true;
}

/* Has a flow ended, so that its client may use its port for another? */
static __always_inline bool flow_ended(const struct flow_value *flow, __u8 proto, __u32 now)
{
	__u32 idle_s = since_s(flow->seen_s, now);

	if (proto == IPPROTO_UDP)
		return idle_s > UDP_IDLE_S;
	if (flow->state & (STATE_CLIENT_FIN | STATE_BACKEND_FIN | STATE_RESET))
		return true;
	return !(flow->state & STATE_ESTABLISHED) && idle_s > SYN_IDLE_S;
}

/* May this packet of the client go on with a flow it once had? */
static __always_inline bool flow_holds(const struct flow_value *flow, __u32 service,
				       const struct packet *pkt, __u32 now)
{
	__u32 id = flow->backend_id;
	struct backend_value *backend;

	/* Established TCP stays with its backend whatever becomes of it (P12). */
	if (pkt->proto != IPPROTO_UDP && !is_opening(pkt))
		return true;
	if (flow_ended(flow, pkt->proto, now))
		return false;
	/* A UDP flow, or one about to open, follows the endpoint's life (C5); the
	 * id may have gone to another endpoint since.
	 */
	backend = backends.lookup(&id);
	return backend && backend->service == service && (backend->flags & BACKEND_SERVING) &&
	       l4_addr_equal(&backend->at, &flow->backend);
}

/* The flow of a request, or NULL with key ready for a new one. A client that
 * reaches two frontends of one service port from one port has two flows, the
 * other of which is then *other.
 */
static __always_inline struct flow_value *flow_of_request(struct flow_key *key,
							   const struct l4_addr *frontend,
							   bool opening, struct flow_value **other)
{
	struct flow_value *first = flows.lookup(key), *second;

	*other = NULL;
	if (first && l4_addr_equal(&first->frontend, frontend))
		return first;
	/* The first may have been evicted; but a client that opens a connection
	 * hardly ever has a second flow and not the first: not worth a search.
	 */
	if (!first && opening)
		return NULL;
	key->second = 1;
	second = flows.lookup(key);
	if (second && l4_addr_equal(&second->frontend, frontend))
		return second;
	*other = first;
	if (!first) {
		*other = second;
		key->second = 0;
	}
	return NULL;
}

/* Who a packet is from, if it is a backend's answer, and to. */
static __always_inline void answer_of(const struct packet *pkt, struct reverse_key *from)
{
	from->backend.addr = pkt->src;
	from->backend.port = pkt->sport;
	from->backend.proto = pkt->proto;
	from->client = pkt->dst;
	from->port = pkt->dport;
}

/* The same of what would answer a packet to a backend. */
static __always_inline void answer_to(const struct packet *pkt, struct reverse_key *from)
{
	from->backend.addr = pkt->dst;
	from->backend.port = pkt->dport;
	from->backend.proto = pkt->proto;
	from->client = pkt->src;
	from->port = pkt->sport;
}

/* Does a port of a client's stand for others of its own, or of other clients? */
static __always_inline bool is_nat_port(__be16 port)
{
	return (__u32)bpf_ntohs(port) - NAT_PORT_FIRST < NAT_PORT_COUNT;
}

/* The flow that a backend knows by these ends, and its key. An entry proves
 * nothing: the flow may have gone to another backend or port since.
 */
static __always_inline struct flow_value *flow_at_reverse(struct reverse_key *at,
							  struct flow_key **key)
{
	struct flow_key *known = reverse.lookup(at);
	struct flow_value *flow = known ? flows.lookup(known) : NULL;
	bool other_port;

	if (!flow || !l4_addr_equal(&flow->backend, &at->backend))
		return NULL;
	*key = known;
	other_port = flow->flags & (FLOW_SNAT | FLOW_PORT);
	if ((other_port ? flow->nat_port : known->client_port) != at->port)
		return NULL;
	if (flow->flags & FLOW_SNAT)
		return addr_equal(&flow->nat, &at->client) ? flow : NULL;
	return addr_equal(&known->client, &at->client) ? flow : NULL;
}

/* The same for a packet from the backend to those ends. */
static __always_inline struct flow_value *flow_of_reverse(struct reverse_key *from,
							   struct flow_key *key)
{
	struct flow_value *flow;
	struct flow_key *known;

	flow = flow_at_reverse(from, &known);
	if (flow)
		*key = *known;
	return flow;
}

/* The flow that a packet from a backend to a client answers, or NULL when it is
 * no reply of a service. Service ports with the same endpoint share a chain of
 * backends.
 */
static __always_inline struct flow_value *flow_of_reply(struct reverse_key *from,
							 struct flow_key *key)
{
	__u32 *head = backend_index.lookup(&from->backend);
	__u32 id;
	int i;

	if (!head)
		return NULL;
	key->client = from->client;
	key->client_port = from->port;
	key->proto = from->backend.proto;
	id = *head;
	for (i = 0; i < BACKEND_CHAIN_MAX && id != NO_BACKEND; i++) {
		struct backend_value *backend = backends.lookup(&id);
		struct flow_value *flow;

		if (!backend)
			return NULL;
		key->service = backend->service;
		key->second = 0;
		flow = flows.lookup(key);
		if (flow && flow->backend_id == id && !(flow->flags & FLOW_PORT))
			return flow;
		key->second = 1;
		flow = flows.lookup(key);
		if (flow && flow->backend_id == id && !(flow->flags & FLOW_PORT))
			return flow;
		id = backend->next;
	}
	if (id == NO_BACKEND && !is_nat_port(from->port))
		return NULL;
	return flow_of_reverse(from, key);
}

/* End the flow under key if it is with that backend; false when it still lives. */
static __always_inline bool end_flow(struct flow_key *key, __u32 backend_id, __u32 now)
{
	struct flow_value *flow = flows.lookup(key);

	/* A flow with another port there leaves the client's own free. */
	if (!flow || flow->backend_id != backend_id || (flow->flags & FLOW_PORT))
		return true;
	if (!flow_ended(flow, key->proto, now))
		return false;
	flows.delete(key);
	return true;
}

/* The client is about to talk to an endpoint in a new way, directly or through
 * another frontend. Flows that it had with the endpoint from the same port are
 * deleted: their translation would catch the answers. One that still lives has
 * fresh->taken set, in memory: there the verifier does not follow it. Flows of service
 * `but` are left: whoever opens one has just looked for them, and each search is a
 * cache miss. key is the client's, and left with another service. Returns whether
 * the endpoint has more service ports than a walk goes through.
 */
static __always_inline bool free_client_port(struct opening *fresh, struct flow_key *key,
					     __u32 but, __u32 now)
{
	__u32 *head = backend_index.lookup(&fresh->ends.backend);
	struct flow_key *known;
	struct flow_value *flow;
	__u32 id;
	int i;

	if (!head)
		return false;
	id = *head;
	for (i = 0; i < BACKEND_CHAIN_MAX && id != NO_BACKEND; i++) {
		struct backend_value *backend = backends.lookup(&id);

		if (!backend)
			break;
		key->service = backend->service;
		if (key->service != but) {
			key->second = 0;
			if (!end_flow(key, id, now))
				fresh->taken = true;
			key->second = 1;
			if (!end_flow(key, id, now))
				fresh->taken = true;
		}
		id = backend->next;
	}
	if (id == NO_BACKEND)
		return false;
	flow = flow_at_reverse(&fresh->ends, &known);
	if (flow && known->service != but) {
		key->service = known->service;
		key->second = known->second;
		if (!end_flow(key, flow->backend_id, now))
			fresh->taken = true;
	}
	return true;
}

/* Of a client's ports above those most systems give to sockets, some stand for
 * ports it already uses towards the endpoint, and of a node's, some for clients
 * of the fast path. Few tries: who runs out is rare, and told so.
 */
static __always_inline bool flow_key_equal(const struct flow_key *a, const struct flow_key *b)
{
	return a->client_port == b->client_port && a->service == b->service &&
	       a->proto == b->proto && a->second == b->second && addr_equal(&a->client, &b->client);
}

/* Have the backend see the client as `client` and one of those ports, the `first`th
 * if it is free; or held by this very flow, which another CPU has just opened.
 */
static __always_inline bool take_nat_port(struct flow_value *flow, const struct flow_key *key,
					  const struct addr *client, __u32 first,
					  struct reverse_key *ends, __u32 now)
{
	int i;

	ends->client = *client;
	for (i = 0; i < NAT_TRIES; i++) {
		struct flow_value *held;
		struct flow_key *holder;

		ends->port = bpf_htons(NAT_PORT_FIRST + (first + i) % NAT_PORT_COUNT);
		held = flow_at_reverse(ends, &holder);
		if (held && !flow_ended(held, ends->backend.proto, now) &&
		    !flow_key_equal(holder, key))
			continue;
		if (reverse.update(ends, (struct flow_key *)key))
			return false;
		flow->nat = *client;
		flow->nat_port = ends->port;
		return true;
	}
	return false;
}

/* The client's side of a TCP flow's life; the STATE_* by which it now ends, or 0. */
static __always_inline __u8 note_request(struct flow_value *flow, const struct packet *pkt)
{
	__u8 end;

	if (!(pkt->tcp_flags & (TCP_FIN | TCP_RST)))
		return 0;
	end = pkt->tcp_flags & TCP_RST ? STATE_RESET : STATE_CLIENT_FIN;
	return note(flow, end) ? end : 0;
}

/* The backend's side of a TCP flow's life; the STATE_* by which it now ends, or 0. */
static __always_inline __u8 note_reply(struct flow_value *flow, const struct packet *pkt)
{
	__u8 end;

	if (!(pkt->tcp_flags & (TCP_FIN | TCP_RST))) {
		note(flow, STATE_ESTABLISHED);
		return 0;
	}
	end = pkt->tcp_flags & TCP_RST ? STATE_RESET : STATE_BACKEND_FIN;
	return note(flow, end) ? end : 0;
}

/* A flow that has ended must not catch the answers to a later connection that
 * the same client opens to the endpoint itself. A backend that has not ended its
 * side may still be repeating its SYN-ACK.
 */
static __always_inline bool reply_is_stale(const struct flow_value *flow, const struct packet *pkt,
					   __u32 now)
{
	if (pkt->proto == IPPROTO_UDP)
		return since_s(flow->seen_s, now) > UDP_IDLE_S;
	return (pkt->tcp_flags & TCP_SYN) && (flow->state & (STATE_BACKEND_FIN | STATE_RESET));
}
