/* SPDX-License-Identifier: GPL-2.0-only */
#pragma once

/* Every map. Sizes here are placeholders: the compiler process creates these
 * only to resolve names, the agent creates the real ones (tables.py says how
 * large) and pins them.
 */
BPF_TABLE("hash", struct l4_addr, struct frontend_value, frontends, 1);
BPF_F_TABLE("array", __u32, __u32, slots, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", __u32, struct backend_value, backends, 1, BPF_F_MMAPABLE);
BPF_TABLE("hash", struct l4_addr, __u32, backend_index, 1);
BPF_TABLE("lru_hash", struct flow_key, struct flow_value, flows, 1);
BPF_TABLE("lru_hash", struct affinity_key, struct affinity_value, affinity, 1);
BPF_F_TABLE("lpm_trie", struct range_key, __u32, source_ranges, 1, BPF_F_NO_PREALLOC);
BPF_TABLE("lru_hash", struct fragment_key, struct fragment_value, fragments, 1);
BPF_TABLE("lru_hash", struct held_key, struct held_value, held, 1);
BPF_TABLE("percpu_array", __u32, struct holding, holding, 1);
BPF_TABLE("lru_hash", __u64, struct udp_socket_value, udp_sockets, 1);
BPF_TABLE("lru_hash", struct reverse_key, struct flow_key, reverse, 1);
BPF_F_TABLE("array", __u32, struct direct_note, direct, 1, BPF_F_MMAPABLE);
BPF_TABLE("hash", __u32, struct link_value, links, 1);
BPF_PROG_ARRAY(xdp_next, 1);
BPF_TABLE("percpu_array", __u32, struct opening, openings, 1);
BPF_TABLE("percpu_array", __u32, struct service_counters, service_counters, 1);
BPF_TABLE("array", __u32, struct settings_value, settings, 1);
BPF_TABLE("percpu_array", __u32, __u64, drops, DROP_REASONS);
BPF_F_TABLE("array", __u32, struct monitor_value, monitor, 1, BPF_F_MMAPABLE);

/* A socket storage. The kernel makes one only of a type described by debug
 * information, which is slow to compile: to the compiler this is a hash
 * (compiler.py, STAND_INS).
 */
struct sockets_table_t {
	int key;
	struct socket_value leaf;
	void *(*sk_storage_get)(void *, void *, int);
	u32 max_entries;
	u32 flags;
};
__attribute__((section("maps/hash"))) struct sockets_table_t sockets = {
	.max_entries = 1,
	.flags = BPF_F_NO_PREALLOC,
};

/* BCC's own ring buffers do not say what they carry. */
struct events_table_t {
	int key;
	struct event leaf;
	int (*ringbuf_output)(void *, u64, u64);
	void *(*ringbuf_reserve)(u64);
	void (*ringbuf_discard)(void *, u64);
	void (*ringbuf_submit)(void *, u64);
	u32 max_entries;
};
__attribute__((section("maps/ringbuf"))) struct events_table_t events = { .max_entries = 4096 };
