"""The ipvs dataplane: virtual servers of the kernel, addresses on kube-ipvs0, a few rules."""
