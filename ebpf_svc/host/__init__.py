"""The edges of the kernel: netlink, bpf(2), sysctl, commands, sockets."""
