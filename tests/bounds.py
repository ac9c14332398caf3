"""Bounds that damaged input may not break: seconds, and memory over what the process holds already.

Seconds are those of the processor, so that a busy machine breaks none. What waits for ever needs none of them: it is
given a time that no machine is slow enough to need.
"""

from __future__ import annotations

import resource
import signal
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def bounded(seconds: float = 30.0, gib: float = 3.0):
    """Whatever runs inside fails with an AssertionError when it takes longer, with a MemoryError when it asks for
    more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = {number: signal.signal(number, _too_late) for number in (signal.SIGPROF, signal.SIGALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (held + int(gib * 2**30), hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 20 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in before.items():
            signal.signal(number, handler)


def _too_late(_signal, _frame):
    raise AssertionError("hangs: took longer than the bound")
