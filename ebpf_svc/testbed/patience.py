"""How much slower than a real machine this one is: what the testbed waits for may take that longer.

An emulated machine sets EBPF_SVC_PATIENCE. Silence is not stretched: what must not come is awaited
no longer.
"""

import os

PATIENCE = float(os.environ.get("EBPF_SVC_PATIENCE", "1"))

CROWD = 10_000 if PATIENCE <= 1 else 24
"""How many requests are made at the same time: a slow machine would only measure its own crowd."""
