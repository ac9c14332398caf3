"""Work in a child process that is killed at a chosen operation on files."""

import os
import signal
import sys
from collections.abc import Callable

FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "fcntl.flock")


def forked(work: Callable[[], object], kill_at: int = 0) -> int:
    """Run `work()` in a child that is killed right before its n-th operation on files (0: never).

    Returns: its wait status.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    done = 0

    def count(event: str, _arguments) -> None:
        nonlocal done
        if event in FILE_OPERATIONS:
            done += 1
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)
