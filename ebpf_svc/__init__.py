"""ebpf-svc: a Kubernetes Service dataplane in eBPF, a drop-in for kube-proxy under any CNI."""

__version__ = "0.1.0"
