"""Limits that hold whatever hangs: of a part, of the whole run, of the processes that it started.

Nothing here needs more than Python's own library.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Where the time of a part is up inside a clean-up that swallows what is raised, it is raised again so much later.
AGAIN_S = 10.0
# Between the deadline and the end by force, which needs neither a thread of Python nor its lock.
LAST_WORDS_S = 5.0


class CutOff(BaseException):
    """The time of a part is up. No Exception, so that a part's own guards let it pass."""


@contextlib.contextmanager
def budget(seconds: float) -> Iterator[None]:
    """Raise CutOff in the main thread after so long; code that never returns to Python is the Deadline's."""

    def cut_off(*_) -> None:
        raise CutOff

    before = signal.signal(signal.SIGALRM, cut_off)
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    begun = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left_s:
            # somebody else's timer goes on
            signal.setitimer(signal.ITIMER_REAL, max(0.01, left_s - (time.monotonic() - begun)))


class Deadline:
    """Ends the process at a moment, whatever its main thread does.

    Args:
        seconds: from now.
        last: what to do before; gives the exit code.
        log: file that is told where each thread stood, if even `last` hangs.
    """

    def __init__(self, seconds: float, last: Callable[[], int], log: Path) -> None:
        self.ends = time.monotonic() + seconds
        self._last, self._over = last, threading.Event()
        self._log = open(log, "w")
        faulthandler.dump_traceback_later(seconds + LAST_WORDS_S, exit=True, file=self._log)
        threading.Thread(target=self._wait, daemon=True, name="deadline").start()

    def left_s(self) -> float:
        return self.ends - time.monotonic()

    def cancel(self) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        self._log.close()

    def _wait(self) -> None:
        if not self._over.wait(max(0.0, self.left_s())):
            code = 1
            try:
                code = self._last()
            finally:
                os._exit(code)


class Processes:
    """What was started beside this process; each has a session of its own, so that it ends with all its children."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen] = []

    def start(self, command: list, log: Path, env: dict[str, str] | None = None) -> subprocess.Popen:
        """Output goes to the end of the log."""
        words = [str(word) for word in command]
        with open(log, "ab") as file:
            process = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, start_new_session=True
            )
        self._started.append(process)
        return process

    def run(self, command: list, log: Path, timeout_s: float, env: dict[str, str] | None = None) -> int:
        """Its exit code. Raises: CutOff if it takes longer."""
        process = self.start(command, log, env)
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise CutOff from None
        finally:
            self.end(process)

    def end(self, process: subprocess.Popen) -> None:
        """Kill it and what it started, as far as they still run."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def end_all(self, *, children: bool = False) -> None:
        """Args: children: whatever else this process started, as far as it can be found out."""
        for process in self._started:
            self.end(process)
        self._started.clear()
        if children:
            with contextlib.suppress(Exception):
                import psutil

                for child in psutil.Process().children(recursive=True):
                    child.kill()


@contextlib.contextmanager
def words_to(log: Path) -> Iterator[None]:
    """Standard output and error of this process, of its libraries in C and of its children go to the end of a file."""
    kept = [os.dup(1), os.dup(2)]
    _flush()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        _flush()
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
