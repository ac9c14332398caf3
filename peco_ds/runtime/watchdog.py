"""End a rank that hangs: after too long without a step, whatever blocks the main thread, with all stacks on disk."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peco_ds.errors import EXIT_INTERRUPTED

# The limit before the first step (start, conversion, compilation), and for saves and evaluation.
LONG_S = 3600.0

# The report may hang on the very file system that the run hangs on; the end of the process must not wait for it.
REPORT_S = 20.0


class Watchdog:
    """A thread of this process that checks that `beat` is called often enough.

    The thread counts the time it has itself waited: a wait that took far longer than asked for counts as a short one.
    So a process that was stopped (SIGSTOP, a debugger, a laptop that slept) continues, although every clock ran on.
    The thread needs Python's interpreter lock, which torch releases while it waits for a device or for other ranks.

    As a context manager it is closed at the end. Until the first beat the limit is LONG_S, or `timeout_s` if that is
    longer.

    Args:
        timeout_s: longest time between two beats; 0 watches nothing.
        dump_to: file that the stacks are appended to; made when needed.
        rank: for the messages.  on_hang: called with EXIT_INTERRUPTED when the stacks are written.
    """

    def __init__(
        self, timeout_s: float, dump_to: Path, *, rank: int = 0, on_hang: Callable[[int], object] = os._exit
    ) -> None:
        assert timeout_s >= 0, timeout_s
        self._dump_to, self._rank, self._on_hang = Path(dump_to), rank, on_hang
        # Phases with their limits, the innermost one last.
        self._limits: list[tuple[str, float]] = [("start", max(timeout_s, LONG_S))]
        self._timeout_s = timeout_s
        self._beats = self._step = 0
        self._closed = threading.Event()
        if timeout_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """The run is alive and at optimiser step `step`. Costs a few assignments."""
        self._limits[0] = ("training", self._timeout_s)
        self._step = step
        self._beats += 1

    @contextmanager
    def during(self, phase: str, timeout_s: float) -> Iterator[None]:
        """A phase with a limit of its own, in seconds, in place of the usual one: an evaluation, a save, a first step
        that compiles. 0: no limit.

        The time starts again at the phase's begin, at a beat inside it, and at its end.
        """
        self._limits.append((phase, timeout_s))
        self._beats += 1
        try:
            yield
        finally:
            self._beats += 1
            self._limits.pop()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_error) -> None:
        self.close()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _watch(self) -> None:
        # On Linux and macOS this clock stands still while the machine sleeps.
        before = time.monotonic()
        idle_s, seen = 0.0, self._beats
        while True:
            wait_s = min(1.0, self._timeout_s / 10)
            if self._closed.wait(wait_s):
                return
            now = time.monotonic()
            phase, limit_s = self._limits[-1]
            idle_s, before = idle_s + min(now - before, 3 * wait_s), now
            if self._beats != seen:
                idle_s, seen = 0.0, self._beats
            elif limit_s and idle_s > limit_s:
                self._end(phase, idle_s)
                return

    def _end(self, phase: str, idle_s: float) -> None:
        report = threading.Thread(target=self._report, args=(phase, idle_s), name="watchdog report", daemon=True)
        report.start()
        report.join(REPORT_S)
        self._on_hang(EXIT_INTERRUPTED)

    def _report(self, phase: str, idle_s: float) -> None:
        what = f"rank {self._rank}: nothing has moved for {idle_s:.0f} s in {phase} after step {self._step}"
        sys.stderr.write(
            f"error: {what}; stacks of all threads in {self._dump_to}; the newest checkpoint stands, "
            "start again to go on\n"
        )
        sys.stderr.flush()
        try:
            self._dump_to.parent.mkdir(parents=True, exist_ok=True)
            with open(self._dump_to, "a") as file:
                file.write(f"\n==== {time.strftime('%Y-%m-%dT%H:%M:%S%z')} pid {os.getpid()} {what}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
