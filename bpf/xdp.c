/* SPDX-License-Identifier: GPL-2.0-only */

/* The program of a NIC's driver: forwards packets of services between other
 * machines before the kernel has made a buffer of them.
 */
#include "lib/config.h"
#include "lib/types.h"
#include "lib/maps.h"
#include "lib/addr.h"
#include "lib/count.h"
#include "lib/packet.h"
#include "lib/flow.h"
#include "lib/nat.h"
#include "lib/route.h"
#include "lib/xdp.h"

#if XDP
/* A device has one program: IPv4's, which calls IPv6's where both are served. */
int xdp(struct xdp_md *ctx)
{
#if IP_FAMILY == 4
	struct ethhdr *eth = (void *)(long)ctx->data;

	if ((void *)(eth + 1) <= (void *)(long)ctx->data_end &&
	    eth->h_proto == bpf_htons(ETH_P_IPV6))
		xdp_next.call(ctx, 0);
#endif
	return xdp_forward(ctx);
}
#endif
