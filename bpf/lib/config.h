/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Numbers come from Python (constants.py) as -D; a source compiled without
 * them must not compile with guesses.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/errno.h>
#include <uapi/linux/icmp.h>
#include <uapi/linux/icmpv6.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/if_packet.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/pkt_cls.h>

#if !defined(IP_FAMILY) || (IP_FAMILY != 4 && IP_FAMILY != 6)
#error "IP_FAMILY must be 4 or 6"
#endif
#if !defined(FRONTEND_REJECT) || !defined(FRONTEND_MAGLEV) || \
	!defined(FRONTEND_SOURCE_RANGES) || !defined(FRONTEND_DRAINING) || \
	!defined(MASQUERADE_SHIFT) || !defined(SOURCE_POD) || \
	!defined(SOURCE_NODE) || !defined(SOURCE_EXTERNAL) || \
	!defined(FRONTEND_KIND_SHIFT) || !defined(FRONTEND_KIND_MASK) || \
	!defined(KIND_NODE_PORT)
#error "frontend flags are missing: compile through ebpf_svc"
#endif
#if !defined(BACKEND_SERVING) || !defined(BACKEND_IN_CLUSTER) || \
	!defined(BACKEND_IN_LOCAL) || !defined(NO_BACKEND) || \
	!defined(BACKEND_CHAIN_MAX)
#error "backend flags are missing: compile through ebpf_svc"
#endif
#if !defined(FLOW_HAIRPIN) || !defined(FLOW_MASQUERADE) || \
	!defined(FLOW_FAST) || !defined(FLOW_SNAT) || !defined(FLOW_PORT) || \
	!defined(STATE_CLIENT_FIN) || !defined(STATE_BACKEND_FIN) || \
	!defined(STATE_RESET) || !defined(STATE_ESTABLISHED) || \
	!defined(UDP_IDLE_S) || !defined(SYN_IDLE_S) || !defined(TCP_IDLE_S) || \
	!defined(DIRECT_NOTES) || !defined(DIRECT_SERVICE) || !defined(DIRECT_LEASE) || \
	!defined(NAT_TRIES) || !defined(BESIDE_TRIES)
#error "flow flags are missing: compile through ebpf_svc"
#endif
#if !defined(EVENT_OPENED) || !defined(EVENT_ENDING) || !defined(EVENT_DROPPED)
#error "kinds of events are missing: compile through ebpf_svc"
#endif
#if !defined(HAIRPIN_ADDRESS) || !defined(DISCARD_ADDRESS) || \
	!defined(MASQUERADE_MARK) || !defined(SOCKET_ENTRIES) || \
	!defined(DROP_REASONS) || !defined(CSUM_FAMILY_FLAG) || \
	!defined(SOCKET_LB_PODS) || !defined(HAVE_SET_RETVAL) || \
	!defined(HAVE_COARSE_CLOCK) || !defined(HAVE_PEER_SCRUB) || \
	!defined(HOST_PACKETS) || !defined(NO_LINK) || !defined(LINK_TUNNEL) || !defined(FLOW_HOST) || \
	!defined(FAST_PATH) || !defined(XDP) || !defined(LINK_PEER) || \
	!defined(LINK_DRIVER) || \
	!defined(NAT_PORT_FIRST) || !defined(NAT_PORT_COUNT) || \
	!defined(HELD_BYTES) || !defined(HELD_SLOTS) || !defined(FRAGMENT_S)
#error "settings of this node are missing: compile through ebpf_svc"
#endif
