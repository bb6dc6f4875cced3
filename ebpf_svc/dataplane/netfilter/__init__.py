"""What the dataplanes that stand on netfilter share: names, what a pod is, stale flows."""
