/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Which backend a new flow gets. */
#include "clock.h"
#include "packet.h"

struct list {
	__u32 first;
	__u32 count;
	__u32 member;		/* BACKEND_IN_*: what a backend of this list carries */
};

static __always_inline struct list list_for(const struct frontend_value *frontend, __u32 source)
{
	struct list list;

	if (frontend->flags & source) {
		list.first = frontend->local_first;
		list.count = frontend->local_count;
		list.member = BACKEND_IN_LOCAL;
	} else {
		list.first = frontend->cluster_first;
		list.count = frontend->cluster_count;
		list.member = BACKEND_IN_CLUSTER;
	}
	return list;
}

/* The prefix length of a key counts the bits before the address too. */
#define RANGE_KEY_BITS (8 * (sizeof(__u32) + sizeof(struct addr)))

/* May this source connect to what has that set of source ranges? (P10) */
static __always_inline bool source_allowed(const struct addr *source, __u32 ranges)
{
	struct range_key key = {
		.prefix_bits = RANGE_KEY_BITS,
		.ranges = ranges,
		.addr = *source,
	};

	return source_ranges.lookup(&key) != NULL;
}

static __always_inline __u32 mix(__u32 hash, __u32 word)
{
	hash ^= word * 0xcc9e2d51;
	hash = (hash << 13) | (hash >> 19);
	return hash * 5 + 0xe6546b64;
}

/* Not a random number: two packets of one client that open a flow on two CPUs at
 * once, as A and AAAA questions do, must both go where the flow that stays goes.
 * The same on every node: client and service port, not the address of the
 * service, so a NodePort leads to the same backend through any node. Sticky: the
 * client's port stays out, so a client of a Maglev table stays with its backend
 * even where nobody remembers it.
 */
static __always_inline __u32 client_hash(const struct packet *pkt, bool sticky)
{
	__u32 zero = 0, hash = 0;
	struct settings_value *run = settings.lookup(&zero);
	int i;

	if (run)
		hash = run->hash_seed;
#pragma unroll
	for (i = 0; i < ADDR_WORDS; i++)
		hash = mix(hash, pkt->src.word[i]);
	hash = mix(hash, (__u32)pkt->dport << 16 | (sticky ? 0 : pkt->sport));
	hash = mix(hash, pkt->proto);
	hash ^= hash >> 16;
	hash *= 0x85ebca6b;
	hash ^= hash >> 13;
	hash *= 0xc2b2ae35;
	return hash ^ hash >> 16;
}

/* The backend in a list at a fraction of 2^32; NO_BACKEND for an empty list. */
static __always_inline __u32 backend_at(const struct list *list, __u32 fraction)
{
	__u32 slot = list->first + (__u32)(((__u64)fraction * list->count) >> 32);
	__u32 *id;

	if (!list->count)
		return NO_BACKEND;
	id = slots.lookup(&slot);
	return id ? *id : NO_BACKEND;
}

/* The backend an affinity entry names, if it is still in the list chosen for
 * this flow (B10) and the time has not run out (P13); else NO_BACKEND.
 */
static __always_inline __u32 affinity_recall(const struct affinity_value *known, __u32 service,
					     __u32 member, __u32 timeout_s, __u32 now_s)
{
	struct backend_value *backend;

	if (!known || since_s(known->seen_s, now_s) > timeout_s)
		return NO_BACKEND;
	backend = backends.lookup((__u32 *)&known->backend_id);
	if (!backend || backend->service != service || !(backend->flags & member))
		return NO_BACKEND;
	return known->backend_id;
}

/* Where the client stays from now on. What is known is written in place: an update
 * gives the entry to another client while a third CPU may still read it.
 */
static __always_inline void affinity_renew(struct affinity_key *client,
					   struct affinity_value *known, __u32 backend_id,
					   __u32 now_s)
{
	struct affinity_value fresh = { .backend_id = backend_id, .seen_s = now_s };

	if (!known) {
		affinity.insert(client, &fresh);
		return;
	}
	if (known->backend_id != backend_id)
		known->backend_id = backend_id;
	if (known->seen_s != now_s)
		known->seen_s = now_s;
}

/* The backend in a list for a new flow of a client: the one it stays with, else the
 * one at a fraction of 2^32; NO_BACKEND for an empty list.
 */
static __always_inline __u32 choose(const struct frontend_value *frontend,
				    const struct list *list, struct affinity_key *client,
				    __u32 fraction, __u32 now_s)
{
	struct affinity_value *known;
	__u32 id;

	if (!frontend->affinity_s)
		return backend_at(list, fraction);
	client->service = frontend->service;
	known = affinity.lookup(client);
	id = affinity_recall(known, client->service, list->member, frontend->affinity_s, now_s);
	if (id == NO_BACKEND)
		id = backend_at(list, fraction);
	if (id != NO_BACKEND)
		affinity_renew(client, known, id, now_s);
	return id;
}

/* The same for the client of a packet. */
static __always_inline __u32 choose_for_packet(const struct frontend_value *frontend,
					       const struct list *list, const struct packet *pkt,
					       __u32 now_s)
{
	bool sticky = frontend->affinity_s && (frontend->flags & FRONTEND_MAGLEV);
	struct affinity_key client = {};

	__builtin_memcpy(client.client, &pkt->src, sizeof(pkt->src));
	return choose(frontend, list, &client, client_hash(pkt, sticky), now_s);
}

/* Another backend of the list than id, where this client's port is taken by its
 * flow to another address of the service: the backend could not tell the two
 * apart. NO_BACKEND when there is none.
 */
static __always_inline __u32 choose_beside(const struct list *list, const struct packet *pkt,
					   __u32 id)
{
	__u32 fraction = client_hash(pkt, false), step;
	int i;

	if (!list->count)
		return NO_BACKEND;
	step = 0xffffffff / list->count + 1;
	for (i = 0; i < BESIDE_TRIES; i++) {
		__u32 other;

		fraction += step;
		other = backend_at(list, fraction);
		if (other != id)
			return other;
	}
	return NO_BACKEND;
}
