"""Whether this node and its services can take traffic, for load balancers and kubelets."""
