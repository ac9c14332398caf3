"""The one exception that is meant for people.

Everything a user can cause (a misspelt key, a missing file, a damaged shard) is raised as `UserError`;
`command_line.run` turns it into one line on stderr and exit code 2. Any other exception is a fault of ours and keeps
its traceback.
"""

EXIT_DONE = 0
EXIT_FAULT = 1  # ours; a traceback says where
EXIT_BAD_INPUT = 2
# stopped in good order, state saved: BSD's EX_TEMPFAIL, "try again later"
EXIT_REQUEUE = 75
# lost the other ranks or hung, through no fault of this rank's: the newest checkpoint stands, start again to go on
EXIT_INTERRUPTED = 76
# a second Ctrl-C, or one before the first step; what shells say of SIGINT
EXIT_KEYBOARD = 130


LONGEST_LINE = 1500  # characters


class UserError(ValueError):
    """Bad input, in one line: the value, the reason, the remedy.

    A value from a damaged file can be of any length: a line of more than `LONGEST_LINE` characters keeps its two ends,
    where the place and the remedy stand.
    """

    def __init__(self, line: str) -> None:
        half = LONGEST_LINE // 2
        super().__init__(line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}")
