"""`python -m ebpf_svc.cli`, where the console script is not installed."""

from __future__ import annotations

from ebpf_svc.cli import main

main()
