"""Find out when the Slurm job of this process ends, from its environment and from `squeue`; needs no Slurm library."""

from __future__ import annotations

import logging
import re
import subprocess
import time
from collections.abc import Callable, Mapping

logger = logging.getLogger("peco_ds")

# A busy controller answers late; the current step waits no longer than this.
ANSWER_S = 20.0


def seconds_left(environ: Mapping[str, str]) -> float | None:
    """Seconds left of this job, as `squeue` says; inf for no limit, None where it does not answer."""
    command = ["squeue", "--noheader", f"--jobs={_job(environ)}", "--states=all", "--format=%L"]
    try:
        done = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, timeout=ANSWER_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("squeue does not answer (%s)", error)
        return None
    return parse_time_left(done.stdout)


def _job(environ: Mapping[str, str]) -> str:
    """The job as Slurm's commands name it; the id of one task of an array also names the whole array."""
    array = environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ["SLURM_JOB_ID"]


def parse_time_left(text: str) -> float | None:
    """Seconds of Slurm's `days-hours:minutes:seconds`, its first parts left out where they are 0.

    Inf for UNLIMITED, None for anything else.
    """
    text = text.strip()
    if text == "UNLIMITED":
        return float("inf")
    found = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24.0 + hours) * 60 + minutes) * 60 + seconds


class TimeLimit:
    """When the job ends. For rank 0, which passes the answer on to the others like a stop signal.

    The first call reads the environment, then asks Slurm. From then on a clock that does not jump counts down.

    Args:
        environ: of this process.  ask: seconds left of the job of an environment; None: no answer.
    """

    def __init__(
        self, environ: Mapping[str, str], ask: Callable[[Mapping[str, str]], float | None] = seconds_left
    ) -> None:
        self._environ, self._ask = environ, ask
        # The job's end on the monotonic clock; None: no limit, or not known.
        self._end: float | None = None
        # Outside of Slurm there is nothing to ask.
        self._looked = not environ.get("SLURM_JOB_ID")
        self._over = False

    @property
    def left_s(self) -> float | None:
        """Seconds until the job ends; None outside of Slurm, without a limit, or where Slurm does not answer."""
        # Asked only when needed, because of thousands of ranks only one needs it.
        if not self._looked:
            self._look()
        return None if self._end is None else self._end - time.monotonic()

    def is_near(self, margin_s: float) -> bool:
        """Whether the job ends within so many seconds; this only reads the clock. Once True, always True.

        Before it says so for the first time, Slurm is asked whether the limit was put off.
        """
        if not self._over and self._within(margin_s):
            self._refresh()
            self._over = self._within(margin_s)
        return self._over

    def _within(self, margin_s: float) -> bool:
        left = self.left_s
        return left is not None and left <= margin_s

    def _look(self) -> None:
        self._looked = True
        stated = self._environ.get("SLURM_JOB_END_TIME", "")
        if stated.isdecimal() and int(stated):
            self._set(int(stated) - time.time())
        else:
            self._refresh()

    def _refresh(self) -> None:
        """Ask Slurm; without an answer what was known stands."""
        left = self._ask(self._environ)
        if left is not None:
            self._set(left)

    def _set(self, left: float) -> None:
        self._end = None if left == float("inf") else time.monotonic() + left
