"""What the process is made of, for whoever looks for a leak or a thread that hangs.

Served below /debug when `enable_profiling` says so: what a program holds is nobody else's business.
"""

from __future__ import annotations

import gc
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Mapping

from ebpf_svc.health.http import Handler, Request, Response, text_response

SHOWN = 100


def threads(_: Request) -> Response:
    """Where every thread stands."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        stack = "".join(traceback.format_stack(frame))
        parts.append(f"{names.get(ident, '?')} ({ident})\n{stack}")
    return text_response("\n".join(sorted(parts)))


def objects(_: Request) -> Response:
    """How many objects of which type there are, most first."""
    # Those set aside by gc.freeze are not listed: what grew since is.
    counts = Counter(type(each).__qualname__ for each in gc.get_objects())
    lines = (f"{count:>10} {name}" for name, count in counts.most_common(SHOWN))
    return text_response("\n".join((*lines, f"{gc.get_freeze_count():>10} (frozen)", "")))


PAGES: Mapping[str, Handler] = {"/debug/threads": threads, "/debug/objects": objects}
