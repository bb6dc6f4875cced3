"""The iptables dataplane: kube-proxy's chains, written a service port at a time."""
