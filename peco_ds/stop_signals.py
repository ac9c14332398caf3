"""The signals that ask a run to stop in good order, and what a process does about them."""

from __future__ import annotations

import signal
from collections.abc import Callable

# Slurm's warning, the usual request to end, Ctrl-C, a terminal that was closed. A run answers by saving and leaving
# with exit code 75.
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def on_stop_signal(call: Callable[[], None]) -> None:
    """Call `call` at every stop signal from here on. A second Ctrl-C is Python's own KeyboardInterrupt."""

    def handle(number, _frame) -> None:
        call()
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    for number in STOP_SIGNALS:
        # Under nohup, or as a shell's job in the background, a process is started with SIGHUP or SIGINT ignored.
        ignored = signal.getsignal(number) is signal.SIG_IGN
        if not ignored or number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, handle)


def ignore_stop_signals() -> None:
    """For a helper process that its parent ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
