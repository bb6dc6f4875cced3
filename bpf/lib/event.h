/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* What happens to flows, told to whoever listens. Asked only where a flow opens,
 * ends or is not forwarded: a packet of an established flow never comes here.
 */
#include "flow.h"

static __always_inline struct monitor_value *listener(__u32 now)
{
	__u32 zero = 0;
	struct monitor_value *value = monitor.lookup(&zero);

	return value && (__s32)(value->until_s - now) > 0 ? value : NULL;
}

/* An event with its ends filled in, to be finished and submitted; NULL when
 * nobody listens or the ring is full.
 */
static __always_inline struct event *event_of(__u8 kind, const struct l4_addr *client,
					      const struct l4_addr *frontend, __u32 now)
{
	struct monitor_value *value = listener(now);
	struct event *event;

	if (!value)
		return NULL;
	event = events.ringbuf_reserve(sizeof(*event));
	if (!event) {
		__sync_fetch_and_add(&value->lost, 1);
		return NULL;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->time_ns = bpf_ktime_get_ns();
	event->client = *client;
	event->frontend = *frontend;
	event->kind = kind;
	return event;
}

static __always_inline void tell_opened(const struct __sk_buff *skb, const struct packet *pkt,
					const struct flow_value *flow, __u32 now)
{
	struct l4_addr client = { .addr = pkt->src, .port = pkt->sport, .proto = pkt->proto };
	struct event *event = event_of(EVENT_OPENED, &client, &flow->frontend, now);

	if (!event)
		return;
	event->backend = flow->backend;
	event->ifindex = skb->ifindex;
	event->flags = flow->flags;
	events.ringbuf_submit(event, 0);
}

static __always_inline void tell_dropped(const struct __sk_buff *skb, const struct packet *pkt,
					 __u8 reason, __u32 now)
{
	struct l4_addr client = { .addr = pkt->src, .port = pkt->sport, .proto = pkt->proto };
	struct l4_addr to = { .addr = pkt->dst, .port = pkt->dport, .proto = pkt->proto };
	struct event *event = event_of(EVENT_DROPPED, &client, &to, now);

	if (!event)
		return;
	event->ifindex = skb->ifindex;
	event->detail = reason;
	events.ringbuf_submit(event, 0);
}

/* One side of a TCP flow has ended it. */
static __always_inline void tell_ending(const struct __sk_buff *skb, const struct flow_value *flow,
					const struct addr *client_addr, __be16 client_port,
					__u8 end, __u32 now)
{
	struct l4_addr client = {
		.addr = *client_addr,
		.port = client_port,
		.proto = flow->frontend.proto,
	};
	struct event *event = event_of(EVENT_ENDING, &client, &flow->frontend, now);

	if (!event)
		return;
	event->backend = flow->backend;
	event->ifindex = skb->ifindex;
	event->detail = end;
	event->state = flow->state;
	event->flags = flow->flags;
	events.ringbuf_submit(event, 0);
}

/* A socket was given a backend, or none and a DROP_ reason. */
static __always_inline void tell_socket(__u64 netns, const struct l4_addr *frontend,
					const struct l4_addr *backend, __u8 reason, __u32 now)
{
	struct l4_addr client = { .proto = frontend->proto };
	struct event *event = event_of(backend ? EVENT_OPENED : EVENT_DROPPED, &client, frontend,
				       now);

	if (!event)
		return;
	event->netns = netns;
	if (backend)
		event->backend = *backend;
	else
		event->detail = reason;
	events.ringbuf_submit(event, 0);
}
