"""Exit codes, and the one exception that is meant for people.

Everything a user can cause (a misspelt key, a missing file, a damaged shard) is raised as `UserError`;
`command_line.run` turns it into one line on stderr and exit code 2. Any other exception is a fault of ours and keeps
its traceback.
"""

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

# In characters.
LONGEST_LINE = 1500


class UserError(ValueError):
    """Bad input, in one line: the value, the reason, the remedy.

    A value from a damaged file can be of any length: a line of more than `LONGEST_LINE` characters keeps its two ends,
    where the place and the remedy stand.
    """

    def __init__(self, line: str) -> None:
        half = LONGEST_LINE // 2
        super().__init__(line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}")


def describe_os_error(error: OSError, place: object = "") -> str:
    """An operating system's error as `file: reason`.

    Args:
        place: named where the error does not tell its file, as one that comes from a file descriptor.
    """
    place = error.filename or place
    reason = error.strerror or str(error)
    return f"{place}: {reason}" if place else reason
