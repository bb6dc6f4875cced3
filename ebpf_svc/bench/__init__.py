"""Measurements of this program on the machine at hand."""
