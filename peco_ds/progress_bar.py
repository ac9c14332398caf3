"""How far a long stage has come: a bar on a terminal, else a line now and then, so that logs hold whole lines."""

from __future__ import annotations

import sys
import time

EVERY_S = 5.0


class Progress:
    """Shows a bar on a terminal, else a line every few seconds.

    Args:
        total, done_before: units of the whole work, and of earlier starts.
        units: their name.
    """

    def __init__(self, total: int, done_before: int, units: str) -> None:
        self._total, self._before, self._units = total, done_before, units
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done_before, unit=f" {units}", dynamic_ncols=True)

    def show(self, done_now: int) -> None:
        """Args: done_now: units done since this start."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._before + done_now - self._bar.n)
        elif now - self._last_line >= EVERY_S and done_now:
            self._last_line = now
            rate = done_now / (now - self._start)
            left_s = (self._total - self._before - done_now) / rate
            sys.stderr.write(
                f"{self._before + done_now} of {self._total} {self._units}, {rate:.1f}/s, {left_s:.0f} s left\n"
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
