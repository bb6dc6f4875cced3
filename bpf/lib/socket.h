/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Translation at the socket: the destination a process names becomes a
 * backend, and what the process is later told about its peer becomes the
 * frontend again.
 */
#include "event.h"
#include "flow.h"
#include "select.h"

#define SOCKET_ALLOW 1
#define SOCKET_DENY 0

#define MAPPED_WORD 0x0000ffff	/* third word of ::ffff:0:0/96, host order */

static __always_inline bool is_mapped(const struct bpf_sock_addr *ctx)
{
	return !ctx->user_ip6[0] && !ctx->user_ip6[1] &&
	       ctx->user_ip6[2] == bpf_htonl(MAPPED_WORD);
}

/* The address the hook is about. mapped: an IPv4 address in an IPv6 one. */
static __always_inline void socket_address(struct bpf_sock_addr *ctx, struct l4_addr *at,
					   bool mapped)
{
#if IP_FAMILY == 4
	at->addr.word[0] = mapped ? ctx->user_ip6[3] : ctx->user_ip4;
#else
	at->addr.word[0] = ctx->user_ip6[0];
	at->addr.word[1] = ctx->user_ip6[1];
	at->addr.word[2] = ctx->user_ip6[2];
	at->addr.word[3] = ctx->user_ip6[3];
#endif
	at->port = ctx->user_port;
	at->proto = ctx->protocol;
}

static __always_inline void set_socket_address(struct bpf_sock_addr *ctx, const struct l4_addr *at,
					       bool mapped)
{
#if IP_FAMILY == 4
	if (mapped)
		ctx->user_ip6[3] = at->addr.word[0];
	else
		ctx->user_ip4 = at->addr.word[0];
#else
	ctx->user_ip6[0] = at->addr.word[0];
	ctx->user_ip6[1] = at->addr.word[1];
	ctx->user_ip6[2] = at->addr.word[2];
	ctx->user_ip6[3] = at->addr.word[3];
#endif
	ctx->user_port = at->port;
}

static __always_inline int socket_refuse(void)
{
#if HAVE_SET_RETVAL
	bpf_set_retval(-ECONNREFUSED);
#endif
	return SOCKET_DENY;
}

/* All of 127.0.0.0/8 is this host; frontends know its first address. */
static __always_inline void fold_loopback(struct l4_addr *at)
{
#if IP_FAMILY == 4
	if (addr_is_loopback(&at->addr))
		at->addr.word[0] = bpf_htonl(0x7f000001);
#endif
}

/* Is it the hook that translates, or tc? Of pods the hook takes what needs
 * neither their address (affinity is by client address, P13; source ranges) nor
 * a masquerade, which no socket can do (P6); the rest of their packets meets
 * pod_ingress. Host processes pass no ingress hook, so theirs is all ours.
 * What a pod sends to the number of a node port may be its answer to a process of
 * the node (B9): pod_ingress knows.
 */
static __always_inline bool hook_translates(const struct frontend_value *frontend,
					    const struct l4_addr *to, __u32 source,
					    bool connecting)
{
	if (frontend->flags & FRONTEND_DRAINING)
		return false;
	if (source == SOURCE_NODE)
		return true;
	if (!SOCKET_LB_PODS || addr_is_loopback(&to->addr))
		return false;
	if (!connecting &&
	    (frontend->flags >> FRONTEND_KIND_SHIFT & FRONTEND_KIND_MASK) == KIND_NODE_PORT)
		return false;
	return !frontend->affinity_s && !(frontend->flags & FRONTEND_SOURCE_RANGES) &&
	       !(frontend->flags & (SOURCE_POD << MASQUERADE_SHIFT));
}

/* The backend this socket already has for a frontend, while it serves. */
static __always_inline struct socket_entry *socket_flow(struct socket_value *socket,
							 const struct l4_addr *frontend)
{
	int i;

#pragma unroll
	for (i = 0; i < SOCKET_ENTRIES; i++) {
		struct socket_entry *entry = &socket->entry[i];
		struct backend_value *backend;
		__u32 id = entry->backend_id;

		if (id == NO_BACKEND || !l4_addr_equal(&entry->frontend, frontend))
			continue;
		backend = backends.lookup(&id);
		return backend && (backend->flags & BACKEND_SERVING) &&
		       l4_addr_equal(&backend->at, &entry->backend) ? entry : NULL;
	}
	return NULL;
}

