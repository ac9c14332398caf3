"""What is meant for people: exit codes, one exception, and one line of notice.

Everything a user can cause (a misspelt key, a missing file, a damaged shard) is raised as `UserError`;
`command_line.run` turns it into one line on stderr and exit code 2. Any other exception is a fault of ours and keeps
its traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
import sys

EXIT_DONE = 0
# A fault of ours; a traceback says where.
EXIT_FAULT = 1
EXIT_BAD_INPUT = 2
# The run stopped in good order and is saved. The number is BSD's EX_TEMPFAIL, "try again later".
EXIT_REQUEUE = 75
# The rank lost the others or hung, through no fault of its own. The newest checkpoint stands; start again to go on.
EXIT_INTERRUPTED = 76
# A second Ctrl-C, or one before the first step. The number is what shells report for SIGINT.
EXIT_KEYBOARD = 130

# Errors of a disk, quota or share, which no program mends; one from a file descriptor names no file.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
OF_STORAGE = FULL | {errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG, errno.ENODEV}

# In characters.
LONGEST_LINE = 1500


class UserError(ValueError):
    """Bad input, in one line: the value, the reason, the remedy.

    A value from a damaged file can be of any length: a line of more than `LONGEST_LINE` characters keeps its two ends,
    where the place and the remedy stand.
    """

    def __init__(self, line: str) -> None:
        line, half = redact(line), LONGEST_LINE // 2
        super().__init__(line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}")


class StoreFault(Exception):
    """A store did not give what was asked of it for as long as it was asked; a later start may find it mended."""

    def __init__(self, line: str) -> None:
        super().__init__(redact(line))


_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s'\"<>]*)")


def redact(text: str) -> str:
    """The text with `***` for users, passwords and queries of the URLs in it: a query may be a signature."""
    return _URL.sub(_without_credentials, text) if "://" in text else text


def _without_credentials(url: re.Match) -> str:
    place, query, _ = url[2].partition("?")
    host, _, port = place.partition("/")[0].partition(":")
    # What is no port is a password, which may hold a slash. (The hub's owner/name@branch has an @ of its own.)
    end = place.rfind("@") if "@" in host or (port and not port.isdigit()) else -1
    return url[1] + ("***" if end >= 0 else "") + place[max(end, 0) :] + ("?***" if query else "")


def shown_command() -> str:
    """The command line of this process, for records."""
    return redact(shlex.join(sys.argv))


def describe_os_error(error: OSError, place: object = "") -> str:
    """An operating system's error as `file: reason`.

    Args:
        place: named where the error does not tell its file, as one that comes from a file descriptor.
    """
    place = error.filename or place
    reason = error.strerror or str(error)
    return f"{place}: {reason}" if place else reason


def printable(text: str) -> str:
    """The text on one line, without what a terminal would obey: control characters, and signs that turn the direction
    of writing, as names of files and of samples may hold them, become escapes. Credentials in URLs become `***`.
    """
    return "".join(sign if sign.isprintable() else _escaped(sign) for sign in redact(text))


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")


def nearest(key: str, known: list[str]) -> str:
    # Nothing longer is near a known key, and comparing takes time by the square of the length.
    key = key[:100]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    # The name may be right and its section wrong or missing.
    if not close:
        close = [other for other in known if other.split(".")[-1] == key.split(".")[-1]][:1]
    return f"; did you mean {close[0]!r}?" if close else ""


def env_rank() -> int:
    """This process's rank, as the launcher (deepspeed, torchrun, srun) wrote it into the environment."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def notice(line: str) -> None:
    """One line on stderr, from rank 0 alone and once a process."""
    if env_rank() == 0 and line not in _noticed:
        _noticed.add(line)
        sys.stderr.write(f"note: {printable(line)}\n")


_noticed: set[str] = set()
