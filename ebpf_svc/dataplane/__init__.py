"""Backends that carry a DesiredState; they do not know each other."""
