"""The vm ring: other kernels than this machine's, in emulated machines on its own root file system.

`python -m tests.vm` is its command; `make vm` runs it whole.
"""
