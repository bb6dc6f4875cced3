"""The values that flow through the agent: frozen, hashable, without I/O."""
