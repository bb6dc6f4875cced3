"""Taking kube-proxy's place on a running node, and giving it back."""