static __always_inline void socket_remember(struct socket_value *socket,
					    const struct l4_addr *frontend,
					    const struct backend_value *backend, __u32 id)
{
	__u32 at = socket->next;
	int i;

	/* A frontend has one entry; a new one takes the oldest place. */
#pragma unroll
	for (i = 0; i < SOCKET_ENTRIES; i++)
		if (l4_addr_equal(&socket->entry[i].frontend, frontend))
			at = i;
	if (at == socket->next)
		socket->next = (at + 1) % SOCKET_ENTRIES;
#pragma unroll
	for (i = 0; i < SOCKET_ENTRIES; i++) {
		if (i != at)
			continue;
		socket->entry[i].frontend = *frontend;
		socket->entry[i].backend = backend->at;
		socket->entry[i].backend_id = id;
	}
}

/* connect(2) and sendmsg(2) with an address. */
static __always_inline int socket_call(struct bpf_sock_addr *ctx, bool connecting, bool mapped)
{
	__u32 zero = 0, id, source, now;
	struct settings_value *run = settings.lookup(&zero);
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct frontend_value *frontend;
	struct backend_value *backend;
	struct socket_value *socket;
	__u8 reason = DROP_NO_LOCAL_ENDPOINT;
	bool barred;
	struct l4_addr to = {};
	struct bpf_sock *sk;
	struct list list;

	socket_address(ctx, &to, mapped);
	if (to.proto != IPPROTO_TCP && to.proto != IPPROTO_UDP)
		return SOCKET_ALLOW;
	fold_loopback(&to);
	frontend = frontends.lookup(&to);
	if (!frontend || !run)
		return SOCKET_ALLOW;
	source = netns == run->host_netns ? SOURCE_NODE : SOURCE_POD;
	if (!hook_translates(frontend, &to, source, connecting))
		return SOCKET_ALLOW;
	/* P10. The host's socket has no address yet; but a set that has the node's
	 * lets the VIP itself in, too. Pods' sockets are left to tc.
	 */
	barred = (frontend->flags & FRONTEND_SOURCE_RANGES) &&
		 !source_allowed(&to.addr, frontend->ranges);
	if (!barred && (frontend->flags & FRONTEND_REJECT)) {
		count_drop(DROP_NO_ENDPOINT);
		tell_socket(netns, &to, NULL, DROP_NO_ENDPOINT, now_s());
		return socket_refuse();
	}

	sk = ctx->sk;
	socket = sk ? sockets.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE) : NULL;
	if (socket && !connecting) {
		struct socket_entry *entry = socket_flow(socket, &to);

		if (entry) {
			set_socket_address(ctx, &entry->backend, mapped);
			return SOCKET_ALLOW;
		}
	}
	list = list_for(frontend, source);
	now = now_s();
	if (barred) {
		id = NO_BACKEND;
		reason = DROP_SOURCE_RANGE;
	} else {
		struct affinity_key client = { .client[0] = netns, .by_netns = 1 };

		/* No packet, no hash: any entry of a Maglev table is as good as another. */
		id = choose(frontend, &list, &client, bpf_get_prandom_u32(), now);
	}
	backend = backends.lookup(&id);
	if (id == NO_BACKEND || !backend) {
		struct l4_addr nowhere = { .addr = discard_address, .port = to.port };

		/* A pod's packets are dropped by tc; the host's go where the
		 * egress hook drops them, for a hook cannot be silent (P3).
		 */
		if (source == SOURCE_NODE) {
			set_socket_address(ctx, &nowhere, mapped);
			tell_socket(netns, &to, NULL, reason, now);
		}
		return SOCKET_ALLOW;
	}
	if (socket)
		socket_remember(socket, &to, backend, id);
	if (connecting && to.proto == IPPROTO_UDP) {
		struct udp_socket_value given = { .backend_id = id, .family = IP_FAMILY };
		__u64 cookie = bpf_get_socket_cookie(ctx);

		/* Such a socket never asks again: the agent ends it when its
		 * backend goes.
		 */
		udp_sockets.update(&cookie, &given);
	}
	count_connection(frontend->service);
	tell_socket(netns, &to, &backend->at, 0, now);
	set_socket_address(ctx, &backend->at, mapped);
	return SOCKET_ALLOW;
}

/* recvmsg(2) and getpeername(2): the backend a process is about to be told of
 * is the frontend it called.
 */
static __always_inline int socket_peer(struct bpf_sock_addr *ctx, bool mapped)
{
	struct socket_value *socket;
	struct l4_addr from = {};
	struct bpf_sock *sk;
	int i;

	sk = ctx->sk;
	socket = sk ? sockets.sk_storage_get(sk, 0, 0) : NULL;
	if (!socket)
		return SOCKET_ALLOW;
	socket_address(ctx, &from, mapped);
#pragma unroll
	for (i = 0; i < SOCKET_ENTRIES; i++) {
		if (socket->entry[i].backend_id == NO_BACKEND ||
		    !l4_addr_equal(&socket->entry[i].backend, &from))
			continue;
		set_socket_address(ctx, &socket->entry[i].frontend, mapped);
		break;
	}
	return SOCKET_ALLOW;
}
