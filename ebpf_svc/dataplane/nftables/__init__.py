"""The nftables dataplane: kube-proxy's tables, written over netlink (X1-X19)."""
