/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* What the maps hold. Written by the agent, which derives its layouts from the
 * compiled types; raise LAYOUT_VERSION with every change.
 *
 * __be fields are in wire order, plain ones in host order. No bit-fields, no
 * implicit padding.
 */

#if IP_FAMILY == 4
#define ADDR_WORDS 1
#else
#define ADDR_WORDS 4
#endif

struct addr {
	__be32 word[ADDR_WORDS];
};

/* An address a client can call or a backend can answer from. */
struct l4_addr {
	struct addr addr;
	__be16 port;
	__u8   proto;		/* IPPROTO_* */
	__u8   pad;
};

/* What to do with packets to a frontend. The slot ranges are what makes an
 * update atomic: new slots are written first, then this one value points at
 * them.
 */
struct frontend_value {
	__u32 service;		/* id of the service port: flows, affinity */
	__u32 flags;		/* Sources | Sources << MASQUERADE_SHIFT | FRONTEND_* */
	__u32 cluster_first;	/* slots of the Cluster list */
	__u32 cluster_count;
	__u32 local_first;	/* slots of the Local list */
	__u32 local_count;
	__u32 affinity_s;	/* 0: none */
	__u32 ranges;		/* id of its set of source ranges, 0: none */
};

/* One endpoint of one service port: an endpoint behind two service ports is
 * two backends, because serving and list membership are per service port.
 */
struct backend_value {
	struct l4_addr at;
	__u32 service;
	__u32 next;		/* next backend with the same l4_addr, or NO_BACKEND */
	__u32 flags;		/* BACKEND_* */
};

/* A flow is (client, service port): both directions find the one entry, the
 * request by its frontend's service id, the reply by its backend's.
 */
struct flow_key {
	struct addr client;
	__u32  service;
	__be16 client_port;
	__u8   proto;
	__u8   second;		/* 1: the client uses this port to two frontends of the service */
};

struct flow_value {
	struct l4_addr frontend;
	struct l4_addr backend;
	__u32 addr_diff;	/* checksum differences of the request's rewrite; */
	__u32 port_diff;	/* the reply's are their complements */
	__u32 backend_id;
	__u32 seen_s;		/* coarse monotonic clock */
	__u8  state;		/* STATE_* */
	__u8  flags;		/* FLOW_* */
	__be16 nat_port;	/* the client's port as the backend sees it, of a */
	struct addr nat;	/* FLOW_SNAT or FLOW_PORT; its address, of a FLOW_SNAT */
	__u32 client_link;	/* FLOW_FAST: devices whose other ends are the client */
	__u32 backend_link;	/* and the backend; 0: unknown, or reached by a route */
};

/* A flow as its backend knows it, for those that no walk from the backend finds:
 * clients seen under another port (FLOW_SNAT, FLOW_PORT), and endpoints of more
 * service ports than a walk goes through.
 */
struct reverse_key {
	struct l4_addr backend;
	struct addr client;
	__be16 port;
	__u16 pad;
};

/* Somebody calls an endpoint itself (direct.h). */
struct direct_note {
	__u32 ends;		/* hash of client, port and endpoint */
	__u32 seen_s;		/* 0: it is over */
};

/* A flow while it is being opened: the stack has no room for it. */
struct opening {
	struct flow_value flow;
	struct reverse_key ends;
	__u32 hash;		/* of the ends, and the slot of their note */
	__u32 slot;
	__u32 taken;		/* the client's port is, at the endpoint, by a live flow */
};

/* A device the fast path may send through. */
struct link_value {
	__u32 kind;		/* LINK_* */
	struct addr addr;	/* the node's, towards what is behind it; 0: none */
};

/* Who stays with a backend: an address on the packet path, a network namespace
 * at the socket hooks, where the source address is not chosen yet.
 */
struct affinity_key {
	__u64 client[2];
	__u32 service;
	__u32 by_netns;
};

struct affinity_value {
	__u32 backend_id;
	__u32 seen_s;
};

/* Sources that may connect (P10). A set never changes: frontends are pointed at
 * another one. Sets differ between the addresses of one service, as each lets
 * its own address in.
 */
struct range_key {
	__u32 prefix_bits;	/* counts the set's word too: 32 + prefix length */
	__u32 ranges;		/* frontend_value.ranges */
	struct addr addr;
};

/* Where the later fragments of a datagram find their ports. */
struct fragment_key {
	struct addr src;
	struct addr dst;
	__u32 id;
	__u32 proto;
};

struct fragment_value {
	__be16 sport;
	__be16 dport;
	__u32  seen_s;
};

/* A later fragment that came before the first one. The pieces of a datagram are in
 * slots from 0 on.
 */
struct held_key {
	struct fragment_key datagram;
	__u32 slot;
};

/* Its copy, from the IP header on. */
struct held_value {
	__u32 seen_s;
	__u32 length_bytes;
	__u8  packet[HELD_BYTES];
};

/* One while it is copied: the stack has no room for it. */
struct holding {
	struct held_key key;
	struct held_value value;
};

/* What the socket hooks rewrote for one socket, so that recvmsg and
 * getpeername can undo it and a UDP flow keeps its backend.
 */
struct socket_entry {
	struct l4_addr frontend;
	struct l4_addr backend;
	__u32 backend_id;
};

struct socket_value {
	struct socket_entry entry[SOCKET_ENTRIES];
	__u32 next;		/* the entry to replace */
};

/* The backend a connected UDP socket was given. */
struct udp_socket_value {
	__u32 backend_id;
	__u32 family;		/* IP_FAMILY: each has ids of its own */
};

/* What a service port got, each CPU for itself; both directions. */
struct service_counters {
	__u64 connections;
	__u64 packets;
	__u64 bytes;
};

/* Something that happened to a flow, for whoever listens. */
struct event {
	__u64 time_ns;
	__u64 netns;		/* cookie of the socket's network namespace; 0: it was a packet */
	struct l4_addr client;	/* unknown, zero, at a socket */
	struct l4_addr frontend;
	struct l4_addr backend;	/* zero when there is none */
	__u32 ifindex;		/* where the packet came by or leaves */
	__u8  kind;		/* EVENT_* */
	__u8  detail;		/* DROP_* of EVENT_DROPPED, the new STATE_* of EVENT_ENDING */
	__u8  state;		/* STATE_* of the flow */
	__u8  flags;		/* FLOW_* */
#if IP_FAMILY == 6
	__u32 pad;
#endif
};

/* Whether anybody listens: a lease, so that one who is killed stops costing. */
struct monitor_value {
	__u32 until_s;		/* coarse monotonic clock */
	__u32 pad;
	__u64 lost;		/* events the ring had no room for */
};

/* Facts of this run that are not worth a compile. */
struct settings_value {
	__u64 host_netns;	/* netns cookie of the node */
	__u32 hash_seed;
	__u32 pad;
};
