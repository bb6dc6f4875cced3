/* SPDX-License-Identifier: GPL-2.0-only */

/* Programs on network devices. Destinations are translated where a packet
 * enters, sources where it leaves: netfilter in between then sees both
 * directions of a flow with the same addresses.
 */
#include "lib/config.h"
#include "lib/types.h"
#include "lib/maps.h"
#include "lib/addr.h"
#include "lib/count.h"
#include "lib/packet.h"
#include "lib/fragment.h"
#include "lib/select.h"
#include "lib/flow.h"
#include "lib/event.h"
#include "lib/nat.h"
#include "lib/refuse.h"
#include "lib/icmp.h"
#include "lib/request.h"
#include "lib/leave.h"

/* From a pod: the host side of its interface. */
int pod_ingress(struct __sk_buff *skb)
{
	return request(skb, ETH_HLEN, true);
}

/* From other machines. */
int node_ingress(struct __sk_buff *skb)
{
	return request(skb, ETH_HLEN, false);
}

/* The same on devices without an Ethernet header: IP tunnels, WireGuard. */
int node_ingress_l3(struct __sk_buff *skb)
{
	return request(skb, 0, false);
}

/* To a pod or to other machines. */
int egress(struct __sk_buff *skb)
{
	return leave(skb, ETH_HLEN);
}

int egress_l3(struct __sk_buff *skb)
{
	return leave(skb, 0);
}
