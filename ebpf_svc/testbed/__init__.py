"""A cluster of network namespaces, shared by demo, tests and benchmarks."""
