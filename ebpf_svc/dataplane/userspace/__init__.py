"""Sockets of the agent relay, for kernels and operators without any of the other modes (U1-U8)."""
