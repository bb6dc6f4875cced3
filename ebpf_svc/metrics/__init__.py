"""What Prometheus collects: kube-proxy's metrics where they make sense, and ours."""
