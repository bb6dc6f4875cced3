/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* The later fragments of a datagram carry no ports: they find them by the
 * datagram's id, left there by the first one.
 */
#include "packet.h"

static __always_inline void fragment_key_of(const struct packet *pkt, struct fragment_key *key)
{
	key->src = pkt->src;
	key->dst = pkt->dst;
	key->id = pkt->fragment_id;
	key->proto = pkt->proto;
}

/* Give a later fragment its ports; false when the first was never ours. */
static __always_inline bool fragment_recall(struct packet *pkt)
{
	struct fragment_key key = {};
	struct fragment_value *ports;

	fragment_key_of(pkt, &key);
	ports = fragments.lookup(&key);
	if (!ports)
		return false;
	pkt->sport = ports->sport;
	pkt->dport = ports->dport;
	return true;
}

/* Before the first fragment is rewritten: the later ones come with the same
 * addresses it came with.
 */
static __always_inline void fragment_remember(const struct packet *pkt)
{
	struct fragment_key key = {};
	struct fragment_value ports = { .sport = pkt->sport, .dport = pkt->dport };

	fragment_key_of(pkt, &key);
	fragments.update(&key, &ports);
}
