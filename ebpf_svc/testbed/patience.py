"""How much slower than a real machine this one is: what the testbed waits for may take that longer.

An emulated machine sets EBPF_SVC_PATIENCE. What a test measures or lets pass is not stretched.
"""

import os

PATIENCE = float(os.environ.get("EBPF_SVC_PATIENCE", "1"))
