/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Datagrams that processes of the node send from a number which is a node port: what
 * comes back to such ends is an answer, not a request (B9). A connected socket shows
 * it by itself; of others the sending is noted.
 *
 * A note is an entry of `reverse` that leads to no flow: its protocol is 0, and
 * `service` is when. The ends are those of an answer as seen from the frontend.
 */
#include "flow.h"

/* In skb->tc_index, which stays with a packet: the device it is redirected to, or comes
 * in by once more, has our programs, too.
 */
#define TRANSLATED 0xEB5

/* May this packet, which answers no request of a service, be such a datagram? What
 * the node forwards came in somewhere, and a tunnel's packets are no socket's.
 */
static __always_inline bool is_own_datagram(const struct __sk_buff *skb, const struct packet *pkt)
{
	return pkt->proto == IPPROTO_UDP && !skb->ingress_ifindex && skb->sk &&
	       !(HOST_PACKETS && skb->tc_index == TRANSLATED);
}

/* from: who it is from and to. note: room for one. */
static __always_inline void note_own(struct reverse_key *from, struct flow_key *note)
{
	struct flow_key *known;
	__u32 now;

	if (!frontends.lookup(&from->backend))
		return;
	now = now_s();
	known = reverse.lookup(from);
	if (known && !known->proto) {
		known->service = now;
		return;
	}
	note->proto = 0;
	note->service = now;
	reverse.update(from, note);
}

/* Is a packet between these ends an answer? Answers keep the note, too. */
static __always_inline bool answers_own(struct reverse_key *ends, __u32 now)
{
	struct flow_key *note = reverse.lookup(ends);

	if (!note || note->proto || since_s(note->service, now) > UDP_IDLE_S)
		return false;
	note->service = now;
	return true;
}
