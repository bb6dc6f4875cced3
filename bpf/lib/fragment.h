/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* The later fragments of a datagram carry no ports: they find them by the
 * datagram's id, left there by the first one.
 *
 * One that comes before the first is left to the stack, as nobody knows yet whose
 * it is, and a copy is held. When the first one turns out to be a service's, it
 * goes its way and a clone of it, the carrier, comes in once more for every piece
 * held: a program cannot make a packet, but it can write the piece over the
 * carrier. So written the piece comes in again and finds its ports.
 */
#include "flow.h"
#include "packet.h"

/* In skb->tc_index, which stays with a packet that is redirected (TRANSLATED in
 * own.h is another). What came in again is never held again, nor does it make
 * another carrier: nothing goes round for ever.
 */
#define CARRIER 0xEB6
#define RELEASED 0xEB7

/* The word of a packet that tells the pieces of a datagram apart. Behind other
 * extension headers it is elsewhere: such pieces are not held.
 */
#if IP_FAMILY == 4
#define FRAGMENT_WORD (offsetof(struct iphdr, frag_off))
#define FRAGMENT_HEADER_BYTES 0
#else
#define FRAGMENT_WORD (sizeof(struct ipv6hdr) + offsetof(struct extension_header, fragment_offset))
#define FRAGMENT_HEADER_BYTES sizeof(struct extension_header)
#endif

static __always_inline void fragment_key_of(const struct packet *pkt, struct fragment_key *key)
{
	key->src = pkt->src;
	key->dst = pkt->dst;
	key->id = pkt->fragment_id;
	key->proto = pkt->proto;
}

/* Ids are used again: what was seen long ago is of another datagram. */
static __always_inline bool is_same_datagram(__u32 seen_s, __u32 now)
{
	return since_s(seen_s, now) <= FRAGMENT_S;
}

/* Give a later fragment its ports; false when the first was never ours. */
static __always_inline bool fragment_recall(struct packet *pkt)
{
	struct fragment_key key = {};
	struct fragment_value *ports;

	fragment_key_of(pkt, &key);
	ports = fragments.lookup(&key);
	if (!ports || !is_same_datagram(ports->seen_s, now_s()))
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
	struct fragment_value ports = {
		.sport = pkt->sport,
		.dport = pkt->dport,
		.seen_s = now_s(),
	};

	fragment_key_of(pkt, &key);
	fragments.update(&key, &ports);
}

/* Is that a packet there is room for? The verifier must see both bounds on the
 * register that is then used; the compiler would make one comparison of them.
 */
static __always_inline bool is_holdable(__u64 *bytes)
{
	if (*bytes > HELD_BYTES)
		return false;
	asm volatile("" : "+r"(*bytes));
	return *bytes >= IP_HEADER_BYTES;
}

/* Keep a copy of a later fragment, in the first slot that is free or has the same.
 * NEXT when the first fragment came meanwhile, on another CPU.
 */
static __always_inline int fragment_hold(struct __sk_buff *skb, struct packet *pkt)
{
	__u64 bytes = pkt->end - pkt->l3;
	__u32 zero = 0, now;
	struct held_value *piece;
	struct holding *fresh;
	int i;

	if (skb->tc_index == RELEASED || !is_holdable(&bytes) ||
	    (FRAGMENT_HEADER_BYTES &&
	     pkt->l4 != pkt->l3 + IP_HEADER_BYTES + FRAGMENT_HEADER_BYTES))
		return NOT_OURS;
	fresh = holding.lookup(&zero);
	if (!fresh || bpf_skb_load_bytes(skb, pkt->l3, fresh->value.packet, bytes))
		return NOT_OURS;
	now = now_s();
	fresh->value.seen_s = now;
	fresh->value.length_bytes = bytes;
	fragment_key_of(pkt, &fresh->key.datagram);
	fresh->key.slot = 0;
#pragma unroll
	for (i = 0; i < HELD_SLOTS; i++) {
		piece = held.lookup(&fresh->key);
		if (!piece || !is_same_datagram(piece->seen_s, now) ||
		    *(__be16 *)(piece->packet + FRAGMENT_WORD) ==
			    *(__be16 *)(fresh->value.packet + FRAGMENT_WORD))
			break;
		fresh->key.slot++;
	}
	if (fresh->key.slot == HELD_SLOTS || held.update(&fresh->key, &fresh->value))
		return NOT_OURS;
	return fragment_recall(pkt) && !held.delete(&fresh->key) ? NEXT : NOT_OURS;
}

/* The first fragment comes in and is a service's: the later ones may go. It goes
 * before them, as those who have to translate them further on will want it.
 */
static __always_inline void fragment_call(struct __sk_buff *skb, const struct packet *pkt)
{
	struct held_value *piece;
	struct holding *wanted;
	__u32 zero = 0, index = skb->tc_index;

	fragment_remember(pkt);
	wanted = holding.lookup(&zero);
	if (!wanted)
		return;
	fragment_key_of(pkt, &wanted->key.datagram);
	wanted->key.slot = 0;
	piece = held.lookup(&wanted->key);
	if (!piece || !is_same_datagram(piece->seen_s, now_s()))
		return;
	skb->tc_index = CARRIER;
	bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
	skb->tc_index = index;
}

/* A carrier: turn it into the last piece held, after sending another one round for
 * those before. Whoever deletes a piece has it: it was there until then, whole, and
 * nobody else sends it.
 */
static __always_inline int fragment_release(struct __sk_buff *skb, const struct packet *pkt)
{
	struct held_value *piece, *last = NULL;
	struct holding *wanted;
	__u32 zero = 0, now = now_s();
	__u64 bytes;
	int i;

	wanted = holding.lookup(&zero);
	if (!wanted)
		return TC_ACT_SHOT;
	fragment_key_of(pkt, &wanted->key.datagram);
	wanted->key.slot = 0;
#pragma unroll
	for (i = 0; i < HELD_SLOTS; i++) {
		piece = held.lookup(&wanted->key);
		if (!piece || !is_same_datagram(piece->seen_s, now))
			break;
		last = piece;
		wanted->key.slot++;
	}
	if (!last)
		return TC_ACT_SHOT;
	wanted->key.slot--;
	if (wanted->key.slot)
		bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
	bytes = last->length_bytes;
	if (!is_holdable(&bytes) || bpf_skb_change_tail(skb, pkt->l3 + bytes, 0) ||
	    bpf_skb_store_bytes(skb, pkt->l3, last->packet, bytes, BPF_F_RECOMPUTE_CSUM) ||
	    held.delete(&wanted->key))
		return TC_ACT_SHOT;
	skb->tc_index = RELEASED;
	return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

/* A fragment comes in. NEXT once it has its ports, else the verdict. */
static __always_inline int fragment_in(struct __sk_buff *skb, struct packet *pkt)
{
	if (pkt->fragment == FRAGMENT_FIRST)
		return skb->tc_index == CARRIER ? fragment_release(skb, pkt) : NEXT;
	return fragment_recall(pkt) ? NEXT : fragment_hold(skb, pkt);
}
