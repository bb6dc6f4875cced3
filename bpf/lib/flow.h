/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Flows: found by the request through its frontend's service, by the reply
 * through its backend's.
 */
#include "packet.h"

/* Seconds of a clock that is cheap to read, where the kernel offers one (5.11). */
static __always_inline __u32 now_s(void)
{
#if HAVE_COARSE_CLOCK
	return bpf_ktime_get_coarse_ns() / 1000000000ULL;
#else
	return bpf_ktime_get_ns() / 1000000000ULL;
#endif
}

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
	__u32 idle_s = now - flow->seen_s;

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

/* The flow that from -> client answers, or NULL when it is no reply of a
 * service. Service ports with the same endpoint share a chain of backends.
 */
static __always_inline struct flow_value *flow_of_reply(struct l4_addr *from,
							 const struct addr *client,
							 __be16 client_port, struct flow_key *key)
{
	__u32 *head = backend_index.lookup(from);
	__u32 id;
	int i;

	if (!head)
		return NULL;
	key->client = *client;
	key->client_port = client_port;
	key->proto = from->proto;
	id = *head;
	for (i = 0; i < BACKEND_CHAIN_MAX && id != NO_BACKEND; i++) {
		struct backend_value *backend = backends.lookup(&id);
		struct flow_value *flow;

		if (!backend)
			return NULL;
		key->service = backend->service;
		key->second = 0;
		flow = flows.lookup(key);
		if (flow && flow->backend_id == id)
			return flow;
		key->second = 1;
		flow = flows.lookup(key);
		if (flow && flow->backend_id == id)
			return flow;
		id = backend->next;
	}
	return NULL;
}

/* End the flow under key if it is with that backend; false when it must live. */
static __always_inline bool end_flow(struct flow_key *key, __u32 backend_id, __u32 now)
{
	struct flow_value *flow = flows.lookup(key);

	if (!flow || flow->backend_id != backend_id)
		return true;
	if (key->proto != IPPROTO_UDP && !flow_ended(flow, key->proto, now))
		return false;
	flows.delete(key);
	return true;
}

/* The client is about to talk to an endpoint in a new way, directly or through
 * another frontend. Flows that it had with the endpoint from the same port end
 * here: their translation would catch the answers. Returns false when one of
 * them is a connection that still lives. Flows of service `but` are left: whoever
 * opens one has just looked for them, and each search is a cache miss.
 */
static __always_inline bool free_client_port(const struct l4_addr *endpoint, __u32 but,
					     const struct packet *pkt, __u32 now)
{
	struct l4_addr at = *endpoint;
	__u32 *head = backend_index.lookup(&at);
	struct flow_key key = {
		.client = pkt->src,
		.client_port = pkt->sport,
		.proto = pkt->proto,
	};
	bool is_free = true;
	__u32 id;
	int i;

	if (!head)
		return true;
	id = *head;
	for (i = 0; i < BACKEND_CHAIN_MAX && id != NO_BACKEND; i++) {
		struct backend_value *backend = backends.lookup(&id);

		if (!backend)
			break;
		key.service = backend->service;
		if (key.service != but) {
			key.second = 0;
			is_free &= end_flow(&key, id, now);
			key.second = 1;
			is_free &= end_flow(&key, id, now);
		}
		id = backend->next;
	}
	return is_free;
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
		return now - flow->seen_s > UDP_IDLE_S;
	return (pkt->tcp_flags & TCP_SYN) && (flow->state & (STATE_BACKEND_FIN | STATE_RESET));
}
