"""The eBPF backend."""
