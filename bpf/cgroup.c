/* SPDX-License-Identifier: GPL-2.0-only */

/* Programs on sockets: a destination is translated when a process names it, so
 * no packet of the connection needs translating.
 */
#include "lib/config.h"
#include "lib/types.h"
#include "lib/maps.h"
#include "lib/addr.h"
#include "lib/count.h"
#include "lib/packet.h"
#include "lib/select.h"
#include "lib/flow.h"
#include "lib/event.h"
#include "lib/socket.h"

int connect(struct bpf_sock_addr *ctx)
{
	return socket_call(ctx, true, false);
}

int sendmsg(struct bpf_sock_addr *ctx)
{
	return socket_call(ctx, false, false);
}

int recvmsg(struct bpf_sock_addr *ctx)
{
	return socket_peer(ctx, false);
}

int getpeername(struct bpf_sock_addr *ctx)
{
	return socket_peer(ctx, false);
}

#if IP_FAMILY == 4
/* IPv6 sockets that speak IPv4: attached where IPv6 sockets are, beside the
 * IPv6 unit's programs.
 */
int connect_mapped(struct bpf_sock_addr *ctx)
{
	return is_mapped(ctx) ? socket_call(ctx, true, true) : SOCKET_ALLOW;
}

int sendmsg_mapped(struct bpf_sock_addr *ctx)
{
	return is_mapped(ctx) ? socket_call(ctx, false, true) : SOCKET_ALLOW;
}

int recvmsg_mapped(struct bpf_sock_addr *ctx)
{
	return is_mapped(ctx) ? socket_peer(ctx, true) : SOCKET_ALLOW;
}

int getpeername_mapped(struct bpf_sock_addr *ctx)
{
	return is_mapped(ctx) ? socket_peer(ctx, true) : SOCKET_ALLOW;
}
#endif
