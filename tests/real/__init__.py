"""Beside the real thing: a kube-apiserver and a kube-proxy that `scripts/kubernetes` built."""
