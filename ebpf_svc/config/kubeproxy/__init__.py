"""Kube-proxy's configuration, file and flags, and what becomes of it here.

Imported only when there is some: its models cost an agent without it nothing.
"""
