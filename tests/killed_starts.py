"""Tokenizing started again and again until it is done; of the starts six are ended soon after their first write.

    python killed_starts.py FOLDER JSON    where tokens go and arguments of tokenize_shards; prints exit codes as JSON

One process imports, then forks the starts, since a start is short and the imports are long.
"""

import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)


def files_of(folder: Path) -> dict[str, int]:
    """The size of each file but the lock, by name."""
    sizes = {}
    for path in folder.rglob("*"):
        # A temporary file may be renamed before it is looked at.
        with suppress(FileNotFoundError):
            if path.is_file() and path.name != "lock":
                sizes[str(path)] = path.stat().st_size
    return sizes


def wait_until_it_writes_or_ends(child: int, folder: Path, before: dict[str, int]) -> None:
    while files_of(folder) == before:
        # WNOWAIT: the exit code is still to be read.
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.005)


def main() -> None:
    import deepspeed  # noqa: F401
    import torch  # noqa: F401

    from peco_ds import tokenize_shards
    from peco_ds.command_line import run

    folder, arguments, drawn = Path(sys.argv[1]), json.loads(sys.argv[2]), random.Random(0)
    codes, ended = [], 0
    while True:
        before = files_of(folder)
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            run(tokenize_shards.main, arguments)
        os.setpgid(child, child)  # here as well: whichever of the two comes first
        if ended < 6:
            wait_until_it_writes_or_ends(child, folder, before)
            time.sleep(drawn.uniform(0, 0.05))
            os.killpg(child, signal.SIGTERM if ended == 2 else signal.SIGKILL)
            ended += 1
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if ended == 6 and codes[-1] != -signal.SIGKILL:
            break
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
